"""Mixtures of advantages and the choice of tokens, by hand and by properties."""

from fractions import Fraction
from math import ceil

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from geomjax.objectives.mix import keep_tokens, mix_advantages, rescaled

COMPLETION = jnp.array([[0, 1, 1, 1, 1], [0, 0, 0, 1, 1]], bool)


def test_mixture_by_hand():
    opd = jnp.array([[1.0, -2.0], [0.5, 0.0]])
    got = mix_advantages(jnp.float32(0.25), opd, jnp.array([4.0, -1.0]))
    np.testing.assert_allclose(got, [[3.25, 2.5], [-0.625, -0.75]], rtol=1e-6)


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_the_ends_of_the_mixture_are_its_parts(alpha):
    opd, reward = jnp.array([[1.0, -2.0]]), jnp.array([3.0])
    got = mix_advantages(jnp.float32(alpha), opd, reward)
    np.testing.assert_array_equal(got, opd if alpha else [[3.0, 3.0]])


def test_the_largest_gaps_are_kept_in_each_row_alone():
    gaps = jnp.array([[99.0, 0.1, 0.4, -0.3, 0.2], [99.0, 99.0, 99.0, -5.0, -1.0]])
    kept = keep_tokens(gaps, COMPLETION, jnp.float32(0.5))
    np.testing.assert_array_equal(kept, [[0, 0, 1, 0, 1], [0, 0, 0, 0, 1]])


def test_the_signal_is_rescaled_to_the_length():
    """T / sum(m): 4 / 2 in the first row, 2 / 1 in the second."""
    kept = jnp.array([[0, 0, 1, 0, 1], [0, 0, 0, 0, 1]], bool)
    signal = jnp.array([[7.0, 1.0, 3.0, 1.0, 5.0], [7.0, 7.0, 7.0, 1.0, 9.0]])
    np.testing.assert_array_equal(
        rescaled(signal, COMPLETION, kept), [[0, 0, 6, 0, 10], [0, 0, 0, 0, 18]]
    )


def test_padding_that_is_not_a_number_is_not_kept():
    gaps = jnp.where(COMPLETION, 0.5, jnp.nan)
    kept = keep_tokens(gaps, COMPLETION, jnp.float32(1.0))
    np.testing.assert_array_equal(kept, COMPLETION)
    assert (rescaled(gaps, COMPLETION, kept) == jnp.where(COMPLETION, 0.5, 0.0)).all()


def test_random_choice_keeps_the_mean_signal():
    """With uniform scores every token is as likely, and T / sum(m) undoes the loss."""
    draws = np.random.default_rng(0).random((4000, 5)).astype(np.float32)
    completion = jnp.tile(COMPLETION[:1], (4000, 1))
    signal = jnp.tile(jnp.array([[0.0, 1.0, 2.0, 3.0, 4.0]]), (4000, 1))
    kept = keep_tokens(jnp.asarray(draws), completion, jnp.float32(0.25))
    assert (kept.sum(axis=1) == 1).all()
    mean = rescaled(signal, completion, kept).mean(axis=0)
    # Standard error of 4 a_t times a share of 1/4: a_t sqrt(3 / 4000) = 0.027 a_t.
    np.testing.assert_allclose(mean, [0, 1, 2, 3, 4], rtol=0.12)


@settings(deadline=None)
@given(
    length=st.integers(0, 40),
    share=st.sampled_from([0.01, 0.1, 0.25, 0.3, 0.5, 0.7, 0.9, 0.99, 1.0]),
    seed=st.integers(0, 100),
)
def test_how_many_are_kept(length, share, seed):
    scores = np.random.default_rng(seed).integers(0, 4, (1, 40)).astype(np.float32)
    completion = jnp.arange(40)[None, :] < length
    kept = np.asarray(keep_tokens(jnp.asarray(scores), completion, jnp.float32(share)))
    exact = ceil(Fraction(str(share)) * length)
    assert kept.sum() == exact
    if 0 < exact < length:
        left = np.asarray(completion) & ~kept
        assert scores[kept].min() >= scores[left].max()
