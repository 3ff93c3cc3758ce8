"""How an update grows over the checkpoints of one run, as in P2's Figures 4 and 5.

    python -m experiments.trajectory --source=DIR --checkpoints DIR1 DIR2 --workdir=OUT

Give the checkpoints in the order of training; snapshots that studies kept of different
runs are refused. Written to OUT: trajectory.csv, a row for each matrix and checkpoint:
norm, stable rank, Hill exponent, similarity of the leading 16 right directions to the
last checkpoint's and to the next one's, with its chance level; trajectory_summary.json,
their means over the attention matrices and over all; report.html with report.md and
figures/ beside it; run.json with the command, versions, time and memory. The exit
status is 2 if a matrix holds NaN or infinity: it is named, and left out of the means.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from absl import flags
from tqdm import tqdm

from experiments.common import cli, update_flags
from experiments.common.outcome import FINAL, SNAPSHOTS
from experiments.common.record import Watch, write_record
from experiments.geometry_report import trajectory as report
from experiments.geometry_report.read import shortest_labels
from geomjax.analysis import Row
from geomjax.analysis.journal import write_atomically
from geomjax.analysis.report import write_report
from geomjax.analysis.run import to_csv
from geomjax.analysis.trajectory import COLUMNS, NOT_FINITE, average, trajectory
from geomjax.checkpoints import open_source
from geomjax.train.log import FILE as METRICS

NOT_FINITE_STATUS = 2


def define_flags() -> None:
    """Defines the flags; not at import: experiments can be imported together."""
    update_flags.define_flags()
    flags.adopt_module_key_flags(update_flags)
    flags.DEFINE_string("source", None, "Where the run started.")
    flags.DEFINE_list("checkpoints", None, "Its checkpoints, in order.")
    flags.DEFINE_list("labels", None, "Their names, such as steps; folders if unset.")
    flags.DEFINE_integer("hill_rank", None, "K of the Hill exponent; r // 10 if unset.")
    flags.mark_flags_as_required(["source", "checkpoints", "workdir"])


def main() -> None:
    """Follows the run that the flags describe."""
    values = flags.FLAGS
    settings = report.Settings(
        source=values.source,
        checkpoints=tuple(values.checkpoints),
        labels=tuple(values.labels or shortest_labels(values.checkpoints)),
        workdir=values.workdir,
        delta=values.delta,
        subtract=values.subtract,
        hill_rank=values.hill_rank,
    )
    if any(row["notes"] == NOT_FINITE for row in follow(settings)):
        sys.exit(NOT_FINITE_STATUS)


def follow(settings: report.Settings) -> list[Row]:
    """Measures a run's checkpoints, writes and prints the tables, draws the report.

    Args:
        settings: what to follow, how, and where to write it.

    Returns:
        The rows of trajectory.csv.

    Raises:
        ValueError: no matrix is in the source and in every checkpoint, there is not one
            label for each checkpoint, or a study kept them of different runs.
        OSError: the folder cannot be written.
    """
    require_one_run(settings.checkpoints)
    workdir = Path(settings.workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    with Watch() as watch:
        source = open_source(settings.source)
        with tqdm(unit=" matrices", desc="following") as bar:
            rows = trajectory(
                source,
                [open_source(name, base=source) for name in settings.checkpoints],
                settings.labels,
                delta=settings.delta,
                subtract=settings.subtract,
                hill_rank=settings.hill_rank,
                progress=lambda name: bar.update(),
            )
        if not rows:
            raise ValueError("no matrix is in the source and in every checkpoint")
        means = average(rows)
        write_atomically(workdir / "trajectory.csv", to_csv(rows, list(rows[0])))
        text = json.dumps(means, indent=1, allow_nan=False) + "\n"
        write_atomically(workdir / "trajectory_summary.json", text)
        print_means(means)
        record = write_record(workdir, settings._asdict(), watch)
        followed = {row["name"] for row in rows}
        absent = [
            name
            for name in source.keys()
            if len(source.spec(name).shape) == 2 and name not in followed
        ]
        made = report.build(rows, means, absent, settings, record)
        files = write_report(made, workdir)
    print(f"written to {json.dumps(str(files.page))} and beside it")
    return rows


def require_one_run(checkpoints: Sequence[str]) -> None:
    """Raises ValueError for snapshots and ends of different runs of studies.

    Their folders tell: a run's holds its metrics. Of other checkpoints nothing says
    which run they are of.
    """
    runs: dict[Path, str] = {}
    for name in checkpoints:
        folder = Path(name).resolve()
        run = folder.parent if folder.name == FINAL else folder.parent.parent
        kept = folder.name == FINAL or folder.parent.name == SNAPSHOTS
        if kept and (run / METRICS).exists():
            runs.setdefault(run, name)
    if len(runs) > 1:
        first, second, *_ = runs.values()
        raise ValueError(
            f"checkpoints {first} and {second} are of different runs; expected those "
            "of one"
        )


def print_means(means: report.Means) -> None:
    """Prints a line for each checkpoint."""
    for which, table in means.items():
        print(f"mean over {which} matrices")
        for point in table:
            cells = [f"{column} {_show(point[column])}" for column in COLUMNS]
            print(f"  {point['checkpoint']}: " + ", ".join(cells))


def _show(value: float | None) -> str:
    return "null" if value is None else f"{value:.4g}"


if __name__ == "__main__":
    update_flags.gather_command_line("checkpoints")
    cli.main(main, define_flags)
