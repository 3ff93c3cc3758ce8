"""One look for every figure: colours, text sizes, axes, and the context they need."""

import contextlib
import functools
import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, ParamSpec

import matplotlib
import numpy as np
from matplotlib.artist import Artist
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

WIDTH_IN = 7.3
"""Figure width in inches: 700 CSS pixels, so that 9 pt text is read at full size."""

TEXT_PT = 9.0
TITLE_PT = 10.5

# The neutral colours are distinct from every other colour that is drawn, so that a page
# may replace them by those of its own light or dark theme.
INK = "#1f2328"
MUTED = "#59636e"
GRID = "#d8dee4"
PAPER = "#fefefe"

# Okabe and Ito's palette, which readers with any colour blindness tell apart, without
# black (the ink) and yellow (too faint on white). Both themes carry these seven.
BLUE = "#0072b2"  # dark enough on paper; a page may lighten it for its dark theme
CATEGORIES = (
    BLUE,
    "#d55e00",  # vermilion
    "#009e73",  # bluish green
    "#cc79a7",  # reddish purple
    "#e69f00",  # orange
    "#56b4e9",  # sky blue
    "#8c8c8c",  # grey
)
_DASHES = ("-", "--", ":", "-.")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")

SEQUENTIAL_MAP = "viridis"

_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")

_RC: dict[Any, Any] = {
    "axes.axisbelow": True,
    "axes.edgecolor": MUTED,
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.labelcolor": INK,
    "axes.labelsize": TEXT_PT,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlecolor": INK,
    "axes.titlelocation": "left",
    "axes.titlesize": TEXT_PT,
    "axes.titleweight": "bold",
    "figure.dpi": 100.0,
    "figure.edgecolor": "none",
    "figure.facecolor": PAPER,
    "font.family": "DejaVu Sans",  # shipped with matplotlib: the same on each machine
    "font.size": TEXT_PT,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "hatch.linewidth": 0.8,
    "legend.edgecolor": "none",
    "legend.facecolor": "none",
    "legend.fontsize": TEXT_PT,
    "legend.framealpha": 0.0,
    "legend.handlelength": 2.6,
    "legend.labelcolor": INK,
    "lines.linewidth": 1.8,
    "lines.markersize": 3.8,
    "savefig.dpi": 160.0,
    "savefig.facecolor": "auto",
    "svg.fonttype": "path",  # text looks the same wherever the figure is opened
    "svg.hashsalt": "geomjax",  # ids, and so bytes, depend on the content alone
    "text.color": INK,
    "text.parse_math": False,  # run names are text: "a$b$c" is no formula
    "xtick.color": MUTED,
    "xtick.labelcolor": INK,
    "xtick.labelsize": TEXT_PT,
    "ytick.color": MUTED,
    "ytick.labelcolor": INK,
    "ytick.labelsize": TEXT_PT,
}

# matplotlib keeps its settings in one process-wide table: figures are made and saved
# one at a time, each with the table set to our style and put back afterwards.
_LOCK = threading.RLock()

_P = ParamSpec("_P")


@contextlib.contextmanager
def style_context() -> Iterator[None]:
    """Applies the style, whatever the user's matplotlibrc says, and restores theirs."""
    with _LOCK, matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_RC)
        yield


def styled(draw: Callable[_P, Figure]) -> Callable[_P, Figure]:
    """Wraps a plotting function so that it runs inside `style_context`."""

    @functools.wraps(draw)
    def wrapper(*args: _P.args, **kwargs: _P.kwargs) -> Figure:
        with style_context():
            return draw(*args, **kwargs)

    return wrapper


class SeriesStyle(NamedTuple):
    """How one run or arm is drawn in every figure of a report."""

    color: str
    dash: str
    marker: str


NULL_STYLE = SeriesStyle(MUTED, "--", "")
"""The look of chance levels, null updates and other references."""


