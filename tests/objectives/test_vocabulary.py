"""Chunking over tokens: the values, the gradients and the memory it takes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from table_model import TableModel, log_prob_params, random_batch, table_params

from geomjax.meshes import Placement, mesh_from_string
from geomjax.objectives.distill import full_vocabulary, sampled_token
from geomjax.objectives.divergence import jsd, reverse_kl
from geomjax.objectives.sft import cross_entropy
from geomjax.objectives.top_k import top_k
from geomjax.objectives.vocabulary import (
    logits,
    map_token_chunks,
    pick,
    token_log_probs,
)

MODEL = TableModel(9)


def objectives(chunk_tokens):
    return {
        "cross_entropy": cross_entropy(MODEL, chunk_tokens=chunk_tokens),
        "sampled_token": sampled_token(
            MODEL, MODEL, temperature=0.7, clip=0.2, chunk_tokens=chunk_tokens
        ),
        "full_vocabulary": full_vocabulary(
            MODEL, MODEL, jsd(0.3), temperature=0.7, chunk_tokens=chunk_tokens
        ),
    }


def test_log_probabilities_by_hand():
    probabilities = np.array([[0.1, 0.9], [0.5, 0.5]])
    params = log_prob_params(np.log(probabilities).astype(np.float32))
    model = TableModel(2)
    got = token_log_probs(
        model,
        params,
        params["table"][jnp.array([[0, 0, 1]])],
        jnp.array([[0, 1, 1]]),
        temperature=1.0,
    )
    np.testing.assert_allclose(got, np.log([[0.1, 0.9, 0.5]]), rtol=1e-5)
    halved = token_log_probs(
        model,
        params,
        params["table"][jnp.array([[0]])],
        jnp.array([[1]]),
        temperature=0.5,
    )
    np.testing.assert_allclose(halved, [[np.log(0.81 / 0.82)]], rtol=1e-4)


def test_logits_are_float32_of_a_bfloat16_model():
    params = table_params(0, 9, 4)
    narrow = MODEL._replace(dtype=jnp.bfloat16, precision=jax.lax.Precision.DEFAULT)
    hidden = params["table"].astype(jnp.bfloat16)
    got = logits(narrow, params["head"], hidden, 1.0)
    assert got.dtype == jnp.float32
    exact = (
        hidden.astype(jnp.float32)
        @ params["head"].astype(jnp.bfloat16).astype(jnp.float32).T
    )
    np.testing.assert_allclose(got, exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["cross_entropy", "sampled_token", "full_vocabulary"])
def test_chunks_change_neither_value_nor_gradient(name):
    params, context = table_params(0, 9, 4), table_params(1, 9, 4)
    batch = random_batch(2, 9, rows=3, length=5)  # 12 targets.
    run = {
        size: jax.jit(jax.value_and_grad(objectives(size)[name], has_aux=True))
        for size in (1, 5, 6, 100)
    }
    expected = run.pop(100)(params, context, batch)
    for size, function in run.items():
        got = function(params, context, batch)
        jax.tree.map(
            lambda a, b, size=size: np.testing.assert_allclose(
                a, b, rtol=1e-5, atol=1e-6, err_msg=f"chunks of {size}"
            ),
            got,
            expected,
        )


@pytest.mark.parametrize(
    ("mesh", "chunk_tokens"),
    [("data=8", 1), ("data=2,fsdp=2,tensor=2", 1), ("data=2,fsdp=2,tensor=2", 100)],
)
def test_a_split_vocabulary_changes_neither_value_nor_gradient(mesh, chunk_tokens):
    """9 tokens over four devices: the vocabulary is padded, and padding is no token."""
    params, context = table_params(0, 9, 4), table_params(1, 9, 4)
    batch = random_batch(2, 9, rows=8, length=5)
    split = MODEL._replace(placement=Placement(mesh_from_string(mesh)))

    def losses(model, chunk_tokens):
        sizes = {"temperature": 0.7, "chunk_tokens": chunk_tokens}
        likely = {"k": 3, "support": "student", "tail": "bucket"}
        each = (
            cross_entropy(model, chunk_tokens=chunk_tokens),
            sampled_token(model, model, clip=0.2, **sizes),
            full_vocabulary(model, model, jsd(0.3), **sizes),
            top_k(model, model, reverse_kl, **likely, **sizes),
        )
        return lambda *inputs: sum(each[i](*inputs)[0] * (i + 1) for i in range(4))

    expected = jax.jit(jax.value_and_grad(losses(MODEL, 100)))(params, context, batch)
    program = jax.jit(jax.value_and_grad(losses(split, chunk_tokens)))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
        program(params, context, batch),
        expected,
    )


def test_what_a_mesh_picks_is_the_score_itself():
    """Bit by bit, and so is its gradient; no part of the scores is indexed."""
    placement = Placement(mesh_from_string("data=2,fsdp=4"))
    scores = jax.random.normal(jax.random.key(0), (6, 16)).at[:, 9:].set(-1e30)
    target = jnp.asarray([0, 8, 3, 3, 7, 1], jnp.int32)
    weights = jnp.arange(1.0, 7.0)

    def weighted(scores, *place):
        return (weights * pick(scores, target, *place)).sum()

    np.testing.assert_array_equal(pick(scores, target, placement), pick(scores, target))
    got, expected = (jax.grad(weighted)(scores, *place) for place in ((placement,), ()))
    np.testing.assert_array_equal(got, expected)
    text = jax.jit(jax.grad(weighted), static_argnums=1).lower(scores, placement)
    assert "scatter" not in text.as_text()


def test_each_chunk_sees_its_own_slices():
    left, right = jnp.arange(7.0), jnp.arange(7.0)[::-1] * 10
    got = map_token_chunks(lambda a, b: a + b, (left, right), 3)
    np.testing.assert_array_equal(got, left + right)


def temporary_bytes(chunk_tokens, tokens, vocab_size):
    """Temporary memory of the gradient of a distillation loss, from its compilation."""
    model = TableModel(vocab_size)
    objective = full_vocabulary(
        model, model, reverse_kl, temperature=1.0, chunk_tokens=chunk_tokens
    )
    weight = jax.ShapeDtypeStruct((vocab_size, 8), jnp.float32)
    params = {"table": weight, "head": weight}
    batch = jax.eval_shape(lambda: random_batch(0, vocab_size, 2, tokens // 2 + 1))
    gradient = jax.jit(jax.grad(objective, has_aux=True))
    analysis = gradient.lower(params, params, batch).compile().memory_analysis()
    return analysis.temp_size_in_bytes


def test_no_more_than_a_chunk_of_logits_exists():
    tokens, vocab_size = 4096, 4096
    one_array = 4 * tokens * vocab_size  # [N, V] float32, 64 MiB.
    chunked = temporary_bytes(128, tokens, vocab_size)
    assert chunked < one_array / 4
    assert temporary_bytes(tokens, tokens, vocab_size) > one_array
