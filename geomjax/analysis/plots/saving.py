"""Figures as PNG and SVG bytes that depend on the figure alone."""

import io

from matplotlib.figure import Figure

from geomjax.analysis.plots.style import style_context

_NO_METADATA = {"Creator": None, "Date": None, "Format": None, "Type": None}


def figure_png(fig: Figure) -> bytes:
    """Renders a figure as PNG, 160 dots per inch, without dates or version names."""
    buffer = io.BytesIO()
    with style_context():
        fig.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def figure_svg(fig: Figure) -> str:
    """Renders a figure as a standalone SVG document, without dates or version names."""
    buffer = io.BytesIO()
    with style_context():
        fig.savefig(buffer, format="svg", metadata=_NO_METADATA)
    return buffer.getvalue().decode()
