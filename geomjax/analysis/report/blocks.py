"""What a report is made of, before it is rendered."""

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any, NamedTuple

from matplotlib.figure import Figure

from geomjax.analysis.report.browser import Browser
from geomjax.analysis.report.table import Table

_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")


class Claim(NamedTuple):
    """A statement that was tested, and what came out.

    Attributes:
      claim: The statement, with its threshold.
      holds: Whether it holds as measured; None if the data cannot decide.
      evidence: The numbers behind the verdict.
    """

    claim: str
    holds: bool | None
    evidence: str


@dataclasses.dataclass(frozen=True)
class Claims:
    """A list of claims with their verdicts."""

    claims: Sequence[Claim]


@dataclasses.dataclass(frozen=True)
class Code:
    """Text shown as it is, such as a command line."""

    text: str


@dataclasses.dataclass(frozen=True)
class Links:
    """Files beside the report, such as the reports of its parts.

    Attributes:
      paths: Paths relative to the report's folder, by what a reader sees.

    Raises:
      ValueError: A path is absolute, or leaves the report's folder.
    """

    paths: Mapping[str, str]

    def __post_init__(self) -> None:
        bad = [
            path
            for path in self.paths.values()
            if PurePosixPath(path).is_absolute() or ".." in PurePosixPath(path).parts
        ]
        if bad:
            raise ValueError(
                f"links to {bad}: expected paths below the folder of the report"
            )


@dataclasses.dataclass(frozen=True)
class Facts:
    """Named values, such as a resolved config or the versions in use.

    Attributes:
      title: What they are.
      items: The values; nested mappings are flattened to dotted names.
      collapsed: Whether the page shows them only on request.
    """

    title: str
    items: Mapping[str, Any]
    collapsed: bool = False

    def flat(self) -> list[tuple[str, str]]:
        """Dotted names with their values as text: strings as such, others as JSON."""
        return list(_flatten("", self.items))


def _flatten(prefix: str, items: Mapping[str, Any]):
    for key, value in items.items():
        if isinstance(value, Mapping) and value:
            yield from _flatten(f"{prefix}{key}.", value)
        elif isinstance(value, str):
            yield f"{prefix}{key}", value
        else:
            yield f"{prefix}{key}", json.dumps(value, default=str)


@dataclasses.dataclass(frozen=True)
class Plot:
    """A figure with its caption.

    Attributes:
      name: Stem of its files, letters, digits, `_` and `-` only.
      figure: The figure.
      caption: What it shows and how to read it; also its text for screen readers.

    Raises:
      ValueError: The name is not fit for a file.
    """

    name: str
    figure: Figure
    caption: str

    def __post_init__(self) -> None:
        if not _FILE_NAME.fullmatch(self.name):
            raise ValueError(
                f"plot name {self.name!r} becomes a file name, expected letters, "
                "digits, '_' and '-' only, the first a letter or a digit"
            )


Block = str | Table | Claims | Code | Facts | Links | Plot | Browser
"""A part of a section; a string is a paragraph."""


@dataclasses.dataclass
class Section:
    """A heading and the blocks under it."""

    title: str
    blocks: list[Block]

    def add(self, *blocks: Block) -> None:
        """Appends blocks."""
        self.blocks.extend(blocks)


@dataclasses.dataclass
class Report:
    """A report that grows section by section; `write_report` renders it.

    Attributes:
      title: Its title.
      summary: The finding in a paragraph, read before everything else.
      sections: Its sections, in order.
    """

    title: str
    summary: str
    sections: list[Section] = dataclasses.field(default_factory=list)

    def section(self, title: str, *blocks: Block) -> Section:
        """Appends a section and returns it, so that more blocks can be added."""
        self.sections.append(Section(title, list(blocks)))
        return self.sections[-1]

    def plots(self) -> list[Plot]:
        """All plots, in order.

        Raises:
          ValueError: Two plots share a name, and would overwrite each other's file.
        """
        plots = [b for s in self.sections for b in s.blocks if isinstance(b, Plot)]
        names = [plot.name.lower() for plot in plots]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"plot names must be distinct, got {twice} more than once")
        return plots
