import numpy as np
import pytest

from experiments.ablation.rates import Rate, at_edge, choose, record
from experiments.common.outcome import Outcome, late
from geomjax.train.errors import NonFiniteError


def outcome(validation, divergence, test=0.0):
    rows = [
        {
            "kind": "eval",
            "step": step,
            "validation_accuracy": 0.0 if step == 0 else validation,
            "test_accuracy": test,
            "validation_reverse_kl": divergence,
        }
        for step in range(7)
    ]
    return Outcome(0, 0.0, None, 1.0, None, 1.0, 0.0, rows)


def rate(learning_rate, validation, divergence=1.0, test=0.0):
    return Rate(learning_rate, [outcome(v, divergence, test) for v in validation])


def test_late_is_the_mean_of_the_last_five():
    assert late(np.array([9.0, 9, 1, 2, 3, 4, 5])) == 3
    # The untrained start is no part of it, however short the run.
    assert late(np.array([9.0, 1, 2])) == 1.5


def test_the_mean_over_seeds_on_the_validation_split_decides():
    low, high = rate(1e-4, [0.4, 0.5]), rate(1e-3, [0.6, 0.2], test=0.9)
    assert choose("x", [low, high], accuracy=True) is low
    assert choose("x", [high, low], accuracy=True) is low


def test_without_answers_the_smaller_divergence_decides():
    near, far = rate(1e-4, [0.1], 0.5), rate(1e-3, [0.9], 0.7)
    assert choose("x", [far, near], accuracy=False) is near
    assert choose("x", [far, near], accuracy=True) is far


def test_where_nothing_is_right_the_smaller_divergence_decides():
    near, far = rate(1e-4, [0.0], 0.5), rate(1e-3, [0.0], 0.7)
    assert choose("x", [far, near], accuracy=True) is near


def test_a_rate_that_diverged_is_never_chosen():
    bad, good = Rate(1.0, [], "step 3"), rate(1e-4, [0.1])
    assert choose("x", [bad, good], accuracy=True) is good
    with pytest.raises(NonFiniteError, match="arm x: every learning rate diverged"):
        choose("x", [bad], accuracy=True)


@pytest.mark.parametrize("order", [1, -1])
def test_a_score_that_is_no_number_is_never_chosen(order):
    nan = float("nan")
    bad, good = rate(1.0, [0.9, nan], 0.1), rate(1e-4, [0.0], 2.0)
    assert choose("x", [bad, good][::order], accuracy=True) is good
    far = rate(1.0, [0.0], nan)
    for accuracy in (True, False):
        assert choose("x", [far, good][::order], accuracy=accuracy) is good


def test_the_edge_is_of_what_did_not_diverge():
    low, middle, high = (rate(r, [0.1]) for r in (1e-4, 1e-3, 1e-2))
    assert not at_edge([low, middle, high], middle)
    assert at_edge([low, middle, high], high)
    assert at_edge([low, middle, Rate(1e-2, [], "x")], middle)
    assert not at_edge([low], low)


def test_the_record_holds_every_rate_and_seed():
    low, bad = rate(1e-4, [0.4, 0.5], 0.7, 0.3), Rate(1.0, [], "step 3")
    first, second = record([low, bad], low)
    assert first == {
        "learning_rate": 1e-4,
        "chosen": True,
        "diverged": None,
        "validation_accuracy": pytest.approx([0.4, 0.5]),
        "test_accuracy": pytest.approx([0.3, 0.3]),
        "validation_reverse_kl": pytest.approx([0.7, 0.7]),
    }
    assert second["diverged"] == "step 3"
    assert second["validation_accuracy"] is None
