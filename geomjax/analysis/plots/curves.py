"""Learning curves: a metric against training steps, an arm a line."""

from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure

from geomjax.analysis.plots.bands import BandKind
from geomjax.analysis.plots.inputs import Curve
from geomjax.analysis.plots.lines import Panel, Reference, line_figure
from geomjax.analysis.plots.style import SeriesStyle


def learning_curves(
    curves: Mapping[str, Curve],
    *,
    y_label: str,
    x_label: str = "training step",
    references: Sequence[Reference] = (),
    band: BandKind = "range",
    mark_points: bool = True,
    y_percent: bool = False,
    y_log: bool = False,
    title: str | None = None,
    styles: Mapping[str, SeriesStyle] | None = None,
) -> Figure:
    """Draws a metric along training for several arms, as P1 Fig. 3 does.

    A reader should see which arm learns faster and ends higher, and whether the bands
    over seeds separate them. Each marker is one evaluation.

    Args:
      curves: By arm, x = steps [T] and values [S, T] over S seeds.
      y_label: The metric and its unit.
      x_label: What x counts.
      references: Dashed levels, such as the start and the teacher.
      band: `range` or `ci95` over seeds; `describe_band` words it for the caption.
      mark_points: Whether to mark each evaluation; turn off for dense training metrics.
      y_percent: Whether values are fractions, to be labelled in percent.
      y_log: Whether y is logarithmic; zeros are gaps then.
      title: A heading, if any.
      styles: Looks by arm, from `assign_styles`; fresh ones if None.

    Returns:
      A figure with one axes.

    Raises:
      ValueError: No curve, mismatched shapes, x that does not increase, or values that
        cannot be drawn.
    """
    panel = Panel(y_label, curves, references, y_log, y_percent)
    return line_figure(
        [panel],
        x_label=x_label,
        panel_height_in=3.6,
        band=band,
        mark_points=mark_points,
        title=title,
        styles=styles,
    )
