"""Do two trainings of one source move the same coordinates? P1's Table 4.

    python -m experiments.mask_overlap --source=DIR --a=DIR --b=DIR --workdir=OUT

Writes overlap.csv, a row for each tensor, and overlap_summary.json: coverage of each
update's support by the other's, Jaccard's index and the lift, each with its chance
level, for the whole model and for its groups, modules and layers.
"""

import json
from pathlib import Path

from absl import flags
from tqdm import tqdm

from experiments.common import cli
from geomjax.analysis.journal import write_atomically
from geomjax.analysis.overlap import ATOL, overlap, summarize_overlap
from geomjax.analysis.run import to_csv
from geomjax.checkpoints import open_source


def define_flags() -> None:
    """Defines the flags; not at import: experiments can be imported together."""
    flags.DEFINE_string("source", None, "Checkpoint before training.", required=True)
    flags.DEFINE_string("a", None, "First trained checkpoint.", required=True)
    flags.DEFINE_string("b", None, "Second trained checkpoint.", required=True)
    flags.DEFINE_string("workdir", None, "Folder for the results.", required=True)
    flags.DEFINE_enum("delta", "stored", ["stored", "master"], "How to form updates.")
    flags.DEFINE_enum(
        "subtract", "bfloat16", ["bfloat16", "float32"], "Rounding of a difference."
    )
    flags.DEFINE_float("atol", ATOL, "What moved by no more counts as unmoved.")


def main() -> None:
    """Runs the comparison that the flags describe."""
    values = flags.FLAGS
    sources = [open_source(name) for name in (values.source, values.a, values.b)]
    with tqdm(unit=" tensors", desc="comparing") as bar:
        rows = overlap(
            *sources,
            delta=values.delta,
            subtract=values.subtract,
            atol=values.atol,
            progress=lambda name: bar.update(),
        )
    if not rows:
        raise ValueError("no tensor is in all three checkpoints with one shape")
    summary = summarize_overlap(rows)
    workdir = Path(values.workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    write_atomically(workdir / "overlap.csv", to_csv(rows, list(rows[0])))
    text = json.dumps(summary, indent=1, allow_nan=False) + "\n"
    write_atomically(workdir / "overlap_summary.json", text)
    print(f"{'':<12} {'a by b':>16} {'b by a':>16} {'Jaccard':>16} {'lift':>7}")
    for label, part in {"all": summary["global"], **summary["groups"]}.items():
        cells = [
            f"{_percent(part[f'{column}_chance'])} -> {_percent(part[column])}"
            for column in ("covered_by_b", "covered_by_a", "jaccard")
        ]
        lift = "null" if part["lift"] is None else f"{part['lift']:.2f}x"
        print(f"{label:<12} " + " ".join(f"{c:>16}" for c in cells) + f" {lift:>7}")


def _percent(value: float | None) -> str:
    return "null" if value is None else f"{100 * value:.2f}"


if __name__ == "__main__":
    define_flags()
    cli.main(main)
