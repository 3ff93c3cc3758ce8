"""Many texts in a page, to be searched and filtered: the one block with a script."""

import base64
import dataclasses
import functools
import hashlib
import html
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import NamedTuple


class Entry(NamedTuple):
    """A text of a browser, such as one generation.

    Attributes:
      title: What is seen of it before it is opened.
      labels: What it can be picked by.
      parts: Its texts by their headings; shown as they are.
    """

    title: str
    labels: tuple[str, ...]
    parts: Mapping[str, str]


@dataclasses.dataclass(frozen=True)
class Browser:
    """Entries to look through; Markdown, which has no script, has only their number.

    Attributes:
      entries: The entries, in order.
      caption: What they are and where all of them lie.
    """

    entries: Sequence[Entry]
    caption: str


@functools.cache
def script() -> str:
    """The script of the page."""
    return resources.files(__package__).joinpath("browser.js").read_text("utf-8")


@functools.cache
def script_policy() -> str:
    """What the page's policy allows to run: this very script, by its digest.

    A script that came with an entry's text has another digest and does not run, even
    if it got past the escaping.
    """
    digest = base64.b64encode(hashlib.sha256(script().encode()).digest()).decode()
    return f"'sha256-{digest}'"


def render_browser(browser: Browser) -> str:
    """The browser's part of the page."""
    names = sorted({label for entry in browser.entries for label in entry.labels})
    codes = {label: f"l{i}" for i, label in enumerate(names)}
    options = "".join(
        f'<option value="{codes[name]}">{_shown(name)}</option>' for name in names
    )
    entries = "".join(_entry(entry, codes) for entry in browser.entries)
    return (
        f'<div class="browser">\n<p class="note">{_shown(browser.caption)}</p>\n'
        '<p><input type="search" aria-label="text to find" placeholder="text to find"> '
        f'<select aria-label="label"><option value="">all</option>{options}</select> '
        f"<output></output></p>\n{entries}</div>\n"
    )


def _entry(entry: Entry, codes: Mapping[str, str]) -> str:
    labels = " ".join(codes[label] for label in entry.labels)
    parts = "".join(
        f"<h4>{_shown(heading)}</h4>\n<pre>{_shown(text)}</pre>\n"
        for heading, text in entry.parts.items()
    )
    return (
        f'<details data-labels="{labels}">\n'
        f"<summary>{_shown(entry.title)}</summary>\n{parts}</details>\n"
    )


def _shown(text: str) -> str:
    """Escaped text; what no page may hold, or would reorder it, as its code point."""
    return "".join(
        f"\\u{ord(c):04x}" if _unfit(ord(c)) else c for c in html.escape(text)
    )


def _unfit(code: int) -> bool:
    control = code < 32 and code not in (9, 10) or 127 <= code < 160
    directional = 0x202A <= code <= 0x202E or 0x2066 <= code <= 0x2069
    directional |= code in (0x061C, 0x200E, 0x200F)
    return control or directional or 0xD800 <= code <= 0xDFFF or code == 0xFFFE
