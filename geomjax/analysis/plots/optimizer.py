"""AdamW's state along training: direction of the momentum, spread of the rescaling."""

from collections.abc import Mapping

from matplotlib.figure import Figure

from geomjax.analysis.plots.bands import BandKind
from geomjax.analysis.plots.inputs import Curve
from geomjax.analysis.plots.lines import Panel, Reference, line_figure
from geomjax.analysis.plots.style import SeriesStyle


def optimizer_state_curves(
    cosine: Mapping[str, Curve],
    variation: Mapping[str, Curve],
    *,
    x_label: str = "optimizer step",
    band: BandKind = "range",
    title: str | None = None,
    styles: Mapping[str, SeriesStyle] | None = None,
) -> Figure:
    """Draws cos(m_t, g_t) and std(sqrt v_t) / mean(sqrt v_t), as P1 Fig. 6 does.

    A reader should see, above, whether the momentum still points along the newest
    gradient (1) or is unrelated to it (0); below, how unevenly AdamW rescales the
    coordinates (0 would be SGD with one learning rate).

    Args:
      cosine: By arm, x = steps [T] and cosines [S, T] over S seeds, in [-1, 1].
      variation: By arm, x = steps [T] and coefficients of variation [S, T].
      x_label: What x counts.
      band: `range` or `ci95` over seeds.
      title: A heading, if any.
      styles: Looks by arm, from `assign_styles`; fresh ones if None.

    Returns:
      A figure with two axes, one above the other.

    Raises:
      ValueError: No curve, mismatched shapes, or x that does not increase.
    """
    return line_figure(
        [
            Panel("cos(m, g)", cosine, [Reference("unrelated", 0.0)]),
            Panel("std(√v) / mean(√v)", variation),
        ],
        x_label=x_label,
        panel_height_in=2.3,
        band=band,
        mark_points=False,
        title=title,
        styles=styles,
    )
