"""Bar panels: several quantities side by side, a bar a run."""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import NullLocator

from geomjax.analysis.plots import style
from geomjax.analysis.plots.inputs import require_some

_THICKNESS = 0.8  # of the space between two runs, shared by their variants
_TINTS = (1.0, 0.45, 0.22)  # opacity by variant
_HATCHES = ("", "", "////")
_CHANCE_LINE = {"color": style.INK, "linestyle": "--", "linewidth": 1.4}


class BarPanel(NamedTuple):
    """One quantity, for every run and variant.

    Attributes:
      title: The quantity and its unit.
      values: By variant (`stored` and `master`, or two masks; a single one may be named
        ""), then by run. A run that is missing or not finite is marked n/a.
      chance: The chance level by variant, if there is one: a number for all runs, or a
        number a run.
      half_widths: Half widths of confidence intervals, keyed as `values`, if known.
      log: Whether the axis is logarithmic; a zero then has a label and no bar.
      percent: Whether values are fractions, to be labelled in percent.
    """

    title: str
    values: Mapping[str, Mapping[str, float]]
    chance: Mapping[str, float | Mapping[str, float]] | None = None
    half_widths: Mapping[str, Mapping[str, float]] | None = None
    log: bool = False
    percent: bool = False


@style.styled
def bar_panels(
    panels: Sequence[BarPanel],
    *,
    columns: int = 4,
    title: str | None = None,
    styles: Mapping[str, style.SeriesStyle] | None = None,
) -> Figure:
    """Draws quantities side by side with one row a run, in the manner of P1 Fig. 1.

    A reader should see at a glance which run moved the weights further, more sparsely,
    or along fewer directions. Every bar carries its value. Variants are told apart by
    tint; a dashed mark across a bar is its chance level.

    Args:
      panels: The quantities, filled row by row.
      columns: Panels in a row.
      title: A heading, if any.
      styles: Looks by run, from `assign_styles`; fresh ones if None.

    Returns:
      The figure, one axes a panel; the first run is at the top.

    Raises:
      ValueError: No panel, no variant or no run, more than three variants, a negative
        value on a logarithmic axis, or a chance level without its variant.
    """
    require_some("panels", panels)
    for panel in panels:
        _check(panel)
    runs = list(
        dict.fromkeys(run for p in panels for v in p.values.values() for run in v)
    )
    require_some("runs", runs)
    looks = style.resolve_styles(runs, styles)
    columns = min(columns, len(panels))
    rows = -(-len(panels) // columns)
    variants = max(len(panel.values) for panel in panels)
    keyed = variants > 1 or any(panel.chance for panel in panels)
    height = rows * (0.75 + len(runs) * (0.12 + 0.19 * variants))
    fig = style.new_figure(height + (0.3 if title else 0.0) + (0.3 if keyed else 0.0))
    grid = fig.subplots(rows, columns, squeeze=False)
    for ax in grid.flat[len(panels) :]:
        ax.set_axis_off()
    for index, (ax, panel) in enumerate(zip(grid.flat, panels, strict=False)):
        _draw(ax, panel, runs, looks, named=index % columns == 0)
    if keyed:
        style.legend_above(fig, _key(panels), title)
    else:
        style.set_title(fig, title)
    style.settle(fig)
    return fig


def _check(panel: BarPanel) -> None:
    require_some(f"values of panel {panel.title!r}", panel.values)
    if len(panel.values) > len(_TINTS):
        raise ValueError(
            f"panel {panel.title!r} has {len(panel.values)} variants, expected at most "
            f"{len(_TINTS)} that can be told apart; split it"
        )
    for extra in (panel.chance, panel.half_widths):
        unknown = set(extra or ()) - set(panel.values)
        if unknown:
            raise ValueError(
                f"panel {panel.title!r} has chance levels or half widths for "
                f"{sorted(unknown)}, expected variants among {list(panel.values)}"
            )
    if panel.log:
        for variant, by_run in panel.values.items():
            negative = [run for run, value in by_run.items() if value < 0]
            if negative:
                raise ValueError(
                    f"panel {panel.title!r}, {variant!r} is negative for {negative}, "
                    "expected none on a logarithmic axis; use log=False"
                )


def _draw(
    ax: Axes,
    panel: BarPanel,
    runs: Sequence[str],
    looks: Mapping[str, style.SeriesStyle],
    named: bool,
) -> None:
    thickness = _THICKNESS / len(panel.values)
    if panel.log:
        ax.set_xscale("log")
    left = _set_limits(ax, panel)
    for v, (variant, by_run) in enumerate(panel.values.items()):
        for i, run in enumerate(runs):
            y = i - _THICKNESS / 2 + (v + 0.5) * thickness
            value = by_run.get(run, math.nan)
            _bar(ax, panel, variant, run, value, y, thickness, looks[run], v, left)
    ax.set_ylim(len(runs) - 0.5, -0.5)
    ax.set_yticks(range(len(runs)), runs if named else [""] * len(runs))
    ax.tick_params(axis="y", length=0)
    ax.set_title(panel.title)
    ax.grid(visible=False)  # every bar carries its value


def _bar(
    ax: Axes,
    panel: BarPanel,
    variant: str,
    run: str,
    value: float,
    y: float,
    thickness: float,
    look: style.SeriesStyle,
    index: int,
    left: float,
) -> None:
    if math.isfinite(value) and not (panel.log and value == 0):
        ax.barh(
            y,
            value - left,
            0.92 * thickness,
            left=left,
            color=look.color,
            alpha=_TINTS[index],
            hatch=_HATCHES[index],
            edgecolor=look.color,
            linewidth=0.0,
        )
    reach = value if math.isfinite(value) else left
    half = (panel.half_widths or {}).get(variant, {}).get(run, math.nan)
    if math.isfinite(half) and math.isfinite(value):
        ax.errorbar(value, y, xerr=half, color=style.INK, linewidth=1.0, capsize=2)
        reach += half
    level = (panel.chance or {}).get(variant, math.nan)
    if not isinstance(level, (int, float)):
        level = level.get(run, math.nan)
    if math.isfinite(level):
        edges = (y - 0.5 * thickness, y + 0.5 * thickness)
        ax.plot([level, level], edges, **_CHANCE_LINE)
        reach = max(reach, level)
    known = math.isfinite(value)
    ax.annotate(
        style.format_value(value, panel.percent, padded=True) if known else "n/a",
        xy=(max(reach, left), y),
        xytext=(3, 0),
        textcoords="offset points",
        va="center",
        color=style.INK if known else style.MUTED,
    )


def _set_limits(ax: Axes, panel: BarPanel) -> float:
    """Sets x limits with room for the labels, and returns where the bars begin."""
    values = [v for by_run in panel.values.values() for v in by_run.values()]
    levels: list[float] = []
    for level in (panel.chance or {}).values():
        levels += [level] if isinstance(level, (int, float)) else level.values()
    for variant, by_run in (panel.half_widths or {}).items():
        levels += [panel.values[variant][r] + h for r, h in by_run.items()]
    shown = np.array([v for v in (*values, *levels) if math.isfinite(v)])
    if panel.log:
        shown = shown[shown > 0]
        if len(shown) == 0:
            shown = np.ones(1)
        low = 10.0 ** math.floor(math.log10(shown.min()) - 0.15)
        span = max(math.log10(shown.max() / low), 0.5)
        ax.set_xlim(low, low * 10.0 ** (1.6 * span))
        style.log_axis(ax.xaxis, low, low * 10.0 ** (1.6 * span), panel.percent)
        ax.xaxis.get_major_locator().set_params(numticks=3)
        ax.xaxis.set_minor_locator(NullLocator())
        return low
    high = max(shown.max(initial=0.0), 0.0)
    low = min(shown.min(initial=0.0), 0.0)
    span = (high - low) or 1.0
    ax.set_xlim(low - (0.35 * span if low < 0 else 0.0), high + 0.6 * span)
    if panel.percent:
        style.percent_axis(ax.xaxis)
    ax.locator_params(axis="x", nbins=2)
    return 0.0


def _key(panels: Sequence[BarPanel]) -> dict[str, Artist]:
    handles: dict[str, Artist] = {}
    for panel in panels:
        for index, variant in enumerate(panel.values):
            if len(panel.values) > 1 and variant not in handles:
                handles[variant] = Patch(
                    facecolor=style.MUTED,
                    edgecolor=style.MUTED,
                    alpha=_TINTS[index],
                    hatch=_HATCHES[index],
                    linewidth=0.0,
                )
        if panel.chance:
            handles["chance"] = Line2D([], [], **_CHANCE_LINE)
    return handles
