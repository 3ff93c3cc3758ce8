r"""Tables of what `experiments.aot_check --json=rows.jsonl` has found.

    python -m experiments.aot_table --json=rows.jsonl

Prints, as Markdown, a line for each program of each row: what it takes of a chip, and
the seconds that its products and what a chip sends would take at the peak of the chip
and of its links. Rows of one run on more and more chips, with as many sequences more,
are its weak scaling: what a chip sends must stay below what it computes.
"""

# ruff: noqa: T201
import json
import math
from pathlib import Path
from typing import Any

from absl import flags

from experiments.aot.chips import CHIPS
from experiments.common import cli

HEADER = (
    "run",
    "slice",
    "mesh",
    "program",
    "sequences",
    "processor time to compile",
    "a chip",
    "products at peak",
    "a chip sends",
    "at its links' peak",
)


def define_flags() -> None:
    """Defines the flags; not at import: experiments can be imported together."""
    flags.DEFINE_string("json", None, "File that aot_check has added lines to.")


def table(rows: list[dict[str, Any]]) -> list[str]:
    """A Markdown table, one line for each program of each row.

    Args:
      rows: As `experiments.aot_check` writes them.

    Returns:
      Its lines.

    Raises:
      ValueError: A row is not as this version writes them; names its line.
    """
    cells = [HEADER, ("---",) * len(HEADER)]
    for line, row in enumerate(rows, start=1):
        try:
            cells += _cells(row)
        except KeyError as error:
            raise ValueError(
                f"line {line} has no field {error}; compile that run anew"
            ) from error
        except ValueError as error:
            raise ValueError(f"line {line}: {error}") from error
    return ["| " + " | ".join(line) + " |" for line in cells]


def _cells(row: dict[str, Any]) -> list[tuple[str, ...]]:
    """The cells of a row's programs."""
    generation, _, shape = row["topology"].partition(":")
    if generation not in CHIPS:
        raise ValueError(
            f"topology {row['topology']!r}: expected one of {sorted(CHIPS)} and a shape"
        )
    chip, chips = CHIPS[generation], math.prod(map(int, shape.split("x")))
    student, teacher = (row[n].rpartition("/")[2] for n in ("student", "teacher"))
    run = f"{student} < {teacher}"
    if row["layers"]:
        run += f", {row['layers']} layers"
    cells: list[tuple[str, ...]] = []
    for name in ("update", "rollout", "geometry"):
        if name not in row:
            continue
        found = row[name]
        held = f"does not fit, {found['over']}"
        if found["chip_bytes"] is not None:
            held = f"{found['chip_bytes'] / 2**30:.2f} GiB"
        products = ""
        if found["flops"] is not None:
            products = f"{found['flops'] / chips / chip.peak_flops:.3g} s"
        sent = sum(found["sent_bytes"].values())
        moved = links = ""
        if found["chip_bytes"] is not None:
            moved = f"{sent / 1e9:,.1f} GB"
            links = f"{sent / chip.link_bytes_per_s:.3g} s"
        cells.append(
            (
                run,
                f"`{row['topology']}`",
                f"`{row['mesh'] or f'fsdp={chips}'}`",
                name,
                str(row.get(f"sequences_per_{name}", "")),
                f"{found['processor_s']:.0f} s",
                held,
                products,
                moved,
                links,
            )
        )
    return cells


def main() -> None:
    """Prints the table of the command line's file."""
    if flags.FLAGS.json is None:
        raise ValueError("--json is not given; --help explains it")
    text = Path(flags.FLAGS.json).read_text(encoding="utf-8")
    rows = []
    for number, line in enumerate(text.splitlines(), start=1):
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            raise ValueError(f"line {number} is not JSON: {error}") from error
    print("\n".join(table(rows)))


if __name__ == "__main__":
    cli.main(main, define_flags)
