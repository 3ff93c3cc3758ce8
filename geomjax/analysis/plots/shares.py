"""How the energy of an update is divided between the parts of a model."""

import math
from collections.abc import Mapping
from typing import SupportsFloat

from matplotlib.artist import Artist
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from geomjax.analysis.plots import style
from geomjax.analysis.plots.inputs import require_some

GROUP_COLORS = {
    "attention": style.CATEGORIES[0],
    "ffn": style.CATEGORIES[4],
    "embedding": style.CATEGORIES[2],
    "lm_head": style.CATEGORIES[3],
    "norm": style.CATEGORIES[5],
    "vision": style.CATEGORIES[1],
    "other": style.CATEGORIES[6],
}
"""Fixed colours, in the order of the stacks."""

_LEAST_LABELLED = 0.07  # a narrower segment has no room for its number


@style.styled
def group_energy_shares(
    shares: Mapping[str, Mapping[str, SupportsFloat]],
    *,
    label: str = "share of ‖D‖²",
    title: str | None = None,
) -> Figure:
    """Draws one stacked bar a run: the part of sum ||D||_F^2 that falls in each group.

    A reader should see which part of the model moved, and whether the runs agree.

    Args:
      shares: By run, then by group (a key of `GROUP_COLORS`): fractions that sum to 1
        within 1e-3. Groups that a model lacks are left out.
      label: What the lengths measure.
      title: A heading, if any.

    Returns:
      A figure with one axes; the first run is at the top.

    Raises:
      ValueError: No run, an unknown group, a negative share, or a sum other than 1.
    """
    require_some("shares", shares)
    numbers = {
        run: {group: float(share) for group, share in by_group.items()}
        for run, by_group in shares.items()
    }
    for run, by_group in numbers.items():
        _check(run, by_group)
    groups = [g for g in GROUP_COLORS if any(g in s for s in numbers.values())]
    handles: dict[str, Artist] = {g: Patch(color=GROUP_COLORS[g]) for g in groups}
    fig = style.new_figure(1.15 + 0.36 * len(shares) + (0.3 if title else 0.0))
    style.legend_above(fig, handles, title)
    ax = fig.subplots()
    for row, by_group in enumerate(numbers.values()):
        left = 0.0
        for group in groups:
            share = by_group.get(group, 0.0)
            ax.barh(
                row,
                share,
                0.72,
                left=left,
                color=GROUP_COLORS[group],
                edgecolor=style.PAPER,
                linewidth=0.8,
            )
            if share >= _LEAST_LABELLED:
                ax.text(
                    left + share / 2,
                    row,
                    style.format_value(share, percent=True, padded=True),
                    ha="center",
                    va="center_baseline",
                    # Paper on blue, in either theme; the other colours carry black.
                    color=style.PAPER if group == "attention" else "#000000",
                )
            left += share
    ax.set_xlim(0.0, 1.0)
    ax.set_ylim(len(shares) - 0.5, -0.5)
    ax.set_yticks(range(len(shares)), [style.shorten(run) for run in shares])
    ax.tick_params(axis="y", length=0)
    ax.grid(visible=False)
    ax.spines["left"].set_visible(False)
    ax.set_xlabel(label)
    style.percent_axis(ax.xaxis)
    style.settle(fig)
    return fig


def _check(run: str, by_group: dict[str, float]) -> None:
    unknown = sorted(set(by_group) - set(GROUP_COLORS))
    if unknown:
        raise ValueError(
            f"run {run!r} has groups {unknown}, expected some of {list(GROUP_COLORS)}"
        )
    total = math.fsum(by_group.values())
    least = min(by_group.values(), default=0.0)
    if not abs(total - 1.0) <= 1e-3 or least < 0.0:
        raise ValueError(
            f"run {run!r} has shares {by_group} with sum {total}, expected "
            "non-negative fractions that sum to 1; divide by the total energy"
        )
