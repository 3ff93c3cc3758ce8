"""How much of an update falls inside a mask, against the mask's density."""

from collections.abc import Mapping

import numpy as np
from matplotlib.figure import Figure

from geomjax.analysis.plots.bands import BandKind
from geomjax.analysis.plots.inputs import Curve, check_curves, require_some
from geomjax.analysis.plots.lines import Panel, Reference, line_figure
from geomjax.analysis.plots.style import SeriesStyle

CHANCE_LABEL = "chance"


def coverage_against_density(
    masks: Mapping[str, Mapping[str, Curve]],
    *,
    chance: Mapping[str, Curve] | None = None,
    band: BandKind = "range",
    title: str | None = None,
    styles: Mapping[str, SeriesStyle] | None = None,
) -> Figure:
    """Draws |A and M| / |A| against the density of M, a panel a family of masks.

    A reader should see on which side of the dashed line each run lies: above it the
    update prefers the mask (small weights), below it avoids it (principal weights).

    Args:
      masks: By mask family (such as `principal` and `low magnitude`), then by run: x =
        densities in [0, 1], shape [P], and coverage in [0, 1], shape [S, P].
      chance: By mask family, its chance level where that is not the density itself.
      band: `range` or `ci95` over repeats.
      title: A heading, if any.
      styles: Looks by run, from `assign_styles`; fresh ones if None.

    Returns:
      A figure with an axes a mask family, side by side.

    Raises:
      ValueError: Nothing to draw, mismatched shapes, or a coverage or density outside
        [0, 1].
    """
    require_some("masks", masks)
    panels = []
    for mask, curves in masks.items():
        checked = check_curves(f"coverage of {mask!r}", curves)
        for run, curve in checked.items():
            _require_fractions(f"{run!r}, mask {mask!r}", curve)
        if chance is not None and mask in chance:
            level = chance[mask]
        else:
            density = np.unique(np.concatenate([c.x for c in checked.values()]))
            level = Curve(density, density[None])
        panels.append(
            Panel(
                "share of the update inside",
                checked,
                [Reference(CHANCE_LABEL, level)],
                y_percent=True,
                title=f"{mask} mask",
            )
        )
    return line_figure(
        panels,
        x_label="density of the mask",
        columns=min(len(panels), 2),
        band=band,
        x_percent=True,
        title=title,
        styles=styles,
    )


def _require_fractions(name: str, curve: Curve) -> None:
    for what, values in (("densities", curve.x), ("coverage", curve.values)):
        if np.nanmin(values) < 0.0 or np.nanmax(values) > 1.0:
            raise ValueError(
                f"{what} of {name} span [{np.nanmin(values)}, {np.nanmax(values)}], "
                "expected fractions in [0, 1]; divide percentages by 100"
            )
