"""The papers' tables and figures as data: what they print, and what of ours goes by.

`items.json` lists every table and figure of both papers. Numbers are the papers' own,
in the unit of their column; those of P1's tables and of P2's Table 1 are taken from
`experiments.published`.
"""

import json
from pathlib import Path
from typing import NamedTuple

from experiments.published.tables import PublishedColumn, load_tables

FILE = Path(__file__).parent / "items.json"
KINDS = ("stored", "master")


class Ours(NamedTuple):
    """What of a study stands in an item.

    Attributes:
      study: Name of its entry in the plan.
      at: Where its results.json has it, keys joined by slashes, such as `arms/opd`.
      label: What the row is called.
    """

    study: str
    at: str
    label: str


class Item(NamedTuple):
    """A table or figure.

    Attributes:
      paper: `P1` or `P2`; `ours` for what neither has.
      name: Its number.
      title: What it shows.
      columns: Its quantities; none for an item in words.
      published: The paper's rows, by label.
      ours: Our rows.
      kinds: Of which updates our rows are: `stored`, `master`.
      figures: Our figures, as study/name.
      note: What differs, or where the paper contradicts itself.
      missing: Why it, or a part of it, is not reproduced; empty where all of it is.
    """

    paper: str
    name: str
    title: str
    columns: tuple[PublishedColumn, ...]
    published: dict[str, tuple[float | None, ...]]
    ours: tuple[Ours, ...]
    kinds: tuple[str, ...]
    figures: tuple[str, ...]
    note: str
    missing: str


def load_items() -> list[Item]:
    """All items, in the order of the papers.

    Raises:
      ValueError: An item is malformed; says which.
    """
    tables = load_tables()
    found = []
    for record in json.loads(FILE.read_text(encoding="utf-8")):
        label = f"{record['paper']} {record['name']}"
        columns, published, note = [], {}, record.get("note", "")
        if "table" in record:
            table = tables[record["table"]]
            columns, published = list(table.columns), dict(table.rows)
            note = " ".join(filter(None, (table.note, note)))
        for column in record.get("columns", []):
            value = tuple(column["value"])
            columns.append(
                PublishedColumn(
                    column["title"], value, column["percent"], column["decimals"]
                )
            )
        published |= {k: tuple(v) for k, v in record.get("published", {}).items()}
        width = len(columns)
        # Columns that are added to a published table are ours alone.
        rows = {k: (*v, *[None] * (width - len(v))) for k, v in published.items()}
        if any(len(row) != width for row in rows.values()):
            raise ValueError(f"{label}: a row has more numbers than columns")
        kinds = tuple(record.get("kinds", ("stored",)))
        if not set(kinds) <= set(KINDS):
            raise ValueError(f"{label}: kinds {kinds}; known: {', '.join(KINDS)}")
        found.append(
            Item(
                record["paper"],
                record["name"],
                record["title"],
                tuple(columns),
                rows,
                tuple(Ours(*ours) for ours in record.get("ours", [])),
                kinds,
                tuple(record.get("figures", [])),
                note,
                record.get("missing", ""),
            )
        )
    return found
