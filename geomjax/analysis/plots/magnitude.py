"""Where updates land: their size against the size of the weights they change."""

from collections.abc import Mapping

from matplotlib.figure import Figure

from geomjax.analysis.plots.bands import BandKind
from geomjax.analysis.plots.inputs import Curve
from geomjax.analysis.plots.lines import Panel, Reference, line_figure
from geomjax.analysis.plots.style import SeriesStyle

NULL_LABEL = "rounding null"


def update_against_magnitude(
    size: Mapping[str, Curve],
    changed: Mapping[str, Curve] | None = None,
    *,
    size_null: Curve | None = None,
    changed_null: Curve | None = None,
    band: BandKind = "range",
    title: str | None = None,
    styles: Mapping[str, SeriesStyle] | None = None,
) -> Figure:
    """Draws the update against the quantile of |W|: the near-zero bias.

    A reader should see whether training changes small weights more than large ones, and
    how much of that the storage format does by itself: the null update is random and
    rounded in the same way.

    Args:
      size: By run, x = quantiles of |W| in [0, 1] (bin centres), shape [Q], and mean
        |D| in the bin over rms(D), shape [S, Q].
      changed: By run, the share of entries of the bin that changed, same shapes.
      size_null: `size` of the null update.
      changed_null: `changed` of the null update.
      band: `range` or `ci95` over the rows.
      title: A heading, if any.
      styles: Looks by run, from `assign_styles`; fresh ones if None.

    Returns:
      A figure with one axes, or two where `changed` is given.

    Raises:
      ValueError: No curve, mismatched shapes, x that does not increase, or a null
        without its curves.
    """
    if changed is None and changed_null is not None:
        raise ValueError("changed_null is given without changed; pass both or neither")
    references = [] if size_null is None else [Reference(NULL_LABEL, size_null)]
    panels = [Panel("mean |D| / rms(D)", size, references)]
    if changed is not None:
        references = (
            [] if changed_null is None else [Reference(NULL_LABEL, changed_null)]
        )
        panels.append(
            Panel("share of entries changed", changed, references, y_percent=True)
        )
    return line_figure(
        panels,
        x_label="quantile of |W|",
        columns=len(panels),
        band=band,
        mark_points=False,
        x_percent=True,
        title=title,
        styles=styles,
    )
