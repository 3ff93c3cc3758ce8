import math

import numpy as np
import pytest

from experiments.ablation import claims
from experiments.ablation.claims import ArmAccuracy

ABOVE_SGD = "AdamW ends above SGD"
NEAR_FULL = "Training only the run's own subnetwork nearly matches full training"
ABOVE_RANDOM = "The own mask ends above a random mask"
ABOVE_MATCHED = "The own mask ends above a random mask of equal density per tensor"


def arm(*late, start=0.25):
    return ArmAccuracy(start, np.array(late))


def verdicts(**arms):
    return {claim.claim: claim.holds for claim in claims.compute(arms)}


def test_interval_of_paired_differences_by_hand():
    # Differences 0.05, 0.06 and 0.07: mean 0.06, standard deviation 0.01. The 97.5 %
    # quantile of Student's t with 2 degrees of freedom is 4.302653.
    claim = claims.above("x", arm(0.5, 0.6, 0.7), arm(0.45, 0.54, 0.63))
    half = 100 * 4.302653 * 0.01 / math.sqrt(3)
    assert claim.holds is True
    assert claim.evidence == (
        f"difference 6.00 ± {half:.2f} points (95 % interval over 3 seeds: 5.00, 6.00, "
        "7.00); threshold: the interval above 0"
    )
    assert f"{half:.2f}" == "2.48"


def test_an_interval_that_holds_zero_decides_no_order():
    # Mean 0.02, standard deviation 0.01: half width 0.0248.
    claim = claims.above("x", arm(0.51, 0.52, 0.53), arm(0.5, 0.5, 0.5))
    assert claim.holds is None
    assert claim.evidence.endswith("so these seeds do not tell the two apart")


def test_the_order_is_that_of_the_arms():
    better, worse = arm(0.5, 0.6, 0.7), arm(0.45, 0.54, 0.63)
    assert claims.above("x", worse, better).holds is False


def test_differences_are_paired_by_seed():
    # The seeds differ by far more than the arms: unpaired intervals would overlap.
    better, worse = arm(0.21, 0.52, 0.81), arm(0.2, 0.51, 0.8)
    claim = claims.above("x", better, worse)
    assert claim.holds is True
    assert "difference 1.00 ± 0.00 points" in claim.evidence


def test_equal_arms_are_not_told_apart():
    assert claims.above("x", arm(0.5, 0.6), arm(0.5, 0.6)).holds is None


def test_one_seed_leaves_an_order_undecided():
    claim = claims.above("x", arm(0.5), arm(0.4))
    assert claim.holds is None
    assert claim.evidence == "difference 10.00 points with one seed: no interval"


@pytest.mark.parametrize(
    ("late", "holds"),
    [
        # Full gain 0.5, start 0.25: the threshold lies at 0.65.
        ((0.66, 0.66), True),
        ((0.64, 0.64), False),
        # Shares 0.98 and 1.02: the half width is 0.254, the lower end 0.746.
        ((0.74, 0.76), None),
        # 0.99 and 1.01: 0.127 and 0.873.
        ((0.745, 0.755), True),
        ((0.2, 0.2), False),
        ((0.9, 0.9), True),
    ],
)
def test_near_full_is_four_fifths_of_the_gain_for_the_whole_interval(late, holds):
    claim = claims.recovers("x", arm(*late), arm(0.75, 0.75))
    assert claim.holds is holds
    undecided = "the interval holds it, so these seeds do not decide" in claim.evidence
    assert undecided == (late == (0.74, 0.76))


def test_recovery_is_a_ratio_of_mean_gains_with_the_interval_of_seeds():
    # Gains 0.1 and 0.32 of a full 0.25 each: (0.1 + 0.32) / 0.5.
    claim = claims.recovers("x", arm(0.35, 0.57), arm(0.5, 0.5))
    assert claim.holds is None
    assert claim.evidence == (
        "gain 21.00 points, the full run's 25.00: 84% recovered "
        # Shares 0.4 and 1.28, standard deviation 0.44 sqrt 2, Student's t 12.706.
        "(seed by seed 84% ± 559%, 95 % interval); threshold: 80% of the full gain; "
        "the interval holds it, so these seeds do not decide"
    )


def test_recovery_needs_seeds_that_all_have_a_gain_to_recover():
    one = claims.recovers("x", arm(0.5), arm(0.5))
    assert one.holds is None
    assert "with one seed: no interval" in one.evidence
    some = claims.recovers("x", arm(0.5, 0.5), arm(0.5, 0.2))
    assert some.holds is None
    assert "not every seed's full run gained" in some.evidence


@pytest.mark.parametrize("late", [0.25, 0.2])
def test_without_a_gain_there_is_nothing_to_recover(late):
    claim = claims.recovers("x", arm(0.3), arm(late))
    assert claim.holds is None
    assert "there is no gain to recover" in claim.evidence


def test_each_claim_compares_the_arms_that_it_names():
    high, middle, low = arm(0.7, 0.7), arm(0.5, 0.5), arm(0.3, 0.3)
    arms = {
        "adamw": high,
        "sgd": middle,
        "adamw_opd_mask": middle,
        "adamw_random_mask": low,
        "adamw_matched_random_mask": high,
    }
    assert verdicts(**arms) == {
        ABOVE_SGD: True,
        NEAR_FULL: False,
        ABOVE_RANDOM: True,
        ABOVE_MATCHED: False,
    }
    higher = arm(0.9, 0.9)
    arms |= {"sgd": higher, "adamw_opd_mask": high, "adamw_random_mask": higher}
    arms["adamw_matched_random_mask"] = low
    assert verdicts(**arms) == {
        ABOVE_SGD: False,
        NEAR_FULL: True,
        ABOVE_RANDOM: False,
        ABOVE_MATCHED: True,
    }


def test_claims_need_their_arms():
    assert verdicts(adamw=arm(0.5)) == {}
    assert set(verdicts(adamw=arm(0.5), sgd=arm(0.4))) == {ABOVE_SGD}
    assert set(verdicts(adamw=arm(0.5), adamw_opd_mask=arm(0.4))) == {NEAR_FULL}
    assert set(verdicts(adamw_opd_mask=arm(0.5), adamw_random_mask=arm(0.4))) == {
        ABOVE_RANDOM
    }


def test_verdicts_are_plain_json_values():
    for claim in claims.compute({"adamw": arm(0.5, 0.6), "sgd": arm(0.4, 0.4)}):
        assert claim.holds in (True, False, None)
        assert type(claim.holds) in (bool, type(None))
