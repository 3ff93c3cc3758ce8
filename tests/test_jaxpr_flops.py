"""Operations counted from the jaxpr, against counts by hand."""

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl

from geomjax.jaxpr_flops import matmul_flops
from geomjax.meshes import mesh_from_string

W = jnp.ones((8, 8))
X = jnp.ones((4, 8))
ONCE = 2 * 4 * 8 * 8


def _count(function, *arguments):
    return matmul_flops(jax.make_jaxpr(function)(*arguments))


def test_products_and_batches():
    assert _count(lambda x, w: x @ w, X, W) == ONCE
    batched = jnp.einsum
    left, right = jnp.ones((3, 4, 5)), jnp.ones((3, 5, 6))
    count = _count(lambda a, b: batched("bij,bjk->bik", a, b), left, right)
    assert count == 2 * 3 * 4 * 5 * 6
    assert _count(lambda x: jnp.sin(x).sum(), X) == 0


def test_a_convolution():
    image, kernel = jnp.ones((2, 3, 10, 10)), jnp.ones((7, 3, 3, 3))

    def convolve(image, kernel):
        return jax.lax.conv(image, kernel, (1, 1), "VALID")

    assert _count(convolve, image, kernel) == 2 * (2 * 7 * 8 * 8) * (3 * 3 * 3)


def test_loops_count_as_often_as_they_run():
    def scanned(x, w):
        return jax.lax.scan(lambda c, _: (c @ w, None), x, length=5)[0]

    assert _count(scanned, X, W) == 5 * ONCE
    nested = lambda x, w: jax.lax.fori_loop(0, 3, lambda _, c: scanned(c, w), x)  # noqa: E731
    assert _count(nested, X, W) == 15 * ONCE

    def until(x, w):
        def go_on(carry):
            return (carry[0] < 11) & (carry[1].sum() > 0)

        return jax.lax.while_loop(go_on, lambda c: (c[0] + 1, c[1] @ w), (0, x))

    assert _count(until, X, W) == 11 * ONCE


def test_a_loop_of_unknown_length_is_refused():
    def until(x, w):
        return jax.lax.while_loop(lambda c: c.sum() > 0.5, lambda c: c @ w, x)

    with pytest.raises(ValueError, match="its length is not known"):
        _count(until, X, W)


def test_gradients_and_recomputation():
    def loss(x, w):
        return jnp.sin(jnp.sin(x @ w) @ w).sum()

    # Two products forward; backward two for the weights, and one each to go on.
    assert _count(jax.grad(loss, argnums=(0, 1)), X, W) == 6 * ONCE
    # Recomputation adds the first product again, the second's value is not needed.
    assert _count(jax.grad(jax.checkpoint(loss), argnums=(0, 1)), X, W) in (
        7 * ONCE,
        8 * ONCE,
    )


def test_branches_calls_and_shards():
    def branch(x, w):
        return jax.lax.cond(x[0, 0] > 0, lambda: x @ w @ w, lambda: x @ w)

    assert _count(branch, X, W) == 2 * ONCE
    assert _count(jax.jit(jax.jit(lambda x, w: x @ w)), X, W) == ONCE
    mesh = mesh_from_string("data=4,tensor=2")
    spec = jax.P("data")
    local = jax.shard_map(
        lambda x, w: x @ w, mesh=mesh, in_specs=(spec, jax.P()), out_specs=spec
    )
    # Over "tensor" the same product is computed twice.
    assert _count(local, X, W) == 2 * ONCE


def test_a_kernel_counts_for_each_step_of_its_grid():
    def kernel(x, w, out):
        out[...] = x[...] @ w[...]

    call = pl.pallas_call(
        kernel,
        grid=(3,),
        in_specs=[
            pl.BlockSpec((4, 8), lambda i: (i, 0)),
            pl.BlockSpec((8, 8), lambda i: (0, 0)),
        ],
        out_specs=pl.BlockSpec((4, 8), lambda i: (i, 0)),
        out_shape=jax.ShapeDtypeStruct((12, 8), jnp.float32),
    )
    assert _count(call, jnp.ones((12, 8)), W) == 3 * ONCE
