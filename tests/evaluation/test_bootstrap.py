"""Intervals: their coverage, their levels, and scipy's bootstrap beside them."""

import numpy as np
import pytest
from scipy import stats

from geomjax.evaluation.bootstrap import (
    Bootstrap,
    interval,
    paired_interval,
    ratio_interval,
)

QUICK = Bootstrap(resamples=1000)


def test_many_problems_give_scipys_percentile_interval():
    values = np.random.default_rng(0).gamma(2.0, size=2000)
    ours = interval(values, Bootstrap(resamples=4000))
    theirs = stats.bootstrap(
        (values,),
        np.mean,
        n_resamples=4000,
        method="percentile",
        rng=np.random.default_rng(1),
    ).confidence_interval
    width = theirs.high - theirs.low
    assert ours.low == pytest.approx(theirs.low, abs=0.06 * width)
    assert ours.high == pytest.approx(theirs.high, abs=0.06 * width)


def test_few_normal_problems_give_students_interval():
    """What the levels are for: exact for normal values, up to the draws."""
    values = np.random.default_rng(3).normal(size=12)
    ours = interval(values, Bootstrap(resamples=20_000))
    half = stats.t.ppf(0.975, 11) * values.std(ddof=1) / np.sqrt(12)
    assert (ours.high - ours.low) / 2 == pytest.approx(half, rel=0.06)
    plain = stats.bootstrap(
        (values,), np.mean, n_resamples=20_000, method="percentile", rng=1
    ).confidence_interval
    assert (plain.high - plain.low) / 2 < 0.9 * half


def coverage(draw, truth, repeats, bootstrap=QUICK):
    """Share of repeated suites whose interval holds the true accuracy."""
    hits = 0
    for seed in range(repeats):
        low, high = draw(np.random.default_rng(seed), bootstrap._replace(seed=seed))
        hits += low <= truth <= high
    return hits / repeats


@pytest.mark.parametrize(("problems", "samples"), [(30, 16), (30, 4), (100, 1)])
@pytest.mark.parametrize("confidence", [0.95, 0.8])
def test_intervals_hold_the_true_accuracy_at_the_stated_rate(
    problems, samples, confidence
):
    """Problems of unequal difficulty, drawn anew each time, as are the samples.

    The tolerance is three standard errors of the share over the repeats, and one
    percent for what a bootstrap of few problems is known to lack.
    """
    a, b, repeats = 0.8, 1.2, 500

    def draw(generator, bootstrap):
        chances = generator.beta(a, b, problems)
        means = generator.binomial(samples, chances) / samples
        return interval(means, bootstrap)[1:3]

    got = coverage(draw, a / (a + b), repeats, QUICK._replace(confidence=confidence))
    error = np.sqrt(confidence * (1 - confidence) / repeats)
    assert abs(got - confidence) < 3 * error + 0.01


def test_samples_taken_for_problems_would_not_cover():
    """Resampling samples as if they were problems misses: the test above can fail."""

    def draw(generator, bootstrap):
        chances = generator.beta(0.8, 1.2, 30)
        samples = generator.random((30, 16)) < chances[:, None]
        return interval(samples.ravel().astype(float), bootstrap)[1:3]

    assert coverage(draw, 0.4, 100) < 0.6


def test_paired_differences_are_narrower_and_hold_the_truth():
    widths = []

    def draw(generator, bootstrap):
        chances = generator.uniform(0.1, 0.8, 40)
        first, second = (generator.binomial(16, chances + g) / 16 for g in (0, 0.1))
        paired = paired_interval(first, second, bootstrap)
        alone = [interval(values, bootstrap) for values in (first, second)]
        widths.append([i.high - i.low for i in (paired, *alone)])
        return paired[1:3]

    assert abs(coverage(draw, 0.1, 300) - 0.95) < 3 * np.sqrt(0.95 * 0.05 / 300) + 0.01
    paired, *alone = np.mean(widths, axis=0)
    assert paired < 0.75 * np.hypot(*alone)


def test_a_ratio_weighs_problems_by_their_samples():
    sums, counts = np.array([1.0, 4.0, 0.0, 0.0]), np.array([1.0, 4.0, 5.0, 0.0])
    found = ratio_interval(sums, counts, QUICK)
    assert found.mean == 0.5
    assert found.problems == 3
    assert found.low < 0.5 < found.high
    # Every resample that can be drawn, with its chance, instead of draws.
    kept = range(3)
    every = [
        sums[[i, j, k]].sum() / counts[[i, j, k]].sum()
        for i in kept
        for j in kept
        for k in kept
    ]
    tail = stats.norm.cdf(np.sqrt(3 / 2) * stats.t.ppf(0.025, 2))
    exact = np.quantile(every, [tail, 1 - tail], method="inverted_cdf")
    np.testing.assert_allclose([found.low, found.high], exact, atol=0.02)


def test_what_was_not_measured_is_left_out():
    values = np.array([1.0, np.nan, 0.0, 1.0])
    assert interval(values, QUICK) == interval(values[[0, 2, 3]], QUICK)
    one = interval(np.array([0.25, np.nan]), QUICK)
    assert one.mean == 0.25
    assert np.isnan([one.low, one.high]).all()
    assert interval(np.array([np.nan]), QUICK).problems == 0


@pytest.mark.parametrize("value", [0.0, 0.1, 1.0])
def test_equal_values_give_no_interval_rather_than_a_point(value):
    same = interval(np.full(5, value), QUICK)
    assert (same.mean, same.problems) == (pytest.approx(value), 5)
    assert np.isnan([same.low, same.high]).all()
    counts = np.array([1.0, 2.0, 6.0])
    assert np.isnan(ratio_interval(value * counts, counts, QUICK).low)
    almost = interval(np.array([value, value, value, 0.5]), QUICK)
    assert almost.low < almost.high


def test_seed_and_number_of_problems_decide_the_resamples():
    values = np.random.default_rng(0).random(50)
    assert interval(values, QUICK) == interval(values, QUICK)
    assert interval(values, QUICK) != interval(values, QUICK._replace(seed=1))
