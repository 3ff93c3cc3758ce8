"""Factors, energies and angles against float64 NumPy, in blocks and over shards."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from geomjax.geometry import blocks
from geomjax.geometry.factor import factor, is_defined, singular_values
from geomjax.geometry.subspace import (
    angles,
    long_sines,
    nested_residuals,
    short_sines,
)


def _spectra():
    rng = np.random.default_rng(0)
    outer = np.outer(rng.standard_normal(30), rng.standard_normal(50))
    repeated = np.linalg.qr(rng.standard_normal((50, 30)))[0].T
    return {
        "random": rng.standard_normal((30, 50)),
        "tall": rng.standard_normal((50, 30)),
        "zero": np.zeros((30, 50)),
        "rank one": outer,
        "repeated": repeated,
        "row": rng.standard_normal((1, 50)),
        "column": rng.standard_normal((50, 1)),
    }


@pytest.mark.parametrize("name", _spectra())
def test_singular_values(name):
    x = _spectra()[name]
    expected = np.linalg.svd(x, compute_uv=False)
    with jax.enable_x64(True):
        values = np.asarray(singular_values(jnp.asarray(x)))
        turned = np.asarray(singular_values(jnp.asarray(x.T)))
    # sqrt(eps) sigma_1 at the bottom of the spectrum, see the module's docstring.
    bound = 1e-7 * expected[0]
    np.testing.assert_allclose(values, expected, rtol=0, atol=bound)
    np.testing.assert_allclose(turned, expected, rtol=0, atol=bound)


def test_defined_subspaces():
    with jax.enable_x64(True):
        values = jnp.asarray([3.0, 2.0, 2.0, 1e-12])
        assert [bool(is_defined(values, k)) for k in (1, 2, 3, 4)] == [
            True,
            False,
            True,
            False,
        ]


def test_small_angles_come_from_the_sine_side():
    rng = np.random.default_rng(2)
    a, rest = np.split(np.linalg.qr(rng.standard_normal((40, 20)))[0].T, 2)
    turn = 1e-9
    b = np.cos(turn) * a + np.sin(turn) * rest
    with jax.enable_x64(True):
        found = np.asarray(angles(short_sines(jnp.asarray(a), jnp.asarray(b))))
    np.testing.assert_allclose(found, turn, rtol=1e-6)


def test_nested_ranks_give_the_residuals_of_each_rank():
    rng = np.random.default_rng(4)
    a = np.linalg.qr(rng.standard_normal((40, 9)))[0].T
    b = np.linalg.qr(a.T + 1e-6 * rng.standard_normal((40, 9)))[0].T
    for k, residual in zip([2, 5, 9], nested_residuals(a, b, [2, 5, 9]), strict=True):
        outside = b[:k] - (b[:k] @ a[:k].T) @ a[:k]
        expected = outside @ outside.T
        bound = 1e-9 * np.abs(expected).max()
        np.testing.assert_allclose(residual, expected, rtol=0, atol=bound)


def _measure(w, tuned, axis_name=None):
    """Everything that sums over the long side."""
    a = factor(w, 6, axis_name=axis_name)
    b = factor(tuned, 6, axis_name=axis_name)
    return (
        a.values,
        long_sines(w, tuned, a, b, [2, 6], axis_name=axis_name),
    )


def _pair(shape):
    rng = np.random.default_rng(3)
    w = rng.standard_normal(shape).astype(np.float32)
    moved = rng.random(shape) < 0.4
    return w, w + (0.02 * moved * rng.standard_normal(shape)).astype(np.float32)


@pytest.mark.parametrize("shape", [(200, 12), (12, 200)])
def test_blocks_and_shards_of_the_long_side_sum_to_the_whole(shape, monkeypatch):
    w, tuned = _pair(shape)
    axis = int(np.argmax(shape))
    spec = PartitionSpec(*("long" if i == axis else None for i in range(2)))
    mesh = jax.make_mesh((8,), ("long",), axis_types=(jax.sharding.AxisType.Auto,))
    with jax.enable_x64(True):
        whole = jax.jit(_measure)(w, tuned)
        sharded = jax.jit(
            jax.shard_map(
                partial(_measure, axis_name="long"),
                mesh=mesh,
                in_specs=(spec, spec),
                out_specs=PartitionSpec(),
                check_vma=False,
            )
        )(w, tuned)
        monkeypatch.setattr(blocks, "ONE_BLOCK", 1)
        monkeypatch.setattr(blocks, "block_length", lambda m, n: 37)
        blocked = jax.jit(lambda *x: _measure(*x))(w, tuned)
    for other in (sharded, blocked):
        for x, y in zip(jax.tree.leaves(whole), jax.tree.leaves(other), strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-9, atol=1e-12)
