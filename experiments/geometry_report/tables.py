"""Tables of the report: whole-model figures with their nulls, groups, matching."""

from collections.abc import Mapping
from typing import Any

from experiments.geometry_report.columns import NULLS, QUANTITIES, Quantity
from experiments.geometry_report.read import Results
from geomjax.analysis.report import Cell, Column, Table
from geomjax.names import GROUPS


def value(results: Results, quantity: Quantity, null: str | None) -> float | None:
    """A quantity of a run, or of its null."""
    take = results.median if quantity.median else results.total
    return take(quantity.column, null)


def chance(results: Results, quantity: Quantity) -> float | None:
    """The chance level of a quantity, None if it has none."""
    return results.total(f"{quantity.column}_chance") if quantity.has_chance else None


def measured(runs: Mapping[str, Results]) -> list[Quantity]:
    """The quantities that at least one run has a value for."""
    return [
        quantity
        for quantity in QUANTITIES
        if any(value(results, quantity, None) is not None for results in runs.values())
    ]


def totals(results: Results) -> Table:
    """One run's whole-model figures, beside its nulls and chance levels."""
    shown = results.nulls()
    columns = [Column("quantity", align="left"), Column("", align="left")]
    columns += [Column("update")]
    columns += [Column(NULLS[null]) for null in shown] + [Column("chance")]
    rows = []
    for quantity in measured({"": results}):
        numbers = [value(results, quantity, None)]
        numbers += [
            value(results, quantity, null) if null in quantity.nulls else None
            for null in shown
        ]
        numbers.append(chance(results, quantity))
        how = "median over matrices" if quantity.median else "pooled"
        rows.append(
            [quantity.title, how, *(format_number(quantity, n) for n in numbers)]
        )
    return Table(
        columns,
        rows,
        "Whole-model figures. A null has each update's norm and nothing else of it: a "
        "Gaussian one in float32, and one that is rounded to bfloat16. Chance: the "
        "level of an update that knows nothing of W. A dash: not defined, or no "
        "meaningful comparison.",
    )


def comparison(runs: Mapping[str, Results]) -> Table:
    """Whole-model figures of several runs, a row a run."""
    quantities = measured(runs)
    columns = [Column("run", align="left"), *(Column(q.title) for q in quantities)]
    rows = [
        [label, *(format_number(q, value(results, q, None)) for q in quantities)]
        for label, results in runs.items()
    ]
    return Table(
        columns,
        rows,
        "Whole-model figures, pooled over coordinates or energy; spectral ones are "
        "medians over matrices.",
    )


def format_number(quantity: Quantity, number: float | None) -> str | None:
    """A number with its unit, to four digits."""
    if number is None:
        return None
    return f"{100 * number:.4g}%" if quantity.percent else f"{number:.4g}"


def parts(results: Results) -> Table:
    """A row a group: size, share of the energy, norm and sparsity."""
    groups = results.summary["groups"]
    columns = {
        "tensors": Column("tensors"),
        "numel": Column("parameters", spec=",.0f"),
        "energy_share": Column("share of ‖D‖²", spec=".2%"),
        "relative_frobenius": Column("‖D‖/‖W‖", spec=".4%"),
        "unchanged_atol_1e-05": Column("unchanged to 1e-5", spec=".2%"),
    }
    first = next(iter(groups.values()))
    names = [name for name in columns if name in first]
    rows = [
        [group, *(groups[group][name] for name in names)]
        for group in GROUPS
        if group in groups
    ]
    head = [Column("group", align="left"), *(columns[name] for name in names)]
    return Table(head, rows, "By group; norms and shares pooled.")


def matching_text(matching: Mapping[str, Any]) -> list[str]:
    """What was compared and what was not, in sentences."""
    matched = matching["matched"]
    how = [item["how"] for item in matched]
    counts = ", ".join(f"{how.count(kind)} {kind}" for kind in dict.fromkeys(how))
    lines = [f"{len(matched)} tensors were compared ({counts})."]
    if matching["complete"]:
        lines.append("Every tensor of both checkpoints is accounted for.")
    lists = {
        "missing": "Missing in the tuned checkpoint",
        "extra": "Only in the tuned checkpoint",
        "ambiguous": "Ambiguous, not compared",
        "mismatched": "Of different shapes, not compared",
        "cut": "Compared in their common rows only",
        "duplicates": "Heads that are tied to the embedding, not compared twice",
    }
    for key, what in lists.items():
        if names := list(matching[key]):
            lines.append(f"{what}: {_some(names)}.")
    for side, names in matching["left_out"].items():
        if names:
            reasons = [f"{name} ({reason})" for name, reason in names.items()]
            lines.append(f"Left out by the reader of the {side}: {_some(reasons)}.")
    return lines


def notes(results: Results) -> Table | None:
    """Why fields are null, with the tensors concerned; None if nothing is to say."""
    by_note: dict[str, list[str]] = {}
    for row in results.rows:
        for note in filter(None, row["notes"].split("; ")):
            by_note.setdefault(note, []).append(row["name"])
    if not by_note:
        return None
    rows: list[list[Cell]] = [
        [note, len(names), _some(names, 3)] for note, names in by_note.items()
    ]
    columns = [
        Column("why fields are null", align="left"),
        Column("tensors"),
        Column("which", align="left"),
    ]
    return Table(columns, rows, "Nulls in tensors.csv, with their reasons.")


def _some(names: list[str], most: int = 8) -> str:
    rest = len(names) - most
    return ", ".join(names[:most]) + (f" and {rest} more" if rest > 0 else "")
