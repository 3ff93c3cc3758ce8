"""One optimizer update, gradient accumulation and P1's outer loop."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from chain_model import ChainModel, chain_params

from geomjax.data.batches import pad_prompts
from geomjax.models.config import DecoderConfig
from geomjax.models.decoder import Decoder
from geomjax.objectives.base import Batch, token_mean
from geomjax.objectives.distill import full_vocabulary, sampled_token
from geomjax.objectives.divergence import reverse_kl
from geomjax.objectives.sft import cross_entropy
from geomjax.optim import coordinate_mask, standard_promotion
from geomjax.train.step import (
    Sampling,
    accumulate_gradients,
    init_state,
    make_distill_step,
    make_supervised_step,
    mini_batch,
    rollout,
)

CHAIN = ChainModel(9)
SAMPLING = Sampling(
    samples_per_prompt=2,
    max_new_tokens=4,
    temperature=1.0,
    stop_tokens=(8,),
    pad_token=0,
)
DECODER = Decoder(
    DecoderConfig(
        architecture="Qwen3ForCausalLM",
        vocab_size=9,
        hidden_size=8,
        intermediate_size=12,
        num_layers=1,
        num_heads=2,
        num_kv_heads=1,
        head_dim=4,
        rms_norm_eps=1e-6,
        rope_theta=1e4,
        tie_word_embeddings=True,
        max_position_embeddings=16,
    ),
    9,
)


def prompts(count=4, length=3):
    ids = [np.arange(1 + i % length, dtype=np.int32) + i % 5 for i in range(count)]
    return jax.tree.map(jnp.asarray, pad_prompts(ids, length, 0))


def sequences(seed, rows=6, length=7):
    """Rows of different lengths, padded on the right; the first two are prompt."""
    generator = np.random.default_rng(seed)
    slots = np.arange(length)[None, :]
    real = slots < generator.integers(4, length + 1, (rows, 1))
    completion = jnp.asarray(real & (slots >= 2))
    return Batch(
        tokens=jnp.asarray(generator.integers(0, 9, (rows, length)), jnp.int32),
        positions=jnp.asarray(np.where(real, slots, 0), jnp.int32),
        segment_ids=jnp.asarray(real, jnp.int32),
        weights=token_mean(completion),
        behaviour_log_probs=jnp.where(completion, -2.0, 0.0),
    )


def assert_close(got, expected, rtol=1e-5, atol=1e-7):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=atol),
        got,
        expected,
    )


def same_bits(left, right):
    left, right = (np.asarray(x).view(np.uint32) for x in (left, right))
    return left == right


def test_micro_batches_accumulate_to_the_whole_batch():
    """Rows have different numbers of tokens: a mean of means would differ."""
    objective = sampled_token(DECODER, DECODER, temperature=1.0, clip=0.2)
    params, teacher = (DECODER.init(jax.random.key(seed)) for seed in (0, 1))
    batch = sequences(2)
    lengths = batch.segment_ids.sum(axis=1)
    assert len(np.unique(lengths)) > 1
    whole = jax.jit(accumulate_gradients, static_argnums=(0, 4))
    expected = whole(objective, params, teacher, batch, 1)
    for parts in (2, 6):
        got = whole(objective, params, teacher, batch, parts)
        assert set(got[2]) == {"reverse_kl", "ratio", "clip_fraction"}
        assert_close(got, expected, atol=1e-6)


def test_rows_that_cannot_be_split_are_refused():
    step = make_supervised_step(cross_entropy(CHAIN), optax.sgd(0.1), micro_batches=4)
    state = init_state(chain_params(0, 9), optax.sgd(0.1))
    with pytest.raises(ValueError, match="6 sequences cannot be split into 4 equal"):
        step(state, {}, sequences(0))
    distill = make_distill_step(
        CHAIN,
        full_vocabulary(CHAIN, CHAIN, reverse_kl, temperature=1.0),
        optax.sgd(0.1),
        SAMPLING,
        mini_batches=3,
    )
    with pytest.raises(
        ValueError, match="4 prompts cannot be split into 3 mini-batches"
    ):
        distill(state, chain_params(1, 9), prompts(), jax.random.key(0))


def test_a_supervised_step_is_one_optimizer_update():
    params, batch, tx = chain_params(0, 9), sequences(1), optax.sgd(0.5)
    objective = cross_entropy(CHAIN)
    (loss, _), gradient = jax.value_and_grad(objective, has_aux=True)(params, {}, batch)
    expected = jax.tree.map(lambda p, g: p - 0.5 * g, params, gradient)
    step = make_supervised_step(objective, tx, micro_batches=2)
    state, metrics = step(init_state(params, tx), {}, batch)
    assert int(state.step) == 1
    assert_close(state.params, expected, rtol=1e-5, atol=1e-6)
    norm = np.sqrt(sum(float((g**2).sum()) for g in gradient.values()))
    assert metrics["loss"].shape == (1,)
    assert float(metrics["loss"][0]) == pytest.approx(float(loss), rel=1e-5)
    assert float(metrics["grad_norm"][0]) == pytest.approx(norm, rel=1e-5)
    assert float(metrics["update_norm"][0]) == pytest.approx(0.5 * norm, rel=1e-5)
    assert "momentum_gradient_cosine" not in metrics  # SGD has no moments.
    # Parameters given to init_state survive the donation of the state.
    assert_close(params, chain_params(0, 9), rtol=0, atol=0)


def test_a_rollout_keeps_the_samples_of_a_prompt_together():
    drawn = rollout(CHAIN, chain_params(0, 9), prompts(), jax.random.key(0), SAMPLING)
    assert drawn.tokens.shape == (8, 3 + 4)
    np.testing.assert_array_equal(drawn.tokens[0::2, :3], prompts().tokens)
    np.testing.assert_array_equal(drawn.tokens[1::2, :3], prompts().tokens)
    batch = mini_batch(drawn, 4)
    assert float(batch.weights.sum()) == pytest.approx(1.0)
    np.testing.assert_array_equal(batch.weights != 0, drawn.completion[:, 3:])
    np.testing.assert_array_equal(batch.behaviour_log_probs, drawn.log_probs[:, 3:])
    assert not drawn.completion[:, :3].any()


def test_mini_batches_update_one_after_another():
    """The step equals its parts done by hand: a rollout, then two updates in turn."""
    tx = optax.sgd(2.0)
    objective = sampled_token(CHAIN, CHAIN, temperature=1.0, clip=0.2)
    params, teacher, key = chain_params(0, 9), chain_params(1, 9), jax.random.key(3)
    step = make_distill_step(CHAIN, objective, tx, SAMPLING, mini_batches=2)
    state, metrics = step(init_state(params, tx), teacher, prompts(), key)

    drawn = rollout(CHAIN, params, prompts(), key, SAMPLING)
    expected, ratios = params, []
    for rows in (slice(0, 4), slice(4, 8)):
        part = jax.tree.map(lambda x, rows=rows: x[rows], drawn)
        gradient, values = jax.grad(objective, has_aux=True)(
            expected, teacher, mini_batch(part, 4)
        )
        expected = jax.tree.map(lambda p, g: p - 2.0 * g, expected, gradient)
        ratios.append(float(values["ratio"]))
    assert_close(state.params, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(metrics["ratio"], ratios, rtol=1e-5)
    # The first mini-batch is on-policy, the second is not: its policy has moved.
    assert ratios[0] == pytest.approx(1.0, abs=1e-5)
    assert abs(ratios[1] - 1.0) > 1e-2
    lengths = drawn.completion.sum(axis=1).reshape(2, 4).mean(axis=1)
    np.testing.assert_allclose(metrics["completion_tokens"], lengths)
    assert int(state.step) == 1


def test_the_gradient_is_compared_with_the_momentum_before_it():
    tx = standard_promotion(optax.adamw(1e-2))
    step = make_supervised_step(cross_entropy(CHAIN), tx)
    state, cosines = init_state(chain_params(0, 9), tx), []
    momentum = np.zeros_like(flat(state.params))
    for i in range(3):
        gradient = flat(
            jax.grad(lambda *x: cross_entropy(CHAIN)(*x)[0])(
                state.params, {}, sequences(i)
            )
        )
        norm = np.linalg.norm(momentum) * np.linalg.norm(gradient)
        expected = momentum @ gradient / norm if i else 0.0
        state, metrics = step(state, {}, sequences(i))
        np.testing.assert_allclose(
            metrics["momentum_gradient_cosine"], expected, rtol=1e-4
        )
        cosines.append(expected)
        momentum = 0.9 * momentum + 0.1 * gradient
    assert all(0.01 < abs(cosine) < 0.99 for cosine in cosines[1:])


def flat(tree):
    return np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)])


def test_frozen_coordinates_keep_every_bit_through_training():
    """AdamW's weight decay included, over several steps of two updates each."""
    params, teacher = (DECODER.init(jax.random.key(seed)) for seed in (0, 1))
    generator = np.random.default_rng(0)
    mask = jax.tree.map(lambda x: jnp.asarray(generator.random(x.shape) < 0.2), params)
    tx = coordinate_mask(mask, standard_promotion(optax.adamw(1e-2, weight_decay=0.1)))
    objective = full_vocabulary(DECODER, DECODER, reverse_kl, temperature=1.0)
    step = make_distill_step(DECODER, objective, tx, SAMPLING, mini_batches=2)
    state = init_state(params, tx)
    for i in range(3):
        state, metrics = step(state, teacher, prompts(), jax.random.key(i))
    kept, same = (
        np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)])
        for tree in (mask, jax.tree.map(same_bits, params, state.params))
    )
    assert same[~kept].all()
    assert same[kept].mean() < 0.05
    assert -1 <= float(metrics["momentum_gradient_cosine"][0]) <= 1


def test_flags_name_the_parameter_whose_gradient_is_not_finite():
    tx = optax.sgd(0.1)
    params = chain_params(0, 9)
    # With one hidden unit at infinity in an unused row, nothing is wrong yet.
    step = make_supervised_step(cross_entropy(CHAIN), tx)
    _, metrics = step(init_state(params, tx), {}, sequences(0))
    flags = {name: float(v[0]) for name, v in metrics.items() if "finite/" in name}
    assert flags == {"finite/head": 1.0, "finite/table": 1.0}

    def one_bad(params, context, batch):
        loss, metrics = cross_entropy(CHAIN)(params, context, batch)
        # sqrt has an infinite slope at 0: the head's gradient alone is not finite.
        return loss + jnp.sqrt(0.0 * params["head"][0, 0]), metrics

    _, metrics = make_supervised_step(one_bad, tx)(
        init_state(params, tx), {}, sequences(0)
    )
    assert np.isfinite(metrics["loss"]).all()
    flags = {name: float(v[0]) for name, v in metrics.items() if "finite/" in name}
    assert flags == {"finite/head": 0.0, "finite/table": 1.0}
