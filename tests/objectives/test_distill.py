"""Distillation objectives by hand, by finite differences and by enumeration."""

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

from geomjax.objectives.base import token_mean
from geomjax.objectives.distill import full_vocabulary, sampled_token
from geomjax.objectives.divergence import forward_kl, jsd, reverse_kl

TWO = TableModel(2)


def two_tokens(p):
    """A model of two tokens that draws token 1 with probability p in any context."""
    return log_prob_params(np.log(np.array([[1 - p, p]] * 2, np.float32)))


def one_target(behaviour):
    """One sequence, 0 then 1; the draw of 1 had probability `behaviour`."""
    return make_batch([[0, 1]], [[0.0, 1.0]], [[0.0, np.log(behaviour)]])


class TestSampledToken:
    @pytest.mark.parametrize(
        ("behaviour", "teacher", "surrogate", "slope", "clipped"),
        [
            # Advantage log(teacher / behaviour), ratio 0.6 / behaviour, clip 0.2.
            (0.5, 0.8, 1.2, 0, 0),  # On its way up at the very bound of the clip.
            (0.4, 0.8, 1.2, 0, 1),  # Far up already: no gradient.
            (0.4, 0.2, 1.5, 1, 0),  # Up although it should go down: full gradient.
            (0.8, 0.9, 0.75, 1, 0),  # Down although it should go up: full gradient.
            (0.8, 0.3, 0.8, 0, 1),  # Far down already: no gradient.
            (0.55, 0.9, 0.6 / 0.55, 1, 0),  # Within the clip.
        ],
    )
    def test_clipping_by_hand(self, behaviour, teacher, surrogate, slope, clipped):
        objective = sampled_token(TWO, TWO, temperature=1.0, clip=0.2)
        (loss, metrics), gradient = jax.value_and_grad(objective, has_aux=True)(
            two_tokens(0.6), two_tokens(teacher), one_target(behaviour)
        )
        advantage = np.log(teacher / behaviour)
        assert loss == pytest.approx(-surrogate * advantage, rel=1e-4)
        assert metrics["reverse_kl"] == pytest.approx(-advantage, rel=1e-4)
        assert metrics["ratio"] == pytest.approx(0.6 / behaviour, rel=1e-4)
        if behaviour != 0.5:  # At the bound itself, rounding decides.
            assert metrics["clip_fraction"] == clipped
            # d ratio / d logits = ratio * (1[token] - pi); pi(1) = 0.6.
            expected = -slope * advantage * 0.6 / behaviour * np.array([-0.4, 0.4])
            got = gradient["table"][0]
            np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-6)

    def test_gradient_is_that_of_reverse_kl_in_expectation(self):
        """Each token, weighted by its probability, gives grad KL(student || teacher).

        Two contexts, all continuations of one step enumerated: the estimator's
        expectation, exactly.
        """
        size, temperature = 7, 0.8
        model = TableModel(size)
        params, teacher = table_params(0, size, 4), table_params(1, size, 4)
        contexts = np.array([2, 5])
        scores = np.asarray(params["table"] @ params["head"].T)[contexts] / temperature
        log_probs = np.asarray(jax.nn.log_softmax(scores))
        tokens = np.stack(
            [np.repeat(contexts, size), np.tile(np.arange(size), 2)], axis=1
        )
        flat = log_probs.reshape(-1)
        enumerated = make_batch(
            tokens,
            np.stack([np.zeros(2 * size), np.exp(flat) / 2], axis=1),
            np.stack([np.zeros(2 * size), flat], axis=1),
        )
        contexts_alone = make_batch(
            np.stack([contexts, np.zeros(2)], axis=1), [[0, 0.5]] * 2
        )
        policy = sampled_token(model, model, temperature=temperature, clip=0.2)
        whole = full_vocabulary(model, model, reverse_kl, temperature=temperature)
        got, metrics = jax.grad(policy, has_aux=True)(params, teacher, enumerated)
        (expected_kl, _), expected = jax.value_and_grad(whole, has_aux=True)(
            params, teacher, contexts_alone
        )
        assert float(expected_kl) > 0.1
        assert metrics["reverse_kl"] == pytest.approx(float(expected_kl), rel=1e-5)
        for name in ("table", "head"):
            np.testing.assert_allclose(
                got[name], expected[name], rtol=1e-4, atol=1e-6, err_msg=name
            )

    def test_no_gradient_flows_through_the_advantage(self):
        """With the ratio at 1 the gradient is `-A grad log pi`, without `grad A`."""
        params, teacher = two_tokens(0.6), two_tokens(0.9)
        objective = sampled_token(TWO, TWO, temperature=1.0, clip=0.2)
        batch = one_target(0.6)

        def gradients(student, context):
            return objective(student, context, batch)[0]

        ours, theirs = jax.grad(gradients, argnums=(0, 1))(params, teacher)
        assert all((g == 0).all() for g in jax.tree.leaves(theirs))
        advantage = np.log(0.9 / 0.6)
        np.testing.assert_allclose(
            ours["table"][0], -advantage * np.array([-0.4, 0.4]), rtol=1e-4
        )

    def test_both_models_are_taken_at_the_temperature_of_the_rollout(self):
        params, teacher = two_tokens(0.6), two_tokens(0.9)
        # At temperature 1/2, probabilities are squared and normalised.
        hot = {p: p**2 / (p**2 + (1 - p) ** 2) for p in (0.6, 0.9)}
        objective = sampled_token(TWO, TWO, temperature=0.5, clip=0.2)
        _, metrics = objective(params, teacher, one_target(hot[0.6]))
        assert metrics["ratio"] == pytest.approx(1.0, rel=1e-5)
        assert metrics["reverse_kl"] == pytest.approx(
            np.log(hot[0.6] / hot[0.9]), rel=1e-4
        )


