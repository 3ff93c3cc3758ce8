"""Per-token gradients: by hand, by their sum, and by finite differences."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from table_model import (
    TableModel,
    log_prob_params,
    make_batch,
    random_batch,
    table_params,
)

from geomjax.models.config import DecoderConfig
from geomjax.models.decoder import Decoder
from geomjax.objectives.base import Batch
from geomjax.objectives.sft import cross_entropy
from geomjax.objectives.surrogate import Clip, policy_gradient
from geomjax.objectives.token_gradients import token_gradients

DECODER = Decoder(
    DecoderConfig(
        architecture="Qwen3ForCausalLM",
        vocab_size=11,
        hidden_size=8,
        intermediate_size=12,
        num_layers=2,
        num_heads=2,
        num_kv_heads=1,
        head_dim=4,
        rms_norm_eps=1e-6,
        rope_theta=1e4,
        tie_word_embeddings=False,
        max_position_embeddings=32,
    ),
    11,
)


def test_the_head_by_hand():
    """d(-log p_a) / d head = (p - e_a) h^T, and h is the context's row of the table."""
    table = np.array([[1.0, 0.0], [0.0, 2.0]], np.float32)
    params = {"table": jnp.asarray(table), "head": jnp.eye(2)}
    batch = make_batch([[0, 1, 1]], [[0.0, 0.3, 0.7]])
    got = token_gradients(cross_entropy(TableModel(2)), params, {}, batch, ("head",))
    first, second = np.exp([1.0, 0.0]), np.exp([0.0, 2.0])
    expected = [
        np.zeros((2, 2)),
        np.outer(first / first.sum() - [0, 1], table[0]),
        np.outer(second / second.sum() - [0, 1], table[1]),
    ]
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-7)


def decoder_batch():
    generator = np.random.default_rng(0)
    tokens = generator.integers(0, 11, (2, 6)).astype(np.int32)
    target = np.tile(np.arange(3) >= 1, (2, 1))
    return Batch(
        tokens=jnp.asarray(tokens),
        positions=jnp.tile(jnp.arange(6, dtype=jnp.int32), (2, 1)),
        segment_ids=jnp.ones((2, 6), jnp.int32),
        weights=jnp.asarray(target / target.sum(), jnp.float32),
        behaviour_log_probs=jnp.full((2, 3), -2.4, jnp.float32),
        advantages=jnp.asarray(generator.standard_normal((2, 3)), jnp.float32),
    )


@pytest.mark.parametrize("layer", [0, 1])
def test_their_weighted_sum_is_the_gradient_of_the_loss(layer):
    """Through attention, in an early and a late layer of a stacked leaf."""
    params = DECODER.init(jax.random.key(0))
    path = ("layers", "self_attn", "v_proj", "weight")
    batch = decoder_batch()
    objective = policy_gradient(DECODER, temperature=1.0, clip=Clip(0.9, 9.0))
    each = token_gradients(objective, params, {}, batch, path, (layer,))
    assert each.shape == (6, 4, 8)
    total = jnp.einsum("n,nij->ij", batch.weights.reshape(-1), each)
    gradient = jax.grad(objective, has_aux=True)(params, {}, batch)[0]
    expected = gradient["layers"]["self_attn"]["v_proj"]["weight"][layer]
    np.testing.assert_allclose(total, expected, rtol=1e-4, atol=1e-6)
    assert (each[0] == 0).all()  # No target.
    assert all((np.asarray(each[i]) != 0).any() for i in (1, 2, 4, 5))


def test_against_finite_differences():
    with jax.enable_x64(True):
        model = TableModel(6, np.float64)
        objective = cross_entropy(model)
        params = table_params(1, 6, 3, np.float64)
        batch = random_batch(0, 6, rows=2, length=4, dtype=np.float64)
        got = token_gradients(objective, params, {}, batch, ("head",))
        step, direction = 1e-5, np.random.default_rng(3).standard_normal((6, 3))
        for row, slot in ((0, 2), (1, 3)):
            alone = jnp.zeros_like(batch.weights).at[row, slot].set(1.0)

            def loss(sign, alone=alone):
                moved = params | {"head": params["head"] + sign * step * direction}
                return float(objective(moved, {}, batch._replace(weights=alone))[0])

            expected = (loss(1) - loss(-1)) / (2 * step)
            product = float((got[row * 4 + slot] * direction).sum())
            assert product == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    ("path", "index", "message"),
    [
        (("tables",), (), "no parameter tables"),
        (("head", "weight"), (), "no parameter head.weight"),
        ((), (), "is no parameter but a group"),
        (("head",), (0,), "leaves no matrix"),
    ],
)
def test_what_is_no_matrix_is_refused(path, index, message):
    batch = make_batch([[0, 1]], [[0.0, 1.0]])
    params = log_prob_params(np.zeros((2, 2), np.float32))
    with pytest.raises(ValueError, match=message):
        token_gradients(cross_entropy(TableModel(2)), params, {}, batch, path, index)
