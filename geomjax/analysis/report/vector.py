"""Puts matplotlib's SVG into a page, where it follows the page's colours."""

import html
import re

from geomjax.analysis.plots import style

# The page's stylesheet defines each variable for its light and its dark theme.
THEME_VARIABLES = {
    style.INK: "--ink",
    style.MUTED: "--muted",
    style.GRID: "--grid",
    style.PAPER: "--paper",
    style.BLUE: "--blue",
}


def inline_svg(document: str, prefix: str, label: str) -> str:
    """Turns an SVG document of `plots.figure_svg` into an element of an HTML page.

    Prolog, comments, metadata and namespaces are dropped, ids get a prefix so that
    figures do not meet, and the colours of `THEME_VARIABLES` follow the page's theme.

    Args:
      document: A standalone SVG document as matplotlib writes it.
      prefix: Distinct for each figure of the page.
      label: The figure's text for screen readers.

    Returns:
      An `<svg>` element that refers to nothing outside itself.
    """
    body = document[document.index("<svg") :]
    view_box = body.split('viewBox="', 1)[1].split('"', 1)[0]
    body = re.sub(r"<!--.*?-->", "", body, flags=re.DOTALL)
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    body = re.sub(r"<style[^>]*>.*?</style>", "", body, flags=re.DOTALL)
    rest = body.split(">", 1)[1]
    rest = re.sub(r'\bid="', f'id="{prefix}-', rest)
    rest = re.sub(r'\bxlink:href="#', f'href="#{prefix}-', rest)
    rest = re.sub(r'\bxlink:href="data:', 'href="data:', rest)
    rest = rest.replace("url(#", f"url(#{prefix}-")
    for color, variable in THEME_VARIABLES.items():
        rest = rest.replace(color, f"var({variable})")
    rest = re.sub(r"\n\s*", "\n", rest)
    return (
        f'<svg role="img" aria-label="{html.escape(label)}" '
        f'viewBox="{view_box}">{rest.strip()}'
    )