class TestFullVocabulary:
    def test_value_by_hand_and_its_direction(self):
        batch = make_batch([[0, 1, 0]], [[0.0, 0.25, 0.75]])
        student, teacher = two_tokens(0.75), two_tokens(0.5)
        forward = full_vocabulary(TWO, TWO, forward_kl, temperature=1.0)
        reverse = full_vocabulary(TWO, TWO, reverse_kl, temperature=1.0)
        # KL((1/2, 1/2) || (1/4, 3/4)), and the other way round.
        assert forward(student, teacher, batch)[0] == pytest.approx(
            np.log(2) - np.log(3) / 2, rel=1e-5
        )
        assert reverse(student, teacher, batch)[0] == pytest.approx(
            0.75 * np.log(3) - np.log(2), rel=1e-5
        )

    def test_the_targets_do_not_matter_but_their_contexts_do(self):
        model = TableModel(5)
        params, teacher = table_params(0, 5, 3), table_params(1, 5, 3)
        objective = full_vocabulary(model, model, reverse_kl, temperature=1.0)

        def loss(tokens):
            return objective(params, teacher, make_batch([tokens], [[0, 0, 1]]))[0]

        assert loss([0, 1, 2]) == loss([0, 1, 3]) == loss([4, 1, 3])
        assert loss([0, 1, 2]) != loss([0, 3, 2])

    @pytest.mark.parametrize(
        "divergence",
        [forward_kl, reverse_kl, jsd(0.3)],
        ids=["forward_kl", "reverse_kl", "jsd"],
    )
    def test_gradient_against_finite_differences(self, divergence):
        with jax.enable_x64(True):
            model = TableModel(6, np.float64)
            objective = full_vocabulary(
                model, model, divergence, temperature=0.7, chunk_tokens=5
            )
            batch = random_batch(0, 6, rows=3, length=5, dtype=np.float64)
            teacher = table_params(2, 6, 3, np.float64)
            assert_gradient(
                lambda params: objective(params, teacher, batch)[0],
                table_params(1, 6, 3, np.float64),
            )

    def test_no_gradient_reaches_the_teacher(self):
        objective = full_vocabulary(TWO, TWO, jsd(0.5), temperature=1.0)
        gradient = jax.grad(
            lambda teacher: objective(two_tokens(0.3), teacher, one_target(0.5))[0]
        )(two_tokens(0.9))
        assert all((g == 0).all() for g in jax.tree.leaves(gradient))

    def test_vocabularies_of_two_sizes_are_refused(self):
        with pytest.raises(ValueError, match="has 2 tokens, the teacher's 3"):
            full_vocabulary(TWO, TableModel(3), reverse_kl, temperature=1.0)


def test_token_mean_gives_the_mean_over_completion_tokens():
    """Two rows of three and one targets: each of the four tokens counts a quarter."""
    model = TableModel(5)
    params, teacher = table_params(0, 5, 3), table_params(1, 5, 3)
    completion = jnp.array([[0, 1, 1, 1], [0, 0, 1, 0]], bool)
    tokens = np.array([[0, 1, 2, 3], [4, 2, 0, 1]])
    objective = full_vocabulary(model, model, reverse_kl, temperature=1.0)
    batch = make_batch(tokens, token_mean(completion))
    contexts = tokens[0, :3].tolist() + [tokens[1, 1]]
    each = [
        objective(params, teacher, make_batch([[c, 0]], [[0, 1]]))[0] for c in contexts
    ]
    assert objective(params, teacher, batch)[0] == pytest.approx(
        np.mean(each), rel=1e-5
    )
