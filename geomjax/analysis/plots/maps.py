"""Layer-by-module heat maps."""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple, SupportsFloat

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from geomjax.analysis.plots import style
from geomjax.analysis.plots.inputs import as_number, require_some

MODULE_ORDER = (
    "q_proj",
    "k_proj",
    "v_proj",
    "o_proj",
    "gate_proj",
    "up_proj",
    "down_proj",
    "embed_tokens",
    "norm",
    "lm_head",
)
"""Columns that come first, in this order; others follow by name."""

_MAP_WIDTH_IN = 6.6  # what the layout leaves to the cells, and
_CHARACTER_IN = 0.085  # the width of a digit: do the numbers fit?
_ROWS_LABELLED = 40
_STRIPS = 128  # of the colour bar
_OUTSIDE_GAP = 0.25  # between the blocks' columns and the tall cells


def order_modules(modules: Sequence[str]) -> list[str]:
    """Sorts module names as a forward pass meets them: `MODULE_ORDER`, then by name."""
    rank = {name: i for i, name in enumerate(MODULE_ORDER)}
    return sorted(set(modules), key=lambda name: (rank.get(name, len(rank)), name))


class _Scale(NamedTuple):
    """A colour scale from `low` to `high`, both finite and distinct."""

    low: float
    high: float
    log: bool

    def color(self, value: float) -> tuple[float, float, float]:
        """The colour of a value; past an end, that of the end."""
        value = min(max(value, self.low), self.high)
        if self.log:
            place = math.log(value / self.low) / math.log(self.high / self.low)
        else:
            place = (value - self.low) / (self.high - self.low)
        return colormaps[style.SEQUENTIAL_MAP](place)[:3]

    def value(self, place: float) -> float:
        """The value at `place`, from 0 (low) to 1 (high)."""
        if self.log:
            return self.low * (self.high / self.low) ** place
        return self.low + (self.high - self.low) * place


@style.styled
def layer_module_map(
    values: Mapping[tuple[int | None, str], SupportsFloat | None],
    *,
    label: str,
    percent: bool = False,
    log: bool = False,
    limits: tuple[float, float] | None = None,
    title: str | None = None,
) -> Figure:
    """Draws one value a layer and module, layers downwards, as P1 Fig. 2 does.

    A reader should see bands across (early against late layers) and columns that stand
    out (modules that move more than the rest). A tensor outside the blocks, such as the
    embedding, is one tall cell beside them. Cells without a value are hatched.

    Args:
      values: By (layer, module), with layer None for tensors outside the blocks; NaN
        and None count as missing.
      label: The quantity and its unit, for the colour bar.
      percent: Whether values are fractions, to be labelled in percent.
      log: Whether colours follow the logarithm; zeros then count as the least value.
      limits: Values at the two ends of the colour scale, to compare several maps; the
        extremes of the data if None.
      title: A heading, if any.

    Returns:
      The figure: the map, and its colour bar as the second axes.

    Raises:
      ValueError: Nothing finite to draw, a negative value on a logarithmic scale, or
        limits that do not increase.
    """
    require_some("values", values)
    numbers = {key: as_number(value) for key, value in values.items()}
    layers = sorted({layer for layer, _ in numbers if layer is not None})
    columns = _columns(numbers, layers)
    scale = _colour_scale(np.array(list(numbers.values())), log, limits)
    rows = max(len(layers), 1)
    row_in = 0.24 if rows <= _ROWS_LABELLED else max(0.1, 0.24 * _ROWS_LABELLED / rows)
    map_in = max(rows, 2) * row_in
    names, upright_in = _column_names(columns)
    # Names as long as those of a vision tower's parts need room of their own.
    extra_in = max(0.0, upright_in - 0.8) + (0.3 if title else 0.0)
    fig = style.new_figure(1.2 + map_in + extra_in)
    style.set_title(fig, title)
    ax, bar_ax = fig.subplots(2, 1, height_ratios=(map_in, 0.12))
    texts = {key: _cell_text(value, percent) for key, value in numbers.items()}
    room = _MAP_WIDTH_IN / len(columns) / _CHARACTER_IN
    if rows > _ROWS_LABELLED or max(map(len, texts.values())) > room:
        texts = dict.fromkeys(texts, "")
    for x, module, outside in columns:
        for r, layer in [(0, None)] if outside else enumerate(layers):
            value = numbers.get((layer, module), math.nan)
            text = texts.get((layer, module), "")
            _cell(ax, value, text, scale, x, r, rows if outside else 1)
    _frame(ax, columns, layers, rows)
    ax.set_xticks([x for x, _, _ in columns], names, rotation=90 if upright_in else 0)
    _colour_bar(bar_ax, scale, label, percent)
    style.settle(fig)
    return fig


