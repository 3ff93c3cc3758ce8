"""Names written at the ends of the curves, kept from running into each other."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from geomjax.analysis.plots import style

_LINE_PX = 1.25 * style.TEXT_PT / 72.0  # height of a line of text, in inches


class EndLabel(NamedTuple):
    """A name that belongs at the right of an axes, level with the value `y`."""

    text: str
    y: float
    color: str
    dash: str


def spread(
    wanted: Float[np.ndarray, "N"], gap: float, low: float, high: float
) -> Float[np.ndarray, "N"]:
    """Positions at least `gap` apart in [low, high], near the wanted ones.

    Minimises the squared displacement in the order of the wanted positions: subtracting
    i * gap from the i-th turns the spacing into monotonicity, which pooling adjacent
    violators solves. Where the interval is too short for all, the gap shrinks.

    Args:
      wanted: Positions, shape [N], in any order.
      gap: Least distance between two results.
      low: Lower end of the interval.
      high: Upper end of the interval.

    Returns:
      Positions, shape [N], in the order of `wanted`.
    """
    n = len(wanted)
    if n > 1:
        gap = min(gap, (high - low) / (n - 1))
    order = np.argsort(wanted, kind="stable")
    steps = gap * np.arange(n)
    pools: list[tuple[float, int]] = []
    for value in np.asarray(wanted, np.float64)[order] - steps:
        mean, size = float(value), 1
        while pools and pools[-1][0] > mean:
            other, count = pools.pop()
            mean = (mean * size + other * count) / (size + count)
            size += count
        pools.append((mean, size))
    fitted = np.concatenate([np.full(size, mean) for mean, size in pools])
    result = np.empty(n)
    result[order] = np.clip(fitted, low, high - gap * max(n - 1, 0)) + steps
    return result


def label_ends(fig: Figure, ax: Axes, labels: list[EndLabel]) -> None:
    """Writes the labels right of the axes, each led to by a piece of its curve's line.

    Fixes the layout of the figure: call it last, with the limits of `ax` settled.
    """
    # The longest names decide how much room the layout keeps; their heights do not.
    texts = [
        ax.annotate(
            style.shorten(label.text),
            xy=(1.0, 0.5),
            xycoords="axes fraction",
            xytext=(1.045, 0.5),
            textcoords="axes fraction",
            va="center",
            color=style.INK,
            annotation_clip=False,
        )
        for label in labels
    ]
    ax.set_ylim(ax.get_ylim())
    fig.draw_without_rendering()
    height_in = ax.get_position().height * fig.get_figheight()
    to_fraction = ax.transData + ax.transAxes.inverted()
    x_right = ax.get_xlim()[1]
    wanted = np.array(
        [to_fraction.transform((x_right, label.y))[1] for label in labels]
    )
    wanted = np.clip(wanted, 0.0, 1.0)
    placed = spread(wanted, _LINE_PX / height_in, 0.0, 1.0)
    for text, label, start, y in zip(texts, labels, wanted, placed, strict=True):
        text.set_y(y)
        ax.plot(
            [1.0, 1.035],
            [start, y],
            transform=ax.transAxes,
            color=label.color,
            linestyle=label.dash if label.dash == "-" else (0, (2, 1)),
            linewidth=1.4,
            clip_on=False,
            scalex=False,
            scaley=False,
            label="_leader",
        )
