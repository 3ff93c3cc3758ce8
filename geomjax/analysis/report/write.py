"""Writes a report and its figures to a folder, each file all at once."""

import contextlib
import os
from pathlib import Path
from typing import NamedTuple

from geomjax.analysis.plots.saving import figure_png, figure_svg
from geomjax.analysis.report.blocks import Report
from geomjax.analysis.report.markdown import render_markdown
from geomjax.analysis.report.page import render_page


class ReportFiles(NamedTuple):
    """Where a report was written."""

    page: Path
    markdown: Path
    figures: tuple[Path, ...]


def write_report(report: Report, folder: str | os.PathLike[str]) -> ReportFiles:
    """Writes `report.html`, `report.md` and `figures/NAME.png` and `.svg`.

    Everything is rendered before the first file is touched, and each file is replaced
    as a whole: whoever reads meanwhile, or after a failure, finds the old one or the
    new one. Equal reports give equal bytes.

    Args:
      report: What to write.
      folder: Where; made if it is missing.

    Returns:
      The paths of the files.

    Raises:
      ValueError: Two plots share a name.
      OSError: The folder cannot be written; no partial file is left.
    """
    folder = Path(folder)
    plots = report.plots()
    drawings = {plot.name: figure_svg(plot.figure) for plot in plots}
    files: dict[Path, bytes] = {}
    for plot in plots:
        stem = folder / "figures" / plot.name
        files[stem.with_suffix(".png")] = figure_png(plot.figure)
        files[stem.with_suffix(".svg")] = drawings[plot.name].encode()
    figures = tuple(files)
    markdown, page = folder / "report.md", folder / "report.html"
    files[markdown] = render_markdown(report).encode()
    files[page] = render_page(report, drawings).encode()
    folder.mkdir(parents=True, exist_ok=True)
    if plots:
        (folder / "figures").mkdir(exist_ok=True)
    for path, content in files.items():
        _replace(path, content)
    return ReportFiles(page, markdown, figures)


def _replace(path: Path, content: bytes) -> None:
    draft = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(draft, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            draft.unlink()
