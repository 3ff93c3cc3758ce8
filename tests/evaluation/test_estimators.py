"""Estimators against brute force over every way to draw samples."""

import itertools
import math

import numpy as np
import pytest
from scipy.stats import hypergeom

from geomjax.evaluation.estimators import (
    length_bins,
    majority_at_n,
    mean_at_n,
    pass_at_k,
    pass_ks,
)


def test_pass_at_k_is_the_share_of_subsets_with_a_right_sample():
    for n in range(1, 8):
        for correct in range(n + 1):
            right = [True] * correct + [False] * (n - correct)
            for k in range(1, n + 1):
                subsets = list(itertools.combinations(right, k))
                share = sum(map(any, subsets)) / len(subsets)
                assert pass_at_k(n, correct, k) == pytest.approx(share, abs=1e-15)


def test_pass_at_k_is_the_hypergeometric_tail_where_binomials_overflow():
    for n, correct, k in [(1024, 3, 512), (2000, 700, 16), (4096, 1, 4096)]:
        tail = hypergeom.sf(0, n, correct, k)
        assert pass_at_k(n, correct, k) == pytest.approx(tail, rel=1e-10)


def test_pass_at_k_is_unbiased():
    """Its mean over all outcomes of n draws is the chance with k fresh ones."""
    n, k, p = 6, 3, 0.3
    outcomes = [math.comb(n, c) * p**c * (1 - p) ** (n - c) for c in range(n + 1)]
    mean = sum(w * pass_at_k(n, c, k) for c, w in enumerate(outcomes))
    assert mean == pytest.approx(1 - (1 - p) ** k, abs=1e-14)


def test_pass_at_k_without_an_estimate_and_without_a_meaning():
    assert math.isnan(pass_at_k(3, 1, 4))
    assert pass_at_k(5, 2, 1) == mean_at_n([1.0, 0.0, 1.0, 0.0, 0.0])
    for arguments in [(3, 4, 1), (3, -1, 1), (3, 1, 0)]:
        with pytest.raises(ValueError, match="expected k of 1 or more"):
            pass_at_k(*arguments)


def test_reported_ks():
    assert pass_ks(1) == (1,)
    assert pass_ks(16) == (1, 2, 4, 8, 16)
    assert pass_ks(12) == (1, 2, 4, 8, 12)


@pytest.mark.parametrize(
    ("answers", "scores", "expected"),
    [
        (["a", "b", "a"], [1, 0, 1], 1.0),
        (["a", "b", "b"], [1, 0, 0], 0.0),
        (["a", "b"], [1, 0], 0.5),
        (["a", "b", "c"], [0, 1, 0], 1 / 3),
        (["a", "b", "b", "a", "c"], [1, 0, 0, 1, 0], 0.5),
        (["a", None, None], [1, 0, 0], 1.0),  # Who says nothing does not vote.
        ([None, None], [0, 0], 0.0),
        (["a", "a", "b"], [1, 0, 0], 0.5),  # One of the two ran out of time.
    ],
)
def test_majority(answers, scores, expected):
    for order in itertools.permutations(range(len(answers))):
        got = majority_at_n(
            [answers[i] for i in order], [float(scores[i]) for i in order]
        )
        assert got == pytest.approx(expected)


def test_majority_is_the_mean_over_ways_to_break_ties():
    generator = np.random.default_rng(0)
    for _ in range(200):
        votes = generator.integers(0, 4, generator.integers(1, 9)).tolist()
        right = {int(generator.integers(4))}
        most = max(votes.count(v) for v in votes)
        tied = [v for v in set(votes) if votes.count(v) == most]
        expected = sum(v in right for v in tied) / len(tied)
        scores = [float(v in right) for v in votes]
        assert majority_at_n([str(v) for v in votes], scores) == pytest.approx(expected)


def test_nothing_measured_is_not_zero():
    assert math.isnan(mean_at_n([]))
    assert math.isnan(majority_at_n([], []))
    with pytest.raises(ValueError, match="2 answers with 1 scores"):
        majority_at_n(["a", "b"], [1.0])


def test_bins_hold_about_equally_many():
    lengths = np.random.default_rng(1).integers(1, 10_000, 1000)
    bins = length_bins(lengths.tolist(), 5)
    assert abs(np.bincount(bins) - 200).max() <= 3
    for low, high in itertools.pairwise(range(5)):
        assert lengths[bins == low].max() < lengths[bins == high].min()


@pytest.mark.parametrize(
    ("lengths", "bins"),
    [
        ([7, 7, 7], [0, 0, 0]),
        ([9, 1, 1, 1, 1], [1, 0, 0, 0, 0]),
        ([1, 9, 9, 9], [0, 1, 1, 1]),
        ([5], [0]),
    ],
)
def test_equal_lengths_stay_together(lengths, bins):
    assert length_bins(lengths, 5).tolist() == bins
