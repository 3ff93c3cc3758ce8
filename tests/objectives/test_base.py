"""Weights, sums and the shift of targets."""

import jax
import jax.numpy as jnp
import numpy as np
from table_model import make_batch

from geomjax.objectives.base import shift_targets, token_mean, weighted_sum


def test_token_mean_weighs_targets_equally_whatever_their_row():
    completion = jnp.array([[0, 1, 1, 1], [0, 0, 1, 0]], bool)
    weights = token_mean(completion)
    np.testing.assert_array_equal(weights, np.where(completion, 0.25, 0.0))


def test_the_first_slot_is_no_target():
    weights = token_mean(jnp.array([[1, 1, 0]], bool))
    np.testing.assert_array_equal(weights, [[0.0, 1.0, 0.0]])


def test_no_target_at_all_weighs_nothing():
    np.testing.assert_array_equal(token_mean(jnp.zeros((2, 3), bool)), np.zeros((2, 3)))


def test_weighted_sum_ignores_whatever_padding_holds():
    values = jnp.array([2.0, jnp.nan, 4.0, jnp.inf])
    weights = jnp.array([0.5, 0.0, 0.25, 0.0])
    assert weighted_sum(values, weights) == 2.0
    gradient = jax.grad(weighted_sum)(values, weights)
    np.testing.assert_array_equal(gradient, weights)


def test_weighted_sum_does_not_hide_what_has_a_weight():
    assert np.isnan(weighted_sum(jnp.array([1.0, jnp.nan]), jnp.array([0.5, 0.5])))


def test_targets_are_the_tokens_that_follow():
    batch = make_batch([[5, 6, 7]], [[0.0, 0.4, 0.6]], [[0.0, -1.0, -2.0]])
    targets, shifted = shift_targets(batch)
    np.testing.assert_array_equal(targets, [[6, 7]])
    np.testing.assert_allclose(shifted.weights, [[0.4, 0.6]], rtol=1e-6)
    np.testing.assert_array_equal(shifted.behaviour_log_probs, [[-1.0, -2.0]])