def assign_styles(names: Sequence[str]) -> dict[str, SeriesStyle]:
    """Gives each name its own colour, and past seven names also another dash.

    Assign once for a report and pass the result to every figure, so that an arm keeps
    its colour where only some arms are shown.

    Args:
      names: Distinct run or arm names, in the order of the report.

    Returns:
      A style for each name.

    Raises:
      ValueError: A name occurs twice, or there are more names than looks.
    """
    if len(set(names)) != len(names):
        raise ValueError(f"names must be distinct, got {list(names)}; rename the runs")
    looks = len(CATEGORIES) * len(_DASHES)
    if len(names) > looks:
        raise ValueError(
            f"got {len(names)} names, expected at most {looks} that can be told apart; "
            "split them over several figures"
        )
    return {
        name: SeriesStyle(
            CATEGORIES[i % len(CATEGORIES)],
            _DASHES[i // len(CATEGORIES)],
            _MARKERS[i % len(_MARKERS)],
        )
        for i, name in enumerate(names)
    }


def resolve_styles(
    names: Sequence[str], styles: Mapping[str, SeriesStyle] | None
) -> Mapping[str, SeriesStyle]:
    """The styles to draw `names` with: those given, or fresh ones.

    Raises:
      ValueError: `styles` is given but lacks a name.
    """
    if styles is None:
        return assign_styles(names)
    missing = [name for name in names if name not in styles]
    if missing:
        raise ValueError(
            f"styles has no entry for {missing}; pass assign_styles of all names"
        )
    return styles


def new_figure(height_in: float, width_in: float = WIDTH_IN) -> Figure:
    """An empty figure that arranges its axes by itself until `finish` fixes them."""
    layout = ConstrainedLayoutEngine(w_pad=0.06, h_pad=0.06, wspace=0.03, hspace=0.03)
    return Figure(figsize=(width_in, height_in), layout=layout)


def settle(fig: Figure) -> None:
    """Computes the layout once and keeps it, so that each save gives equal bytes."""
    fig.align_ylabels()
    fig.draw_without_rendering()
    fig.set_layout_engine("none")


def set_title(fig: Figure, title: str | None) -> None:
    """Puts an optional title at the upper left of the figure."""
    if title is not None:
        fig.suptitle(title, x=0.01, ha="left", fontsize=TITLE_PT, fontweight="bold")


def legend_above(fig: Figure, handles: Mapping[str, Artist], title: str | None) -> None:
    """Puts a legend, and an optional title over it, above all axes."""
    labels = [shorten(label) for label in handles]
    legend = fig.legend(
        list(handles.values()),
        labels,
        loc="outside upper left",
        ncols=_legend_columns(labels),
        alignment="left",
        borderpad=0.1,
        columnspacing=1.4,
        title=title,
    )
    legend.get_title().set(fontsize=TITLE_PT, fontweight="bold", color=INK)


def _legend_columns(labels: Sequence[str]) -> int:
    """The most columns, filled top to bottom, that the figure's width holds."""
    for columns in range(len(labels), 1, -1):
        widest = [max(map(len, c)) for c in np.array_split(np.array(labels), columns)]
        if sum(widest) + 8 * columns <= 92:  # in characters; 8 for line and gap
            return columns
    return 1


def shorten(name: str, limit: int = 34) -> str:
    """Cuts the middle out of a name that would push the axes off the figure."""
    if len(name) <= limit:
        return name
    head = (limit - 1) // 2
    return f"{name[:head]}…{name[head + 1 - limit :]}"


def format_value(value: float, percent: bool = False, padded: bool = False) -> str:
    """A short label such as `0.352`, `4.1e-5` or `35.2 %` (with a thin space).

    Three significant digits; `padded` keeps their trailing zeros, for labels that are
    compared with each other.
    """
    scaled = 100.0 * value if percent else value
    if scaled == 0.0:
        text = "0"
    elif not 1e-3 <= abs(scaled) < 9999.5:
        mantissa, exponent = f"{scaled:.1e}".split("e")
        text = f"{mantissa}e{int(exponent)}"
    elif abs(scaled) >= 999.5:
        text = f"{scaled:.0f}"
    else:
        padded = padded and abs(scaled) >= 1.0
        text = f"{scaled:#.3g}".rstrip(".") if padded else f"{scaled:.3g}"
    text = text.replace("-", "\u2212", 1) if text.startswith("-") else text
    return f"{text}\u2009%" if percent else text


def percent_axis(axis: Axis) -> None:
    """Labels a linear axis of fractions in percent."""
    axis.set_major_formatter(FuncFormatter(lambda v, _: format_value(v, percent=True)))


def log_axis(
    axis: Axis,
    limits: tuple[float, float],
    percent: bool = False,
    most_ticks: int | None = None,
) -> None:
    """Places and words the ticks of a logarithmic axis with these limits.

    Powers of ten where there are several, otherwise 1, 2 and 5 times them. The labels
    are plain text, because the style does not parse formulas.
    """
    several = math.log10(limits[1] / limits[0]) >= 2.0
    steps = (1.0,) if several else (1.0, 2.0, 5.0)
    axis.set_major_locator(LogLocator(subs=steps, numticks=most_ticks))
    axis.set_minor_formatter(NullFormatter())
    if percent:
        percent_axis(axis)
    elif several:
        axis.set_major_formatter(FuncFormatter(lambda v, _: _power_of_ten(v)))
    else:
        axis.set_major_formatter(FuncFormatter(lambda v, _: format_value(v)))


def _power_of_ten(value: float) -> str:
    exponent = round(math.log10(value))
    if -3 <= exponent <= 3:
        return f"{value:g}"
    return "10" + str(exponent).translate(_SUPERSCRIPTS)
