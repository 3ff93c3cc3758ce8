"""Attention and its written-out gradient against JAX's own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from geomjax.models.attention import dot_product_attention
from geomjax.models.layers import gate
from geomjax.models.masks import Visible

HIGHEST = jax.lax.Precision.HIGHEST


def arrays(heads, groups, queries=5, keys=7):
    generator = np.random.default_rng(heads)

    def normal(*shape):
        return jnp.asarray(generator.standard_normal(shape), jnp.float32)

    mask = generator.random((2, 1, queries, keys)) < 0.6
    mask[..., 0] = True
    shapes = (queries, heads, 4), (keys, groups, 4), (keys, groups, 4)
    return [normal(2, *shape) for shape in shapes], jnp.asarray(mask)


def by_jax(query, key, value, mask):
    with jax.default_matmul_precision("highest"):
        return jax.nn.dot_product_attention(query, key, value, mask=mask)


@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (6, 2), (3, 1)])
def test_values_and_gradients_are_those_of_jax(heads, groups):
    inputs, mask = arrays(heads, groups)

    def with_gradients(attend):
        def loss(*inputs):
            out = attend(*inputs)
            return jnp.sin(out).sum(), out

        return jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(*inputs)

    got = with_gradients(lambda *x: dot_product_attention(*x, Visible(mask), HIGHEST))
    expected = with_gradients(lambda *x: by_jax(*x, mask))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5),
        got,
        expected,
    )


def test_a_query_that_sees_nothing_has_finite_gradients():
    inputs, mask = arrays(2, 1)
    mask = mask.at[0, 0, 0].set(False)
    loss = lambda *x: dot_product_attention(*x, Visible(mask), HIGHEST).sum()  # noqa: E731
    for gradient in jax.grad(loss, (0, 1, 2))(*inputs):
        assert np.isfinite(gradient).all()


def test_large_scores_do_not_overflow():
    inputs, mask = arrays(2, 2)
    query, key, value = inputs
    got = dot_product_attention(1e3 * query, key, value, Visible(mask), HIGHEST)
    np.testing.assert_allclose(
        got, by_jax(1e3 * query, key, value, mask), rtol=1e-4, atol=1e-4
    )


def test_bfloat16_returns_bfloat16_gradients():
    inputs, mask = arrays(4, 2)
    low = [x.astype(jnp.bfloat16) for x in inputs]

    def loss(*x):
        return (
            dot_product_attention(*x, Visible(mask), HIGHEST).astype(jnp.float32).sum()
        )

    got, expected = jax.grad(loss, (0, 1, 2))(*low), jax.grad(loss, (0, 1, 2))(*inputs)
    for a, b in zip(got, expected, strict=True):
        assert a.dtype == jnp.bfloat16
        np.testing.assert_allclose(a.astype(jnp.float32), b, rtol=0.1, atol=0.1)


def test_the_gradient_of_the_gate_is_that_of_its_formula():
    x, up = (jnp.linspace(a, b, 13) for a, b in ((-30.0, 30.0), (2.0, -1.0)))
    formula = jax.grad(lambda x, up: (jax.nn.silu(x) * up).sum(), (0, 1))(x, up)
    written = jax.grad(lambda x, up: gate(x, up).sum(), (0, 1))(x, up)
    for a, b in zip(written, formula, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
