"""The common look: layout of labels, bands over seeds, saved bytes, isolation."""

import os
import re
import subprocess
import sys
import threading
import warnings

import matplotlib
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from geomjax.analysis.plots import (
    Curve,
    assign_styles,
    band_over_repeats,
    describe_band,
    figure_png,
    figure_svg,
    learning_curves,
    student_half_width,
)
from geomjax.analysis.plots.labels import spread
from geomjax.analysis.plots.style import (
    CATEGORIES,
    format_value,
    shorten,
    style_context,
)

X = np.arange(4.0)


def figure(name="run"):
    return learning_curves({name: Curve(X, np.stack([X, X + 1]))}, y_label="loss")


@given(st.lists(st.floats(-2, 3), min_size=1, max_size=12))
def test_spread_keeps_order_gap_and_interval(wanted):
    wanted = np.array(wanted)
    placed = spread(wanted, 0.05, 0.0, 1.0)
    order = np.argsort(wanted, kind="stable")
    gaps = np.diff(placed[order])
    assert np.all(gaps >= 0.05 - 1e-9)
    assert placed.min() >= -1e-9
    assert placed.max() <= 1 + 1e-9


def test_spread_leaves_distant_labels_alone_and_centres_a_crowd():
    np.testing.assert_allclose(spread(np.array([0.9, 0.1]), 0.1, 0.0, 1.0), [0.9, 0.1])
    np.testing.assert_allclose(
        spread(np.array([0.5, 0.5, 0.5]), 0.1, 0.0, 1.0), [0.4, 0.5, 0.6]
    )
    crowd = spread(np.full(21, 0.5), 0.1, 0.0, 1.0)  # too many for the gap: it shrinks
    np.testing.assert_allclose(crowd, np.linspace(0, 1, 21), atol=1e-12)


def test_student_half_width_against_the_table():
    # t_{0.975, 2} = 4.302653, and s = 1 for (1, 2, 3)
    values = np.array([[1.0, 5.0], [2.0, np.nan], [3.0, np.nan]])
    half = student_half_width(values)
    np.testing.assert_allclose(half[0], 4.302653 / np.sqrt(3), rtol=1e-6)
    assert np.isnan(half[1])


def test_band_kinds_and_missing_repeats():
    values = np.array([[1.0, 4.0, np.nan], [3.0, np.nan, np.nan]])
    band = band_over_repeats(values, "range")
    np.testing.assert_array_equal(band.mean, [2, 4, np.nan])
    np.testing.assert_array_equal(band.low, [1, 4, np.nan])
    np.testing.assert_array_equal(band.high, [3, 4, np.nan])
    interval = band_over_repeats(values, "ci95")
    # t_{0.975, 1} = 12.7062, s = sqrt(2)
    np.testing.assert_allclose(
        interval.high - interval.mean, [12.7062, *[np.nan] * 2], rtol=1e-6
    )


def test_band_sentence_names_the_edges():
    assert "least and the greatest" in describe_band("range", 3)
    assert "95 %" in describe_band("ci95", 3)
    assert "no band" in describe_band("ci95", 1)


def test_styles_differ_and_repeat():
    names = [f"run {i}" for i in range(4 * len(CATEGORIES))]
    styles = assign_styles(names)
    assert len({(s.color, s.dash) for s in styles.values()}) == len(names)
    assert styles == assign_styles(names)
    with pytest.raises(ValueError, match="at most 28"):
        assign_styles([*names, "one more"])
    with pytest.raises(ValueError, match="distinct"):
        assign_styles(["a", "a"])


def test_a_missing_style_is_named():
    with pytest.raises(ValueError, match="sgd"):
        learning_curves(
            {"sgd": Curve(X, X[None])}, y_label="loss", styles=assign_styles(["adamw"])
        )


@pytest.mark.parametrize(
    ("value", "percent", "padded", "text"),
    [
        (0.0, True, False, "0\u2009%"),
        (0.352, False, False, "0.352"),
        (0.00041, False, False, "4.1e-4"),
        (-0.2, True, True, "\u221220.0\u2009%"),
        (2.0, False, True, "2.00"),
        (2.0, False, False, "2"),
        (999.7, False, False, "1000"),
        (123456.0, False, False, "1.2e5"),
        (100.0, False, True, "100"),
    ],
)
def test_value_labels(value, percent, padded, text):
    assert format_value(value, percent, padded) == text


def test_long_names_lose_their_middle():
    name = "organisation/model-" + "x" * 40 + "-step-900"
    short = shorten(name)
    assert len(short) == 34
    assert short.startswith("organisation/")
    assert short.endswith("-step-900")
    assert shorten("short") == "short"


def test_equal_figures_give_equal_bytes_without_a_date():
    first, second = figure(), figure()
    svg, png = figure_svg(first), figure_png(first)
    assert svg == figure_svg(second) == figure_svg(first)
    assert png == figure_png(second)
    assert png.startswith(b"\x89PNG")
    assert not re.search(r"<dc:date>|20\d\d-\d\d-\d\d", svg)
    assert b"matplotlib" not in png.lower()


def test_the_users_matplotlib_settings_neither_matter_nor_change():
    plain = figure_svg(figure())
    with matplotlib.rc_context({"font.size": 30, "axes.facecolor": "red"}):
        assert figure_svg(figure()) == plain
        assert matplotlib.rcParams["font.size"] == 30
    with style_context():
        assert matplotlib.rcParams["font.size"] == 9


def test_figures_in_threads_equal_those_drawn_alone():
    names = ["a", "b", "c", "d"]
    alone = [figure_svg(figure(name)) for name in names]
    found = [""] * len(names)

    def draw(i):
        found[i] = figure_svg(figure(names[i]))

    threads = [threading.Thread(target=draw, args=(i,)) for i in range(len(names))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == alone


def test_figures_need_neither_pyplot_nor_a_display():
    code = """
import sys
import numpy as np
from geomjax.analysis.plots import Curve, figure_png, figure_svg, learning_curves
fig = learning_curves({"a": Curve(np.arange(2.0), np.ones((2, 2)))}, y_label="y")
assert figure_png(fig) and figure_svg(fig)
assert "matplotlib.pyplot" not in sys.modules
"""
    clean = {k: v for k, v in os.environ.items() if k not in ("DISPLAY", "MPLBACKEND")}
    subprocess.run([sys.executable, "-c", code], check=True, env=clean)


def test_names_are_text_and_no_formulas():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fig = figure("a$b_{c$ \\frac %s")
        figure_svg(fig)
    assert "a$b_{c$ \\frac %s" in [text.get_text() for text in fig.axes[0].texts]


def test_text_is_nine_points_or_more():
    fig = figure()
    sizes = [t.get_fontsize() for t in fig.findobj(matplotlib.text.Text)]
    assert min(sizes) >= 9
    assert fig.get_figwidth() * 96 == pytest.approx(700, abs=2)
