"""Intervals of means over problems, by resampling the problems."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int64
from scipy import special

_ROWS = 500
"""Resamples made at a time, so that memory does not grow with their number."""


class Interval(NamedTuple):
    """A mean over problems with its confidence interval.

    Attributes:
      mean: NaN if nothing was measured.
      low: Lower end; NaN for fewer than two problems, or if all values are equal:
        resampling shows no spread then, though the problems not asked may have some.
      high: Upper end.
      problems: How many it is a mean of.
    """

    mean: float
    low: float
    high: float
    problems: int


class Bootstrap(NamedTuple):
    """How intervals are made.

    Attributes:
      resamples: Number of resamples, B.
      seed: Seed of their draws.
      confidence: Stated coverage.
    """

    resamples: int = 10_000
    seed: int = 0
    confidence: float = 0.95


def interval(values: Float[np.ndarray, "n"], bootstrap: Bootstrap) -> Interval:
    """Mean of one value a problem, with the interval for the mean over all problems.

    Problems are drawn with replacement, stratified by nothing: suites are samples of
    the problems that might have been asked, and samples of one problem stay together.
    The interval is the expanded percentile interval (Hesterberg 2015, arXiv
    1411.5279): the quantiles are those of levels

        Phi(-sqrt(n / (n - 1)) t_{n-1, a/2}) and its complement, a = 1 - confidence,

    because the plain percentile interval is too narrow for few problems, by the factor
    sqrt((n - 1) / n) and by taking normal for Student quantiles.

    Args:
      values: One a problem; NaN where it was not measured, which leaves it out.
      bootstrap: Number of resamples, seed and coverage. Equal seeds and equal n
        resample the same problems.

    Returns:
      The mean and its interval.
    """
    kept = np.asarray(values, np.float64)
    kept = kept[np.isfinite(kept)]
    return ratio_interval(kept, np.ones_like(kept), bootstrap)


def ratio_interval(
    sums: Float[np.ndarray, "n"], counts: Float[np.ndarray, "n"], bootstrap: Bootstrap
) -> Interval:
    """Mean over samples, `sum(sums) / sum(counts)`, resampling problems.

    For means over samples of which problems have different numbers, such as those of
    one bin of lengths.

    Args:
      sums: Sum of each problem's values.
      counts: Number of its values; problems with 0 are left out.
      bootstrap: As for `interval`.

    Returns:
      The ratio and its interval.
    """
    kept = counts > 0
    sums, counts = np.asarray(sums, np.float64)[kept], counts[kept]
    n = len(sums)
    if n == 0:
        return Interval(np.nan, np.nan, np.nan, 0)
    mean = float(sums.sum() / counts.sum())
    values = sums / counts
    if np.allclose(values, values[0], rtol=1e-12, atol=1e-12):  # Up to rounding.
        return Interval(mean, np.nan, np.nan, n)
    means = np.concatenate([(w @ sums) / (w @ counts) for w in _weights(n, bootstrap)])
    tail = _tail(n, bootstrap.confidence)
    low, high = np.quantile(means, [tail, 1 - tail])
    return Interval(mean, float(low), float(high), n)


def paired_interval(
    first: Float[np.ndarray, "n"], second: Float[np.ndarray, "n"], bootstrap: Bootstrap
) -> Interval:
    """Mean of `second - first` over the problems that both were measured on."""
    return interval(np.asarray(second - first, np.float64), bootstrap)


def _tail(n: int, confidence: float) -> float:
    """Share of the resampled means outside the interval, on each side."""
    quantile = special.stdtrit(n - 1, 0.5 - confidence / 2)
    return float(special.ndtr(np.sqrt(n / (n - 1)) * quantile))


def _weights(n: int, bootstrap: Bootstrap) -> Iterator[Int64[np.ndarray, "b n"]]:
    """How often each problem is drawn, for a few resamples at a time."""
    generator = np.random.Generator(np.random.PCG64(bootstrap.seed))
    for start in range(0, bootstrap.resamples, _ROWS):
        rows = min(_ROWS, bootstrap.resamples - start)
        drawn = generator.integers(n, size=(rows, n))
        drawn += n * np.arange(rows)[:, None]
        yield np.bincount(drawn.ravel(), minlength=rows * n).reshape(rows, n)
