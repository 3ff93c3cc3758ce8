"""Divergences by hand, by their bounds and by finite differences."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from finite_differences import assert_gradient

from geomjax.objectives.divergence import forward_kl, jsd, reverse_kl

# KL(p || q) = 1/2 log(1/2 / 1/4) + 1/2 log(1/2 / 3/4) = log 2 - log(3)/2.
P, Q = np.array([[0.5, 0.5]]), np.array([[0.25, 0.75]])
KL_PQ = np.log(2) - np.log(3) / 2
KL_QP = 0.75 * np.log(3) - np.log(2)


def log32(probabilities):
    return jnp.asarray(np.log(probabilities), jnp.float32)


def random_log_probs(seed, rows=4, size=7, dtype=np.float32):
    draws = np.random.default_rng(seed).standard_normal((rows, size)) * 2
    return jnp.asarray(draws - np.log(np.exp(draws).sum(-1, keepdims=True)), dtype)


def test_directions_by_hand():
    teacher, student = log32(P), log32(Q)
    np.testing.assert_allclose(forward_kl(teacher, student), [KL_PQ], rtol=1e-6)
    np.testing.assert_allclose(reverse_kl(teacher, student), [KL_QP], rtol=1e-6)
    assert abs(KL_PQ - KL_QP) > 0.01


def test_forward_kl_covers_and_reverse_kl_avoids():
    teacher = log32([[0.499, 0.499, 0.002]])
    narrow, wide = log32([[0.998, 0.001, 0.001]]), log32([[0.4, 0.4, 0.2]])
    # The student that drops one of the teacher's modes pays in forward KL; the one that
    # does what the teacher does not do pays, by comparison, in reverse KL.
    assert forward_kl(teacher, narrow) > 10 * forward_kl(teacher, wide)
    assert reverse_kl(teacher, wide) > 3 * forward_kl(teacher, wide)


def test_jsd_by_hand():
    # m = 3/4 p + 1/4 q = (7/16, 9/16).
    m = np.array([7, 9]) / 16
    expected = 0.75 * (P * np.log(P / m)).sum() + 0.25 * (Q * np.log(Q / m)).sum()
    np.testing.assert_allclose(jsd(0.75)(log32(P), log32(Q)), [expected], rtol=1e-5)
    # beta is the teacher's weight: exchanging the two is exchanging the ends.
    np.testing.assert_allclose(jsd(0.25)(log32(Q), log32(P)), [expected], rtol=1e-5)
    assert abs(jsd(0.25)(log32(P), log32(Q))[0] - expected) > 1e-4


def test_jsd_is_symmetric_at_one_half_and_at_most_log_2():
    teacher, student = random_log_probs(0), random_log_probs(1)
    half = jsd(0.5)
    np.testing.assert_allclose(
        half(teacher, student), half(student, teacher), rtol=1e-5
    )
    assert (half(teacher, student) < np.log(2)).all()
    apart = log32([[1 - 1e-30, 1e-30], [1e-30, 1 - 1e-30]])
    np.testing.assert_allclose(half(apart, apart[::-1]), np.log(2), rtol=1e-6)


def test_jsd_over_its_weight_tends_to_the_kl_of_its_name():
    with jax.enable_x64(True):
        teacher, student = (random_log_probs(i, dtype=np.float64) for i in (0, 1))
        small = 1e-5
        np.testing.assert_allclose(
            jsd(small)(teacher, student) / small,
            forward_kl(teacher, student),
            rtol=1e-3,
        )
        np.testing.assert_allclose(
            jsd(1 - small)(teacher, student) / small,
            reverse_kl(teacher, student),
            rtol=1e-3,
        )


@pytest.mark.parametrize("beta", [0.0, 1.0, -0.1, 1.5, float("nan")])
def test_jsd_refuses_weights_where_it_vanishes(beta):
    with pytest.raises(ValueError, match="strictly between 0 and 1"):
        jsd(beta)


@pytest.mark.parametrize(
    "divergence",
    [forward_kl, reverse_kl, jsd(0.5), jsd(0.1)],
    ids=["forward_kl", "reverse_kl", "jsd_0.5", "jsd_0.1"],
)
def test_zero_on_equal_distributions_and_positive_elsewhere(divergence):
    teacher, student = random_log_probs(0), random_log_probs(1)
    np.testing.assert_allclose(divergence(teacher, teacher), 0, atol=1e-6)
    assert (divergence(teacher, student) > 1e-3).all()


@pytest.mark.parametrize(
    "divergence",
    [forward_kl, reverse_kl, jsd(0.5)],
    ids=["forward_kl", "reverse_kl", "jsd"],
)
def test_probabilities_that_underflow_give_finite_values_and_gradients(divergence):
    teacher = jax.nn.log_softmax(jnp.array([[0.0, -300.0, 1.0]]))

    def loss(scores):
        return divergence(teacher, jax.nn.log_softmax(scores)).sum()

    value, gradient = jax.value_and_grad(loss)(jnp.array([[0.0, 2.0, -400.0]]))
    assert np.isfinite(value)
    assert np.isfinite(gradient).all()


@pytest.mark.parametrize(
    "divergence",
    [forward_kl, reverse_kl, jsd(0.5), jsd(0.2)],
    ids=["forward_kl", "reverse_kl", "jsd_0.5", "jsd_0.2"],
)
def test_gradients_against_finite_differences(divergence):
    with jax.enable_x64(True):
        teacher = random_log_probs(3, dtype=np.float64)

        def loss(scores):
            return divergence(teacher, jax.nn.log_softmax(scores)).sum()

        assert_gradient(loss, random_log_probs(4, dtype=np.float64))
