"""Figures of a suite from hand-worked samples."""

import math

import numpy as np
import pytest

from geomjax.evaluation.bootstrap import Bootstrap
from geomjax.evaluation.summary import Sample, difference, summarize
from geomjax.rewards.contract import Judgement

QUICK = Bootstrap(resamples=500)


def sample(score, answer="x", tokens=10, stopped=True, status="judged"):
    return Sample(Judgement(score, "why", status, answer), tokens, stopped)


RIGHT, WRONG = sample(1.0, "a"), sample(0.0, "b", tokens=30)
UNREAD = sample(0.0, None, 99, False, "unparsed completion")
FAILED = sample(0.0, None, 5, True, "failed")
NO_REFERENCE = sample(0.0, None, 5, True, "unparsed reference")


def test_figures_by_hand():
    found = summarize([[RIGHT, WRONG, RIGHT, UNREAD], [WRONG] * 4], QUICK)
    assert found.samples == 4
    assert found.mean.mean == 0.25
    assert found.majority is not None
    assert found.majority.mean == 0.5
    # Of two right ones among four: pass@1 1/2, pass@2 1 - 1/6, pass@4 1; halved.
    assert found.passes.keys() == {1, 2, 4}
    np.testing.assert_allclose(
        [found.passes[k].mean for k in (1, 2, 4)], [1 / 4, 5 / 12, 1 / 2]
    )
    assert found.ended == found.mean  # What was cut off had no answer.
    assert found.truncated.mean == found.unparsed.mean == 1 / 8
    assert found.statuses == {"judged": 7, "unparsed completion": 1}


def test_a_judgement_that_says_nothing_costs_its_sample_only():
    found = summarize([[RIGHT, FAILED, RIGHT], [WRONG, WRONG, WRONG]], QUICK)
    assert found.mean == summarize([[RIGHT, RIGHT], [WRONG] * 3], QUICK).mean
    assert found.mean.mean == 0.5
    assert found.passes[3].problems == 1  # The other has two samples left.
    assert found.statuses["failed"] == 1
    gone = summarize([[NO_REFERENCE] * 2, [RIGHT, WRONG]], QUICK)
    assert gone.mean.problems == 1
    assert gone.mean.mean == 0.5


def test_what_was_right_and_then_cut_off_counts_in_the_mean_alone():
    cut = sample(1.0, "a", stopped=False)
    found = summarize([[RIGHT, cut], [cut, WRONG]], QUICK)
    assert found.mean.mean == 0.75
    assert found.ended.mean == 0.25
    assert found.truncated.mean == 0.5


def test_a_completion_judged_too_slowly_is_wrong():
    slow = sample(0.0, None, status="timed out")
    assert summarize([[RIGHT, slow]], QUICK).mean.mean == 0.5


def test_rewards_without_answers_have_no_majority():
    found = summarize([[sample(1.0, None), sample(0.0, None)]], QUICK)
    assert found.majority is None
    assert found.mean.mean == 0.5


def test_partial_scores_count_in_the_mean_but_not_as_right():
    found = summarize([[sample(0.5), sample(1.0)]], QUICK)
    assert found.mean.mean == 0.75
    assert found.passes[1].mean == 0.5


def test_lengths():
    found = summarize([[RIGHT, WRONG], [RIGHT, UNREAD]], QUICK, length_bin_count=2)
    first, second = found.by_length
    assert (first.low, first.high, first.samples, first.score.mean) == (10, 10, 2, 1)
    assert (second.low, second.high, second.samples, second.score.mean) == (
        30,
        99,
        2,
        0,
    )
    assert sum(b.samples for b in summarize([[RIGHT] * 3], QUICK).by_length) == 3


def test_difference_is_paired():
    first = [[WRONG], [RIGHT], [RIGHT, WRONG]]
    second = [[RIGHT], [RIGHT], [RIGHT, RIGHT]]
    found = difference(first, second, QUICK)
    assert found.mean == pytest.approx(0.5)
    assert found.problems == 3
    assert difference(first, [[FAILED], *second[1:]], QUICK).problems == 2


def test_nothing_at_all():
    found = summarize([[FAILED]], QUICK)
    assert math.isnan(found.mean.mean)
    assert found.by_length == []
    assert found.passes == {}
