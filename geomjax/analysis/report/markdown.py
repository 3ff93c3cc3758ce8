"""Renders a report as Markdown, with its figures as linked PNG files."""

import functools
import re
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
from geomjax.analysis.report.browser import Browser
from geomjax.analysis.report.page import VERDICTS
from geomjax.analysis.report.table import INTERVAL_NOTE, Table


def escape_markdown(text: str) -> str:
    """Writes `text` so that Markdown shows it as it is, on one line."""
    line = " ".join(text.split())
    line = line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    line = re.sub(r"([\\`*_{}\[\]|~$#])", r"\\\1", line)
    return re.sub(r"^(\d+)([.)])(?=\s)|^([-+=])", r"\1\\\2\3", line)


def render_markdown(report: Report) -> str:
    """Renders the report; plot NAME is linked as `figures/NAME.png`."""
    numbers = {plot.name: i for i, plot in enumerate(report.plots(), start=1)}
    parts = [f"# {escape_markdown(report.title)}", escape_markdown(report.summary)]
    for section in report.sections:
        parts.append(f"## {escape_markdown(section.title)}")
        for block in section.blocks:
            if isinstance(block, Plot):
                caption = escape_markdown(block.caption)
                number = f"Figure {numbers[block.name]}"
                parts.append(f"![{number}](figures/{block.name}.png)")
                parts.append(f"**{number}.** {caption}")
            else:
                parts.append(render_block(block))
    return "\n\n".join(parts) + "\n"


@functools.singledispatch
def render_block(block: Block) -> str:
    """Renders one block that is no plot."""
    raise TypeError(f"a report has no block of type {type(block).__name__}")


@render_block.register
def _paragraph(text: str) -> str:
    return escape_markdown(text)


@render_block.register
def _code(code: Code) -> str:
    longest = max(map(len, re.findall(r"`+", code.text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}text\n{code.text}\n{fence}"


@render_block.register
def _claims(block: Claims) -> str:
    return "\n".join(
        f"- **{VERDICTS[claim.holds][1]}** {escape_markdown(claim.claim)}  \n"
        f"  {escape_markdown(claim.evidence)}"
        for claim in block.claims
    )


@render_block.register
def _links(links: Links) -> str:
    return "\n".join(
        f"- [{escape_markdown(text)}](./{quote(path)})"
        for text, path in links.paths.items()
    )


@render_block.register
def _browser(browser: Browser) -> str:
    count = len(browser.entries)
    return f"{escape_markdown(browser.caption)} ({count} in the HTML page.)"


@render_block.register
def _facts(facts: Facts) -> str:
    rows = [
        f"| {escape_markdown(key)} | {escape_markdown(value)} |"
        for key, value in facts.flat()
    ]
    head = f"| {escape_markdown(facts.title)} | |\n| --- | --- |"
    return "\n".join([head, *rows])


@render_block.register
def _table(table: Table) -> str:
    best = table.highlighted()
    lines = [
        _row([escape_markdown(column.title) for column in table.columns]),
        _row(["---:" if c.align == "right" else ":---" for c in table.columns]),
    ]
    for r, row in enumerate(table.rows):
        texts = [
            escape_markdown(column.format(cell))
            for cell, column in zip(row, table.columns, strict=True)
        ]
        lines.append(
            _row([f"**{t}**" if (r, c) in best else t for c, t in enumerate(texts)])
        )
    text = "\n".join(lines)
    if table.caption:
        text = f"{escape_markdown(table.caption)}\n\n{text}"
    return f"{text}\n\n{INTERVAL_NOTE}" if table.compares_intervals() else text


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"
