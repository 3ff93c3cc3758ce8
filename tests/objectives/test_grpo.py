"""Group advantages and the clipped policy gradient, by hand and by differences."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from finite_differences import assert_gradient
from table_model import (
    TableModel,
    log_prob_params,
    make_batch,
    random_batch,
    table_params,
)

from geomjax.objectives.distill import sampled_token
from geomjax.objectives.grpo import group_advantages
from geomjax.objectives.surrogate import Clip, policy_gradient

TWO = TableModel(2)
DAPO = Clip(0.2, 0.28)


def two_tokens(p):
    return log_prob_params(np.log(np.array([[1 - p, p]] * 2, np.float32)))


def test_rewards_are_normalised_within_their_group():
    found = group_advantages(jnp.array([1.0, 0.0, 0.0, 0.0, 3.0, 1.0, 1.0, 3.0]), 4)
    # Means 1/4 and 2; sample deviations 1/2 and 2/sqrt(3).
    expected = [1.5, -0.5, -0.5, -0.5, *(np.sqrt(3) / 2 * np.array([1, -1, -1, 1]))]
    np.testing.assert_allclose(found.advantages, expected, rtol=1e-5)
    assert found.contrast.all()


def test_groups_without_contrast_are_marked_and_teach_nothing():
    found = group_advantages(jnp.array([1.0, 1.0, 0.1, 0.1, 0.0, 1.0]), 2)
    np.testing.assert_array_equal(found.contrast, [0, 0, 0, 0, 1, 1])
    np.testing.assert_array_equal(found.advantages[:4], np.zeros(4))
    np.testing.assert_allclose(
        found.advantages[4:], [-np.sqrt(0.5), np.sqrt(0.5)], rtol=1e-5
    )


def test_equal_rewards_whose_mean_rounds_away_have_no_contrast():
    """Three times 0.1 over 3 is not 0.1 in float32; the deviation is not 0 either."""
    found = group_advantages(jnp.full(3, 0.1), 3)
    np.testing.assert_array_equal(found.advantages, np.zeros(3))
    assert not found.contrast.any()


def test_rows_of_unknown_reward_are_in_no_group():
    # Known: 1, 0, 1 (mean 2/3, deviation 1/sqrt(3)); 0 and 0; 1 alone.
    rewards = jnp.array([1.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0])
    known = jnp.array([1, 1, 1, 0, 1, 1, 0, 0, 1, 0, 0, 0], bool)
    found = group_advantages(rewards, 4, known)
    third = np.array([1, -2, 1, 0]) / np.sqrt(3)
    np.testing.assert_allclose(found.advantages, [*third, *[0] * 8], rtol=1e-5)
    np.testing.assert_array_equal(found.contrast, [1, 1, 1, *[0] * 9])
    # As zeros they were negative advantages, and made the others' larger.
    assert group_advantages(rewards, 4).advantages[3] < 0


def test_where_all_rewards_are_known_nothing_is_another_number():
    rewards = jax.random.normal(jax.random.key(0), (30,))
    plain, known = (
        jax.jit(partial(group_advantages, group_size=3))(rewards, known=mask)
        for mask in (None, jnp.ones(30, bool))
    )
    for ours, theirs in zip(known, plain, strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize(
    ("rewards", "size", "message"),
    [
        ([1.0, 0.0], 1, "groups have 1 completion"),
        ([1.0, 0.0, 1.0], 2, "3 rewards do not make whole groups of 2"),
    ],
)
def test_groups_that_are_none_are_refused(rewards, size, message):
    with pytest.raises(ValueError, match=message):
        group_advantages(jnp.array(rewards), size)


AT_MOST_ONE = Clip(1.0, 1.0)  # Bounds 0 and 2: P2's of the teacher's rollouts.


@pytest.mark.parametrize(
    ("behaviour", "advantage", "surrogate", "slope", "clipped"),
    [
        (0.25, 1.0, 2.0, 0, 1),  # Up by 2.4: no gradient.
        (0.25, -1.0, 2.4, 1, 0),  # Up although it should go down.
        (0.4, 1.0, 1.5, 1, 0),  # Up by 1.5, within 1.
        (0.99, -1.0, 0.6 / 0.99, 1, 0),  # No ratio is below 0.
    ],
)
def test_wide_clipping_by_hand(behaviour, advantage, surrogate, slope, clipped):
    check_clipping(AT_MOST_ONE, behaviour, advantage, surrogate, slope, clipped)


@pytest.mark.parametrize(
    ("behaviour", "advantage", "surrogate", "slope", "clipped"),
    [
        # pi(1) = 0.6, ratio 0.6 / behaviour, bounds 0.8 and 1.28.
        (0.5, 2.0, 1.2, 1, 0),  # Up by 1.2: beyond 0.2, within 0.28.
        (0.45, 2.0, 1.28, 0, 1),  # Up by 1.33: no gradient.
        (0.45, -2.0, 0.6 / 0.45, 1, 0),  # Up although it should go down.
        (0.7, -1.0, 0.6 / 0.7, 1, 0),  # Down, within 0.2.
        (0.8, -1.0, 0.8, 0, 1),  # Down to 0.75: no gradient.
        (0.8, 1.0, 0.75, 1, 0),  # Down although it should go up.
    ],
)
def test_asymmetric_clipping_by_hand(behaviour, advantage, surrogate, slope, clipped):
    check_clipping(DAPO, behaviour, advantage, surrogate, slope, clipped)


def check_clipping(clip, behaviour, advantage, surrogate, slope, clipped):
    objective = policy_gradient(TWO, temperature=1.0, clip=clip)
    batch = make_batch([[0, 1]], [[0.0, 1.0]], [[0.0, np.log(behaviour)]])
    batch = batch._replace(advantages=jnp.array([[jnp.nan, advantage]]))
    (loss, metrics), gradient = jax.value_and_grad(objective, has_aux=True)(
        two_tokens(0.6), {}, batch
    )
    assert loss == pytest.approx(-surrogate * advantage, rel=1e-4)
    assert metrics["ratio"] == pytest.approx(0.6 / behaviour, rel=1e-4)
    assert metrics["clip_fraction"] == clipped
    expected = -slope * advantage * 0.6 / behaviour * np.array([-0.4, 0.4])
    np.testing.assert_allclose(gradient["table"][0], expected, rtol=1e-4, atol=1e-6)


def test_rows_without_weight_may_hold_anything():
    """A filtered group has weight 0; its advantages and log-probabilities count not."""
    objective = policy_gradient(TWO, temperature=1.0, clip=DAPO)
    one = make_batch([[0, 1]], [[0.0, 1.0]], [[0.0, np.log(0.5)]])
    one = one._replace(advantages=jnp.array([[0.0, 0.7]]))
    two = make_batch(
        [[0, 1], [1, 1]], [[0, 1.0], [0, 0]], [[0, np.log(0.5)], [0, -3e38]]
    )
    two = two._replace(advantages=jnp.array([[0.0, 0.7], [jnp.nan, jnp.inf]]))
    function = jax.value_and_grad(objective, has_aux=True)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6),
        function(two_tokens(0.6), {}, one),
        function(two_tokens(0.6), {}, two),
    )


def test_distillation_is_this_objective_with_the_teachers_advantage():
    """The same loss and gradient as `sampled_token`, whatever the batch."""
    model = TableModel(7)
    params, teacher = table_params(0, 7, 4), table_params(1, 7, 4)
    batch = random_batch(2, 7, rows=3, length=6)
    scores = jax.nn.log_softmax(teacher["table"] @ teacher["head"].T / 0.8)
    log_probs = scores[batch.tokens[:, :-1], batch.tokens[:, 1:]]
    advantages = jnp.pad(log_probs, ((0, 0), (1, 0))) - batch.behaviour_log_probs
    ours = policy_gradient(model, temperature=0.8, clip=Clip(0.2, 0.2))
    theirs = sampled_token(model, model, temperature=0.8, clip=0.2)
    (loss, _), gradient = jax.value_and_grad(ours, has_aux=True)(
        params, {}, batch._replace(advantages=advantages)
    )
    (expected_loss, _), expected = jax.value_and_grad(theirs, has_aux=True)(
        params, teacher, batch
    )
    assert loss == pytest.approx(float(expected_loss), rel=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
        gradient,
        expected,
    )


def test_gradient_against_finite_differences():
    with jax.enable_x64(True):
        model = TableModel(6, np.float64)
        objective = policy_gradient(
            model, temperature=0.7, clip=Clip(0.9, 5.0), chunk_tokens=5
        )
        batch = random_batch(0, 6, rows=3, length=5, dtype=np.float64)
        draws = np.random.default_rng(4).standard_normal(batch.weights.shape)
        batch = batch._replace(advantages=jnp.asarray(draws))
        assert_gradient(
            lambda params: objective(params, {}, batch)[0],
            table_params(1, 6, 3, np.float64),
        )


@pytest.mark.parametrize("clip", [Clip(-0.1, 0.2), Clip(1.1, 0.2), Clip(0.2, np.inf)])
def test_bounds_out_of_range_are_refused(clip):
    with pytest.raises(ValueError, match="expected low from 0 to 1"):
        policy_gradient(TWO, temperature=1.0, clip=clip)


def test_a_batch_without_advantages_is_refused():
    objective = policy_gradient(TWO, temperature=1.0, clip=DAPO)
    with pytest.raises(ValueError, match="no advantages"):
        objective(two_tokens(0.5), {}, make_batch([[0, 1]], [[0.0, 1.0]]))
