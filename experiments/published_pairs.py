r"""Do the papers' numbers come out again? Their model pairs beside their tables.

Analyses the ten pairs of P1's Table 7 one after another and sets them beside P1's
Tables 2, 3, 8, 9 and 10 and P2's Table 1, with the deviation of each cell.

    python -m experiments.published_pairs --workdir=runs/published

takes the checkpoints from the Hugging Face hub, some 30 GB. Pairs whose tuned side was
never published are named and left out, unless there is a folder for it:

    python -m experiments.published_pairs --workdir=runs/published --root=DIR

looks for all checkpoints in DIR/ORGANISATION/NAME or DIR/NAME instead, and for those
that are local only under the names that `experiments/published/pairs.py` lists.

Each pair has a folder of its own in the workdir, as of `experiments.update_geometry`;
results.json, report.html and report.md compare them all. A run that was stopped, or for
which more checkpoints were had since, goes on when it is started again. The exit status
is 2 if a tensor holds NaN or infinity.
"""

# ruff: noqa: E402
import os

# Before NumPy loads: two matrices at a time beat one factored by two threads.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import json
import re
import sys
from pathlib import Path
from typing import Any

import jax
import ml_collections
from absl import flags
from ml_collections import config_flags
from tqdm import tqdm

from experiments.common import cli
from experiments.common import workdir as workdirs
from experiments.common.environment import command, environment
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
from geomjax.analysis.stacks import Stack
from geomjax.checkpoints import CheckpointError, CheckpointSource, open_source

CONFIG = Path(__file__).parent.parent / "configs" / "published_pairs.py"
NOT_FINITE_STATUS = 2
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
    facts: dict[str, Any] = {"command": command(), **environment()}
    files = write(outcomes, comparisons, facts, workdir)
    print_outcome(outcomes, comparisons)
    print(f"written to {files.page}")
    return outcomes


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
        source, tuned = map(open_source, found)
        result = measure_pair(pair, source, tuned, config, workdir)
    except CheckpointError as error:
        return PairOutcome(pair, None, " ".join(str(error).split()))
    return PairOutcome(pair, result, "")


def measure_pair(
    pair: PublishedPair,
    source: CheckpointSource,
    tuned: CheckpointSource,
    config: ml_collections.ConfigDict,
    workdir: Path,
) -> analysis.RunResult:
    """Runs the analysis in the pair's folder, on all devices, as P1 subtracts."""
    devices = jax.devices()
    mesh = jax.make_mesh(
        (len(devices),), ("stack",), axis_types=(jax.sharding.AxisType.Auto,)
    )
    budget = int(config.memory_budget_gib * 2**30)
    with tqdm(unit=" tensors", desc=pair.name) as bar:

        def progress(stack: Stack, rows: list[dict[str, Any]]) -> None:
            bar.update(len(rows))

        return analysis.run(
            source,
            tuned,
            workdir / folder_name(pair),
            delta="stored",
            subtract="bfloat16",
            metrics=METRICS,
            null_seeds=range(config.null_seeds),
            mesh=mesh if len(devices) > 1 else None,
            memory_budget=budget or None,
            common_rows=config.common_rows,
            progress=progress,
        )


def folder_name(pair: PublishedPair) -> str:
    """The pair's folder in the workdir: its name without spaces and brackets."""
    return re.sub(r"[^A-Za-z0-9.]+", "-", pair.name).strip("-")


if __name__ == "__main__":
    cli.main(main, define_flags)
