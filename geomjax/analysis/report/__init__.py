"""Self-contained reports: tables, claims and figures as one HTML page and Markdown."""

from geomjax.analysis.report.blocks import (
    Block,
    Claim,
    Claims,
    Code,
    Facts,
    Links,
    Plot,
    Report,
    Section,
)
from geomjax.analysis.report.browser import Browser, Entry
from geomjax.analysis.report.table import Cell, Column, Estimate, Table
from geomjax.analysis.report.write import ReportFiles, write_report

__all__ = [
    "Block",
    "Browser",
    "Cell",
    "Claim",
    "Claims",
    "Code",
    "Column",
    "Entry",
    "Estimate",
    "Facts",
    "Links",
    "Plot",
    "Report",
    "ReportFiles",
    "Section",
    "Table",
    "write_report",
]
