"""The contest of rollouts of mixed lengths: same tokens, counted work."""

import numpy as np
import pytest

from experiments.common import mixed_lengths
from experiments.common.benchmarks import Size
from experiments.common.mixed_lengths import Law

MICRO = Size(32, 48, 1, 2, 1, batch=8, prompt_tokens=0, new_tokens=0, turns=1, calls=1)
LAW = Law(median=80, sigma=0.7, limit=160)


@pytest.fixture(scope="module")
def figures():
    return mixed_lengths.measure(MICRO, LAW)


def test_both_draw_the_same_tokens(figures):
    assert figures["sequences"] == figures["equal_sequences"] == 32


def test_lengths_are_mixed(figures):
    lengths = figures["lengths"]
    assert 20 < lengths["median"] < 90
    assert lengths["median"] < lengths["mean"] < lengths["longest"] == LAW.limit
    assert 0 < lengths["at_limit"] < 0.4


def test_work_is_counted(figures, capsys):
    plain, ours = (figures["work"][name] for name in ("plain", "continuous"))
    assert plain["row_steps"] % 8 == 0
    assert plain["slot_reads"] == plain["row_steps"] * (64 + 160)
    assert plain["prompt_tokens"] == 32 * 64
    assert figures["needed_row_steps"] <= ours["row_steps"] < plain["row_steps"]
    assert figures["row_step_ratio"] == plain["row_steps"] / ours["row_steps"] > 1
    mixed_lengths.print_figures("micro", figures)
    assert "32 of them equal in both" in capsys.readouterr().out


def test_the_law_decides_where_sequences_end():
    """The chance to end, from the logit that the law gives and 16 others."""
    places = np.arange(1, 200)
    model = type("Model", (), {"vocab_size": 17})()
    ending = mixed_lengths.Ending(model, 1, 80.0, 0.7)
    logit = np.asarray(ending._with_logit(np.zeros((199, 1), np.float32), places - 1))
    odds = np.exp(logit[:, -1] - np.log(16) - 0.5)
    survival = np.cumprod(1 / (1 + odds))
    # From place n on to n + 1: half of those that came to 1 are left at the median.
    assert survival[78] == pytest.approx(0.5, abs=0.01)
    assert survival[160] == pytest.approx(0.158, abs=0.01)  # One sigma: 80 e^0.7.
