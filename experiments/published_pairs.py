r"""Do the papers' numbers come out again? Their model pairs beside their tables.

Analyses the ten pairs of P1's Table 7 one after another and sets them beside P1's
Tables 2, 3, 8, 9 and 10 and P2's Table 1, with the deviation of each cell.

    python -m experiments.published_pairs --workdir=runs/published

takes the checkpoints from the Hugging Face hub, some 30 GB. Pairs whose tuned side was
never published are named and left out, unless there is a folder for it:

    python -m experiments.published_pairs --workdir=runs/published --root=DIR

looks for all checkpoints in DIR/ORGANISATION/NAME or DIR/NAME instead, and for those
that are local only under the names that `experiments/published/pairs.py` lists.

The names of the models come from P1's Table 7 (and P2's Table 1), and were not verified
against the hub. `experiments/published/pairs.py` has the repositories that go with
them; those that the papers do not name outright are marked there and in the report.

Each pair has a folder of its own in the workdir, with tables and report as of
`experiments.update_geometry`; compare/report.html draws all pairs side by side;
results.json, report.html and report.md set them beside the papers and link the others.
A run that was stopped, or for which more checkpoints were had since, goes on when it is
started again. The exit status is 2 if a tensor holds NaN or infinity.
"""

import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ml_collections
from absl import flags
from ml_collections import config_flags

from experiments.common import cli
from experiments.common import workdir as workdirs
from experiments.common.environment import command, environment
from experiments.common.record import Watch
from experiments.geometry_report import build, finish, measure, read
from experiments.geometry_report.settings import Settings
from experiments.published.pairs import (
    NotAvailableError,
    PublishedPair,
    choose,
    locate,
)
from experiments.published.report import (
    PairOutcome,
    TableComparison,
    print_outcome,
    record,
    write,
)
from experiments.published.tables import compare, load_tables
from geomjax import analysis
from geomjax.analysis.journal import write_atomically
from geomjax.checkpoints import CheckpointError, CheckpointSource, open_source

CONFIG = Path(__file__).parent.parent / "configs" / "published_pairs.py"
NOT_FINITE_STATUS = 2
COMPARE_FOLDER = "compare"
METRICS = analysis.DEFAULT


def define_flags() -> None:
    """Defines the flags; not at import, so that experiments can be imported together.

    Defining `--config` reads the configuration file.
    """
    config_flags.DEFINE_config_file(
        "config", str(CONFIG), "Configuration; FILE:p2 and FILE:all are variants."
    )
    flags.DEFINE_string(
        "workdir", "runs/published_pairs", "Folder of the tables, results and report."
    )
    flags.DEFINE_string(
        "root", None, "Folder of checkpoint folders; the hub is used if it is unset."
    )


def main() -> None:
    """Runs the comparison that the flags describe."""
    values = flags.FLAGS
    workdir = Path(values.workdir)
    root = None if values.root is None else Path(values.root)
    with workdirs.locked(workdir):
        outcomes = run(values.config, root, workdir)
    if any(o.result is not None and o.result.not_finite for o in outcomes):
        sys.exit(NOT_FINITE_STATUS)


def run(
    config: ml_collections.ConfigDict, root: Path | None, workdir: Path
) -> list[PairOutcome]:
    """Analyses the pairs, and writes results and report.

    Raises:
      ValueError: No pair could be analysed, with the reason for each; or a field of the
        configuration, or `root`, is wrong.
    """
    if root is not None and not root.is_dir():
        raise ValueError(f"--root={root}: no such folder")
    pairs = choose(tuple(config.papers), tuple(config.only))
    outcomes = [analyse_pair(pair, config, root, workdir) for pair in pairs]
    summaries = {
        o.pair.name: o.result.summary for o in outcomes if o.result is not None
    }
    if not summaries:
        reasons = "".join(f"\n  - {o.pair.name}: {o.reason}" for o in outcomes)
        raise ValueError(
            f"no pair could be analysed:{reasons}\nGive --root=DIR with a folder for "
            "each checkpoint, such as DIR/Qwen/Qwen3-4B or DIR/Qwen3-4B, or leave "
            "--root out and run with access to the hub (HF_HUB_OFFLINE unset)"
        )
    comparisons = [
        TableComparison(name, table, compare(table, summaries))
        for name, table in load_tables().items()
    ]
    results = record(outcomes, comparisons)
    text = json.dumps(results, indent=1, allow_nan=False) + "\n"
    write_atomically(workdir / "results.json", text)
    links = compare_pairs(outcomes, workdir)
    facts: dict[str, Any] = {"command": command(), **environment()}
    files = write(outcomes, comparisons, facts, links, workdir)
    print_outcome(outcomes, comparisons)
    print(f"written to {files.page}")
    return outcomes


def compare_pairs(outcomes: Sequence[PairOutcome], workdir: Path) -> dict[str, str]:
    """Draws the analysed pairs side by side.

    Returns:
      Paths of this report and of the pairs' own, relative to the workdir, by title.
    """
    done = [o.pair for o in outcomes if o.result is not None]
    folders = {pair.name: folder_name(pair) for pair in done}
    runs = {name: read.read_results(workdir / f) for name, f in folders.items()}
    files = build.write(runs, workdir / COMPARE_FOLDER)
    pages = {"All pairs side by side": f"{COMPARE_FOLDER}/{files.page.name}"}
    return pages | {name: f"{f}/{files.page.name}" for name, f in folders.items()}


def analyse_pair(
    pair: PublishedPair,
    config: ml_collections.ConfigDict,
    root: Path | None,
    workdir: Path,
) -> PairOutcome:
    """Analyses one pair; what is wrong with its checkpoints becomes its outcome."""
    found, missing = [], []
    for side in (pair.source, pair.tuned):
        try:
            found.append(locate(side, root))
        except NotAvailableError as error:
            missing.append(str(error))
    if missing:
        return PairOutcome(pair, None, "; ".join(missing))
    try:
        source = open_source(found[0])
        tuned = open_source(found[1], base=source)
        settings = Settings(
            source=found[0],
            tuned=found[1],
            workdir=str(workdir / folder_name(pair)),
            null_seeds=config.null_seeds,
            memory_budget=config.memory_budget_gib or None,
            common_rows=config.common_rows,
        )
        result = measure_pair(pair, source, tuned, settings)
    except CheckpointError as error:
        return PairOutcome(pair, None, " ".join(str(error).split()))
    return PairOutcome(pair, result, "")


def measure_pair(
    pair: PublishedPair,
    source: CheckpointSource,
    tuned: CheckpointSource,
    settings: Settings,
) -> analysis.RunResult:
    """Runs the analysis in the pair's folder, as P1 subtracts, and draws its report."""
    with Watch() as watch:
        result = measure.measure(source, tuned, settings, METRICS, label=pair.name)
        finish.finish(source, tuned, settings, result, watch)
    return result


def folder_name(pair: PublishedPair) -> str:
    """The pair's folder in the workdir: its name without spaces and brackets."""
    return re.sub(r"[^A-Za-z0-9.]+", "-", pair.name).strip("-")


if __name__ == "__main__":
    cli.main(main, define_flags)
