"""Attention in blocks of queries is attention."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from geomjax.models.attention import dot_product_attention
from geomjax.models.chunked_attention import chunked_attention


@pytest.mark.parametrize("chunk", [4, 5, 64])
def test_values_and_gradients_are_those_of_whole_attention(chunk):
    rng = np.random.default_rng(0)
    batch, length, heads, groups, size = 2, 12, 4, 2, 8

    def draw(count):
        return jnp.asarray(rng.normal(size=(batch, length, count, size)), jnp.float32)

    query, key, value = draw(heads), draw(groups), draw(groups)
    mask = jnp.asarray(np.tri(length, dtype=bool))[None, None].repeat(batch, axis=0)
    weights = draw(heads)

    def loss(attention, *arrays):
        out = attention(*arrays, mask, jax.lax.Precision.HIGHEST)
        return (out * weights).sum(), out

    def chunked(*arguments):
        return chunked_attention(*arguments, chunk=chunk)

    of = [
        jax.grad(lambda *a, f=f: loss(f, *a), argnums=(0, 1, 2), has_aux=True)
        for f in (dot_product_attention, chunked)
    ]
    expected, got = (f(query, key, value) for f in of)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
        got,
        expected,
    )
