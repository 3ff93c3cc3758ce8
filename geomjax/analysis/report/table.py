"""Tables: typed columns, estimates with intervals, and which cells are the best."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np

from geomjax.analysis.plots.bands import student_half_width


class Estimate(NamedTuple):
    """A mean and the half width of its confidence interval.

    Attributes:
      mean: The mean; NaN if nothing was measured.
      half_width: Half width of the interval, None if it is unknown.
    """

    mean: float
    half_width: float | None

    @classmethod
    def from_samples(
        cls, samples: Sequence[float | None], confidence: float = 0.95
    ) -> "Estimate":
        """Mean and Student-t interval of repeats; no interval for fewer than two.

        Repeats that are None or not finite are left out.
        """
        known = [s for s in samples if s is not None and math.isfinite(s)]
        values = np.array(known, np.float64)
        if len(values) == 0:
            return cls(math.nan, None)
        mean = float(np.mean(values))
        if len(values) == 1:
            return cls(mean, None)
        return cls(mean, float(student_half_width(values[:, None], confidence)[0]))


Cell = str | bool | int | float | np.generic | Estimate | None
"""What a table holds; None and NaN are shown as a dash."""

MISSING = "–"


@dataclasses.dataclass(frozen=True)
class Column:
    """How one column of a table is headed, aligned and formatted.

    Attributes:
      title: Its heading, with the unit.
      align: `left` for names, `right` for numbers.
      spec: Python's format specification for numbers, such as `.3f` or `.1%`.
      best: Whether the greatest or the least value is highlighted; with estimates also
        those whose interval meets the interval of the best.
    """

    title: str
    align: Literal["left", "right"] = "right"
    spec: str = ".4g"
    best: Literal["max", "min"] | None = None

    def format(self, cell: Cell) -> str:
        """The text of a cell of this column."""
        if isinstance(cell, np.generic):
            cell = cell.item()
        if isinstance(cell, Estimate):
            return self._format_estimate(cell)
        if cell is None or (isinstance(cell, float) and math.isnan(cell)):
            return MISSING
        if isinstance(cell, bool):
            return "yes" if cell else "no"
        if isinstance(cell, str):
            return cell
        if isinstance(cell, int) and not self.spec.endswith(("%", "f", "e")):
            return str(cell)
        return format(cell, self.spec)

    def _format_estimate(self, cell: Estimate) -> str:
        if math.isnan(cell.mean):
            return MISSING
        mean = format(cell.mean, self.spec)
        if cell.half_width is None:
            return mean
        half = format(cell.half_width, self.spec)
        if mean.endswith("%"):
            return f"{mean[:-1]} ± {half[:-1]}%"
        return f"{mean} ± {half}"


@dataclasses.dataclass(frozen=True)
class Table:
    """Rows under headed columns; the first column names the rows.

    Attributes:
      columns: The columns.
      rows: Cells, one a column in each row.
      caption: What the table shows.

    Raises:
      ValueError: There is no column, or a row has another number of cells.
    """

    columns: Sequence[Column]
    rows: Sequence[Sequence[Cell]]
    caption: str = ""

    def __post_init__(self) -> None:
        if not self.columns:
            raise ValueError("a table has no columns, expected at least one")
        wrong = [i for i, row in enumerate(self.rows) if len(row) != len(self.columns)]
        if wrong:
            raise ValueError(
                f"table {self.caption!r}: rows {wrong} have another number of cells "
                f"than the {len(self.columns)} columns; give None for a missing one"
            )

    def highlighted(self) -> set[tuple[int, int]]:
        """(row, column) of the cells that are the best of their columns."""
        return {
            (row, index)
            for index, column in enumerate(self.columns)
            if column.best is not None
            for row in _best_rows([row[index] for row in self.rows], column.best)
        }

    def compares_intervals(self) -> bool:
        """Whether some highlighted column holds intervals, which a note explains."""
        cells = (
            row[i]
            for i, column in enumerate(self.columns)
            if column.best is not None
            for row in self.rows
        )
        return any(
            isinstance(cell, Estimate) and cell.half_width is not None for cell in cells
        )


INTERVAL_NOTE = "Bold: the best, and those whose interval meets its interval."


def _best_rows(cells: Sequence[Cell], best: Literal["max", "min"]) -> list[int]:
    """Rows of the best cell, of its ties, and of estimates it cannot be told from."""
    intervals = {}
    for row, cell in enumerate(cells):
        mean, half = cell if isinstance(cell, Estimate) else (cell, None)
        if isinstance(mean, str | bool | np.bool_ | None):
            continue
        if not math.isnan(mean):
            intervals[row] = (float(mean), half or 0.0)
    if len(intervals) < 2:
        return []
    choose = max if best == "max" else min
    mean, half = choose(intervals.values(), key=lambda interval: interval[0])
    return [
        row
        for row, (other, width) in intervals.items()
        if abs(other - mean) <= half + width
    ]
