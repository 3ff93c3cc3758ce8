"""Renders a report as one HTML page that asks for nothing outside itself."""

import functools
import html
from collections.abc import Mapping
from importlib import resources
from urllib.parse import quote

from geomjax.analysis.report.blocks import (
    Block,
    Claims,
    Code,
    Facts,
    Links,
    Plot,
    Report,
)
from geomjax.analysis.report.browser import (
    Browser,
    render_browser,
    script,
    script_policy,
)
from geomjax.analysis.report.table import INTERVAL_NOTE, Column, Table
from geomjax.analysis.report.vector import inline_svg

# No script, no font, no image but those within: also if a name got past the escaping.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"

VERDICTS: Mapping[bool | None, tuple[str, str]] = {
    True: ("holds", "✓ holds"),
    False: ("fails", "✗ does not hold"),
    None: ("open", "? undecided"),
}
"""Style class and wording by outcome of a claim."""


def render_page(report: Report, drawings: Mapping[str, str]) -> str:
    """Renders the page.

    Args:
      report: The report.
      drawings: The SVG document of each plot, by name.

    Returns:
      An HTML document with its style and figures inside, and no script but that of
      a `Browser`, if there is one.
    """
    browses = any(isinstance(b, Browser) for s in report.sections for b in s.blocks)
    policy = f"{_POLICY}; script-src {script_policy()}" if browses else _POLICY
    ending = f"<script>{script()}</script>\n" if browses else ""
    numbers = {plot.name: i for i, plot in enumerate(report.plots(), start=1)}
    contents = "".join(
        f'<li><a href="#section-{i}">{html.escape(section.title)}</a></li>\n'
        for i, section in enumerate(report.sections, start=1)
    )
    sections = []
    for i, section in enumerate(report.sections, start=1):
        blocks = "".join(_block(b, drawings, numbers) for b in section.blocks)
        sections.append(
            f'<section id="section-{i}">\n<h2>{html.escape(section.title)}</h2>\n'
            f"{blocks}</section>\n"
        )
    title = html.escape(report.title)
    style_sheet = resources.files(__package__).joinpath("page.css").read_text("utf-8")
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>\n{style_sheet}</style>\n</head>\n<body>\n"
        f"<header>\n<h1>{title}</h1>\n"
        f'<p class="summary">{html.escape(report.summary)}</p>\n</header>\n'
        f"<nav>\n<h2>Contents</h2>\n<ol>\n{contents}</ol>\n</nav>\n"
        f"<main>\n{''.join(sections)}</main>\n<footer></footer>\n{ending}</body>\n</html>\n"
    )


def _block(
    block: Block, drawings: Mapping[str, str], numbers: Mapping[str, int]
) -> str:
    if isinstance(block, Plot):
        return _plot(block, drawings[block.name], numbers[block.name])
    return _plain_block(block)


@functools.singledispatch
def _plain_block(block: Block) -> str:
    raise TypeError(f"a report has no block of type {type(block).__name__}")


@_plain_block.register
def _paragraph(text: str) -> str:
    return f"<p>{html.escape(text)}</p>\n"


@_plain_block.register
def _code(code: Code) -> str:
    return f"<pre><code>{html.escape(code.text)}</code></pre>\n"


@_plain_block.register
def _claims(block: Claims) -> str:
    items = []
    for claim in block.claims:
        kind, verdict = VERDICTS[claim.holds]
        items.append(
            f'<li class="{kind}">\n<p><span class="verdict">{verdict}</span> '
            f"{html.escape(claim.claim)}</p>\n"
            f'<p class="evidence">{html.escape(claim.evidence)}</p>\n</li>\n'
        )
    return f'<ul class="claims">\n{"".join(items)}</ul>\n'


@_plain_block.register
def _links(links: Links) -> str:
    items = "".join(
        f'<li><a href="{_address(path)}">{html.escape(text)}</a></li>\n'
        for text, path in links.paths.items()
    )
    return f"<ul>\n{items}</ul>\n"


@_plain_block.register
def _browser(browser: Browser) -> str:
    return render_browser(browser)


def _address(path: str) -> str:
    """A relative address: `./` keeps a name with a colon from being a scheme."""
    return html.escape(f"./{quote(path)}")


@_plain_block.register
def _facts(facts: Facts) -> str:
    rows = "".join(
        f'<tr><th scope="row">{html.escape(key)}</th>'
        f"<td>{html.escape(value)}</td></tr>\n"
        for key, value in facts.flat()
    )
    table = (
        '<div class="scroll"><table class="facts"><tbody>\n'
        f"{rows}</tbody></table></div>"
    )
    title = html.escape(facts.title)
    if facts.collapsed:
        return f"<details>\n<summary>{title}</summary>\n{table}\n</details>\n"
    return f"<h3>{title}</h3>\n{table}\n"


@_plain_block.register
def _table(table: Table) -> str:
    best = table.highlighted()
    heads = "".join(
        f'<th scope="col"{_look(column)}>{html.escape(column.title)}</th>'
        for column in table.columns
    )
    rows = []
    for r, row in enumerate(table.rows):
        cells = []
        for c, (cell, column) in enumerate(zip(row, table.columns, strict=True)):
            tag, scope = ("th", ' scope="row"') if c == 0 else ("td", "")
            look = _look(column, (r, c) in best)
            text = html.escape(column.format(cell))
            cells.append(f"<{tag}{scope}{look}>{text}</{tag}>")
        rows.append(f"<tr>{''.join(cells)}</tr>\n")
    caption = (
        f"<caption>{html.escape(table.caption)}</caption>" if table.caption else ""
    )
    note = (
        f'<p class="note">{INTERVAL_NOTE}</p>\n' if table.compares_intervals() else ""
    )
    return (
        f'<div class="scroll"><table>{caption}\n<thead><tr>{heads}</tr></thead>\n'
        f"<tbody>\n{''.join(rows)}</tbody></table></div>\n{note}"
    )


def _look(column: Column, best: bool = False) -> str:
    names = ["r"] * (column.align == "right") + ["best"] * best
    return f' class="{" ".join(names)}"' if names else ""


def _plot(plot: Plot, drawing: str, number: int) -> str:
    svg = inline_svg(drawing, f"plot{number}", plot.caption)
    return (
        f'<figure id="plot-{number}">\n<div class="plot">{svg}</div>\n<figcaption>'
        f"<b>Figure {number}.</b> {html.escape(plot.caption)}</figcaption>\n</figure>\n"
    )
