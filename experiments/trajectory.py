"""How an update grows over the checkpoints of one run, as in P2's Figures 4 and 5.

    python -m experiments.trajectory --source=DIR --checkpoints=DIR1,DIR2 --workdir=OUT

Give the checkpoints in the order of training. Writes trajectory.csv, a row for each
matrix and checkpoint: norm, stable rank, Hill exponent, similarity of the leading 16
right directions to the last checkpoint's and to the next one's, with its chance level;
and trajectory_summary.json, their means over the attention matrices and over all.
"""

import json
from pathlib import Path

from absl import flags
from tqdm import tqdm

from experiments.common import cli
from geomjax.analysis.journal import write_atomically
from geomjax.analysis.run import to_csv
from geomjax.analysis.trajectory import COLUMNS, average, trajectory
from geomjax.checkpoints import open_source


def define_flags() -> None:
    """Defines the flags; not at import: experiments can be imported together."""
    flags.DEFINE_string("source", None, "Where the run started.", required=True)
    flags.DEFINE_list("checkpoints", None, "Its checkpoints, in order.", required=True)
    flags.DEFINE_list("labels", None, "Their names, such as steps; folders if unset.")
    flags.DEFINE_string("workdir", None, "Folder for the results.", required=True)
    flags.DEFINE_enum("delta", "stored", ["stored", "master"], "How to form updates.")
    flags.DEFINE_enum(
        "subtract", "bfloat16", ["bfloat16", "float32"], "Rounding of a difference."
    )
    flags.DEFINE_integer("hill_rank", None, "K of the Hill exponent; r // 10 if unset.")


def main() -> None:
    """Follows the run that the flags describe."""
    values = flags.FLAGS
    labels = values.labels or values.checkpoints
    with tqdm(unit=" matrices", desc="following") as bar:
        rows = trajectory(
            open_source(values.source),
            [open_source(name) for name in values.checkpoints],
            labels,
            delta=values.delta,
            subtract=values.subtract,
            hill_rank=values.hill_rank,
            progress=lambda name: bar.update(),
        )
    if not rows:
        raise ValueError("no matrix is in the source and in every checkpoint")
    means = average(rows)
    workdir = Path(values.workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    write_atomically(workdir / "trajectory.csv", to_csv(rows, list(rows[0])))
    text = json.dumps(means, indent=1, allow_nan=False) + "\n"
    write_atomically(workdir / "trajectory_summary.json", text)
    for which, table in means.items():
        print(f"mean over {which} matrices")
        for point in table:
            cells = [f"{column} {_show(point[column])}" for column in COLUMNS]
            print(f"  {point['checkpoint']}: " + ", ".join(cells))


def _show(value: float | None) -> str:
    return "null" if value is None else f"{value:.4g}"


if __name__ == "__main__":
    define_flags()
    cli.main(main)
