"""Figures of updates and of the runs behind them: plain data in, matplotlib out."""

from geomjax.analysis.plots.bands import (
    Band,
    BandKind,
    band_over_repeats,
    describe_band,
    student_half_width,
)
from geomjax.analysis.plots.bars import BarPanel, bar_panels
from geomjax.analysis.plots.curves import learning_curves
from geomjax.analysis.plots.inputs import Curve
from geomjax.analysis.plots.lines import Panel, Reference, line_figure
from geomjax.analysis.plots.maps import layer_module_map
from geomjax.analysis.plots.saving import figure_png, figure_svg
from geomjax.analysis.plots.style import SeriesStyle, assign_styles

__all__ = [
    "Band",
    "BandKind",
    "BarPanel",
    "Curve",
    "Panel",
    "Reference",
    "SeriesStyle",
    "assign_styles",
    "band_over_repeats",
    "bar_panels",
    "describe_band",
    "figure_png",
    "figure_svg",
    "layer_module_map",
    "learning_curves",
    "line_figure",
    "student_half_width",
]
