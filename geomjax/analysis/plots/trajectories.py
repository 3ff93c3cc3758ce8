"""The update's shape along a run: rank, norm, tail and direction."""

from collections.abc import Collection, Mapping, Sequence

from matplotlib.figure import Figure

from geomjax.analysis.plots.bands import BandKind
from geomjax.analysis.plots.inputs import Curve, require_some
from geomjax.analysis.plots.lines import Panel, Reference, line_figure
from geomjax.analysis.plots.style import SeriesStyle


def trajectory_curves(
    quantities: Mapping[str, Mapping[str, Curve]],
    *,
    references: Mapping[str, Sequence[Reference]] | None = None,
    log: Collection[str] = (),
    x_label: str = "share of the run",
    x_percent: bool = True,
    band: BandKind = "range",
    title: str | None = None,
    styles: Mapping[str, SeriesStyle] | None = None,
) -> Figure:
    """Draws quantities of D_t = W_t - W_0 along a run, as P2 Fig. 4 and 5 do.

    A reader should see when the update finds its directions (similarity to the end),
    and whether it grows by scaling them (flat stable rank) or by adding new ones.

    Args:
      quantities: By quantity (stable rank, norm, Hill exponent, similarity; the name
        labels the axis, with its unit), then by run: x = progress [T] and values
        [S, T], a row a seed or matrix.
      references: By quantity, levels to compare with, such as chance.
      log: Quantities whose axis is logarithmic.
      x_label: What x measures.
      x_percent: Whether x is a fraction, to be labelled in percent.
      band: `range` or `ci95` over the rows.
      title: A heading, if any.
      styles: Looks by run, from `assign_styles`; fresh ones if None.

    Returns:
      A figure with an axes a quantity, two in a row.

    Raises:
      ValueError: Nothing to draw, mismatched shapes, or references or log axes for a
        quantity that is not there.
    """
    require_some("quantities", quantities)
    levels = references or {}
    unknown = sorted((set(levels) | set(log)) - set(quantities))
    if unknown:
        raise ValueError(
            f"references or log name {unknown}, expected some of {list(quantities)}"
        )
    panels = [
        Panel(quantity, curves, levels.get(quantity, ()), y_log=quantity in log)
        for quantity, curves in quantities.items()
    ]
    return line_figure(
        panels,
        x_label=x_label,
        columns=min(len(panels), 2),
        panel_height_in=2.5,
        band=band,
        x_percent=x_percent,
        title=title,
        styles=styles,
    )
