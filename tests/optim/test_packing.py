"""Packed coordinates go where they came from, block by block."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from geomjax.optim.packing import LANES, make_packing, pack, unpack, used


def _packing(mask, grid=None):
    return jax.tree.map(jnp.asarray, make_packing(np.asarray(mask), grid))


def test_a_packing_written_out():
    mask = [[False, True, True], [False, False, False], [True, False, True]]
    packing = _packing(mask)
    assert packing.columns.shape == (1, 1, LANES)
    np.testing.assert_array_equal(packing.columns[0, 0, :5], [1, 2, 0, 2, 0])
    np.testing.assert_array_equal(packing.offsets[0, 0], [0, 2, 2, 4])
    assert int(used(packing).sum()) == 4
    dense = jnp.arange(9.0).reshape(3, 3)
    packed = pack(packing, dense)
    np.testing.assert_array_equal(packed[0, 0, :5], [1, 2, 6, 8, 0])
    np.testing.assert_array_equal(
        unpack(packing, packed, (3, 3)), np.where(mask, dense, 0.0)
    )


def test_blocks_are_the_shards():
    mask = np.zeros((2, 4, 6), bool)
    mask[1, 3, 4:] = True
    packing = _packing(mask, (1, 2, 3))
    assert packing.columns.shape == (1, 2, 3, LANES)
    np.testing.assert_array_equal(packing.offsets[..., -1], [[[0, 0, 0], [0, 0, 2]]])
    np.testing.assert_array_equal(packing.columns[0, 1, 2, :2], [0, 1])


@st.composite
def _masks(draw):
    grid = draw(st.lists(st.integers(1, 3), min_size=0, max_size=4))
    shape = tuple(n * draw(st.integers(1, 4)) for n in grid)
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    return rng.random(shape) < draw(st.sampled_from((0.0, 0.2, 0.7, 1.0))), grid


@settings(max_examples=15, deadline=None)
@given(_masks())
def test_packing_and_unpacking(drawn):
    mask, grid = drawn
    packing = _packing(mask, grid)
    dense = jnp.asarray(np.random.default_rng(0).normal(size=mask.shape), jnp.float32)
    packed = pack(packing, dense)
    assert packed.shape == packing.columns.shape == (*grid, packed.shape[-1])
    assert packed.shape[-1] % LANES == 0
    np.testing.assert_array_equal(used(packing).sum(), mask.sum())
    np.testing.assert_array_equal(packed[~used(packing)], 0)
    np.testing.assert_array_equal(
        unpack(packing, packed, mask.shape), np.where(mask, dense, 0.0)
    )


@pytest.mark.parametrize(("columns", "kind"), [(65536, np.uint16), (65537, np.int32)])
def test_long_rows_have_wider_indices(columns, kind):
    mask = np.zeros((2, columns), bool)
    mask[1, -1] = True
    packing = _packing(mask)
    assert packing.columns.dtype == kind
    assert int(packing.columns[0, 0, 0]) == columns - 1
    packed = pack(packing, jnp.asarray(mask, jnp.float32))
    np.testing.assert_array_equal(unpack(packing, packed, mask.shape), mask)


def test_masks_longer_than_a_chunk_are_read_in_parts(monkeypatch):
    mask = np.random.default_rng(0).random((50, 7)) < 0.4
    whole = make_packing(mask)
    monkeypatch.setattr("geomjax.optim.packing._CHUNK", 20)
    jax.tree.map(np.testing.assert_array_equal, make_packing(mask), whole)
