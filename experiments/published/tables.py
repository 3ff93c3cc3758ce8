"""The published tables as data, and measured summaries set beside them."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from geomjax.analysis import Summary

FILE = Path(__file__).parent / "tables.json"


class PublishedColumn(NamedTuple):
    """One column of a published table.

    Attributes:
      title: Its heading, with the unit.
      value: Where `summary.json` has it, keys joined by slashes; several are
        added, of which there may be one alone, where a name depends on the model.
      percent: Whether it is printed in percent.
      decimals: Digits printed after the point.
    """

    title: str
    value: tuple[str, ...]
    percent: bool
    decimals: int

    def measured(self, summary: Summary) -> float | None:
        """The summary's value in the table's unit; None where it has none."""
        found = [_look_up(summary, path) for path in self.value]
        known = [value for value in found if value is not None]
        if not known:
            return None
        return math.fsum(known) * (100 if self.percent else 1)


class PublishedTable(NamedTuple):
    """A table as printed.

    Attributes:
      paper: Its paper.
      version: The version of the paper that has these numbers.
      note: Where the paper contradicts itself, or its definition is not ours.
      columns: The columns.
      rows: Numbers by the name of the pair; None for a dash.
    """

    paper: str
    version: str
    note: str
    columns: tuple[PublishedColumn, ...]
    rows: dict[str, tuple[float | None, ...]]


class TableCell(NamedTuple):
    """One number as published and as measured, in the table's unit.

    Attributes:
      pair: The pair.
      column: Title of the column.
      published: As printed; None for a dash or a pair the table does not have.
      measured: None where the pair was not analysed or the value is undefined.
      deviation: Measured less published.
      relative_deviation: That over the published number; None where it is 0.
      within_rounding: Whether the measured number rounds to the published one.
    """

    pair: str
    column: str
    published: float | None
    measured: float | None
    deviation: float | None
    relative_deviation: float | None
    within_rounding: bool | None


def load_tables() -> dict[str, PublishedTable]:
    """The published tables, by name."""
    return {
        name: PublishedTable(
            paper=table["paper"],
            version=table["version"],
            note=table["note"],
            columns=tuple(
                PublishedColumn(
                    column["title"],
                    tuple(column["value"]),
                    column["percent"],
                    column["decimals"],
                )
                for column in table["columns"]
            ),
            rows={name: tuple(row) for name, row in table["rows"].items()},
        )
        for name, table in json.loads(FILE.read_text(encoding="utf-8")).items()
    }


def compare(
    table: PublishedTable, summaries: Mapping[str, Summary]
) -> list[list[TableCell]]:
    """Sets summaries beside a table.

    Args:
      table: The table.
      summaries: What was measured, by the name of the pair.

    Returns:
      A row of cells for each pair of the table, and for each further one measured.
    """
    return [
        [
            _cell(name, column, published, summaries.get(name))
            for column, published in zip(
                table.columns,
                table.rows.get(name, (None,) * len(table.columns)),
                strict=True,
            )
        ]
        for name in dict.fromkeys((*table.rows, *summaries))
    ]


def _cell(
    pair: str,
    column: PublishedColumn,
    published: float | None,
    summary: Summary | None,
) -> TableCell:
    measured = None if summary is None else column.measured(summary)
    deviation = relative = within = None
    if measured is not None and published is not None:
        deviation = measured - published
        relative = deviation / published if published else None
        # Half a unit of the last digit, and a little for ties in binary.
        within = abs(deviation) <= 0.5001 * 10.0**-column.decimals
    return TableCell(
        pair, column.title, published, measured, deviation, relative, within
    )


def _look_up(summary: Summary, path: str) -> float | None:
    """A value of a summary; None for a group that the model does not have."""
    value: Any = summary
    for key in path.split("/"):
        if value is summary["groups"] and key not in value:
            return None
        value = value[key]
    return value