def _colour_bar(ax: Axes, scale: _Scale, label: str, percent: bool) -> None:
    if scale.log:
        ax.set_xscale("log")
    # Strips that each reach under the next one: vectors without seams.
    for i in range(_STRIPS):
        start, end = (scale.value(min(j / _STRIPS, 1.0)) for j in (i, i + 2))
        face = scale.color(scale.value((i + 0.5) / _STRIPS))
        ax.add_patch(Rectangle((start, 0), end - start, 1, facecolor=face, lw=0))
    if scale.log:
        style.log_axis(ax.xaxis, (scale.low, scale.high), percent)
    elif percent:
        style.percent_axis(ax.xaxis)
    ax.set_xlim(scale.low, scale.high)
    ax.set_yticks([])
    ax.set_xlabel(label)
    ax.grid(visible=False)
    ax.spines[:].set_visible(False)


def _columns(
    values: Mapping[tuple[int | None, str], float], layers: Sequence[int]
) -> list[tuple[float, str, bool]]:
    """Position, module and whether it lies outside the blocks, from left to right."""
    modules = order_modules([module for _, module in values])
    inner = [m for m in modules if any((layer, m) in values for layer in layers)]
    outer = [m for m in modules if (None, m) in values]
    start = len(inner) + (_OUTSIDE_GAP if inner else 0.0)
    return [(float(i), m, False) for i, m in enumerate(inner)] + [
        (start + i, m, True) for i, m in enumerate(outer)
    ]


def _column_names(
    columns: Sequence[tuple[float, str, bool]],
) -> tuple[list[str], float]:
    """The columns' names, and the inches that upright ones need; 0 where they lie."""
    names = [m.removesuffix("_proj").replace("_", "\n") for _, m, _ in columns]
    longest = max(len(part) for name in names for part in name.split("\n"))
    longest_in = longest * _CHARACTER_IN
    crowded = longest_in > _MAP_WIDTH_IN / len(columns)
    return names, longest_in if crowded else 0.0


def _cell_text(value: float, percent: bool) -> str:
    scaled = 100.0 * value if percent else value
    if not math.isfinite(scaled):
        return ""
    if scaled == 0.0 or 0.01 <= abs(scaled) < 1000.0:
        return f"{scaled:.2g}" if abs(scaled) < 1.0 else f"{scaled:#.3g}".rstrip(".")
    mantissa, exponent = f"{scaled:.1e}".split("e")
    return f"{mantissa}e{int(exponent)}"


def _colour_scale(
    values: np.ndarray, log: bool, limits: tuple[float, float] | None
) -> _Scale:
    finite = values[np.isfinite(values)]
    if log and np.any(finite < 0):
        raise ValueError(
            f"values reach down to {finite.min()}, expected none below zero on a "
            "logarithmic scale; use log=False"
        )
    if log:
        finite = finite[finite > 0]
    if len(finite) == 0:
        raise ValueError("values holds no finite number that the scale can show")
    low, high = limits or (float(finite.min()), float(finite.max()))
    if limits and not (low < high and (low > 0 or not log)):
        raise ValueError(
            f"limits are {limits}, expected two increasing numbers, above zero on a "
            "logarithmic scale"
        )
    if low == high:  # one value: give the scale a width
        low, high = (low / 2, high * 2) if log else (low - 0.5, high + 0.5)
    return _Scale(low, high, log)


def _cell(
    ax: Axes,
    value: float,
    text: str,
    scale: _Scale,
    x: float,
    row: int,
    height: int,
) -> None:
    box = (x - 0.5, row - 0.5)
    if not math.isfinite(value):
        ax.add_patch(
            Rectangle(
                box,
                1,
                height,
                facecolor="none",
                edgecolor=style.GRID,
                hatch="////",
                linewidth=0.0,
                label="_missing",
            )
        )
        return
    red, green, blue = face = scale.color(value)
    ax.add_patch(
        Rectangle(box, 1, height, facecolor=face, edgecolor=style.PAPER, linewidth=0.5)
    )
    if text:
        bright = 0.2126 * red + 0.7152 * green + 0.0722 * blue > 0.42
        ax.text(
            x,
            row + (height - 1) / 2,
            text,
            ha="center",
            va="center_baseline",
            color="#000000" if bright else "#ffffff",
        )


def _frame(
    ax: Axes, columns: Sequence[tuple[float, str, bool]], layers: list[int], rows: int
) -> None:
    ax.set_xlim(-0.5, columns[-1][0] + 0.5)
    ax.set_ylim(rows - 0.5, -0.5)
    ax.xaxis.tick_top()
    step = 1 if rows <= _ROWS_LABELLED else 4
    ax.set_yticks(range(0, len(layers), step), [str(i) for i in layers[::step]])
    ax.set_ylabel("layer")
    ax.tick_params(length=0)
    ax.grid(visible=False)
    ax.spines[:].set_visible(False)
