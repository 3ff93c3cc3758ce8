"""Chosen coordinates of one array, side by side: compressed rows of a mask."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, UInt

LANES = 128
"""Capacities are multiples of it: the width of a TPU register, which pads to it."""

# A gather is a loop over this many parts of the places; it divides LANES. What a loop
# reads, XLA first writes to memory, where it would otherwise compute it again inside
# the gather and in every other place, rounding here and there differently.
_PARTS = 4

# Elements of a mask that are looked through at a time: bounds the index arrays of
# numpy.nonzero, 16 bytes a coordinate, to some hundred megabytes.
_CHUNK = 1 << 23


class Packing(NamedTuple):
    """Where the chosen coordinates of an array are, as compressed sparse rows.

    An array `[d_1, ..., d_n]` is cut into a grid of equal blocks, one for each shard on
    a mesh and a single one on one device. A block is a stack of rows of its last axis;
    its chosen coordinates follow each other row by row, in `K` places, as many as the
    fullest block needs, rounded up to `LANES`. Rows and columns are indexed apart, so
    that an array may have more than 2**31 elements.

    The axes of the grid are those of the array, in its order: the `PartitionSpec` of
    the array lays out what is packed, too.

    Attributes:
      columns: for each place the column within its block's row, uint16 where rows are
        short enough; 0 in places not used.
      offsets: for each row the first of its places; the last entry is the number of
        places in use.
    """

    columns: UInt[Array, "*grid K"] | Int[Array, "*grid K"]
    offsets: Int[Array, "*grid rows_and_one"]


def make_packing(
    mask: Bool[np.ndarray, "*shape"], grid: Sequence[int] | None = None
) -> Packing:
    """Packs the True coordinates of a mask, on the host.

    Args:
      mask: any shape.
      grid: number of blocks along each axis, which it divides; None for one block.

    Returns:
      The packing, in NumPy arrays.

    Raises:
      ValueError: a block has 2**31 chosen coordinates or more.
    """
    blocks = _to_blocks(mask, (1,) * mask.ndim if grid is None else tuple(grid))
    *grid_shape, rows, columns = blocks.shape
    blocks = blocks.reshape(-1, rows, columns)
    offsets: Any = np.zeros((len(blocks), rows + 1), np.int64)
    np.cumsum(np.count_nonzero(blocks, axis=-1), axis=-1, out=offsets[:, 1:])
    most = int(offsets[:, -1].max(initial=0))
    if most > np.iinfo(np.int32).max:
        raise ValueError(
            f"{most} chosen coordinates in a block of {rows} x {columns}, expected"
            " fewer than 2**31; split the array over more devices"
        )
    capacity = -(-most // LANES) * LANES
    kind = np.uint16 if columns <= 1 << 16 else np.int32
    packed: Any = np.zeros((len(blocks), capacity), kind)
    step = max(1, _CHUNK // max(columns, 1))
    for block, first, places in zip(blocks, offsets, packed, strict=True):
        for row in range(0, rows, step):
            found = np.nonzero(block[row : row + step])[1]
            places[first[row] : first[row] + len(found)] = found
    return Packing(
        packed.reshape(*grid_shape, capacity),
        offsets.astype(np.int32).reshape(*grid_shape, rows + 1),
    )


def pack(packing: Packing, dense: Array) -> Array:
    """The chosen coordinates of an array, `[*grid, K]`; 0 in places not used."""
    grid = packing.columns.shape[:-1]
    places = (*grid, _PARTS, -1)
    rows = _over_grid(_rows, grid)(*packing).reshape(places)
    columns = packing.columns.reshape(places)

    def gather(block, rows, columns):
        return block.at[rows, columns.astype(jnp.int32)].get(
            mode="fill", fill_value=0, unique_indices=True, indices_are_sorted=True
        )

    def part(index):
        return _over_grid(gather, grid)(_to_blocks(dense, grid), *index)

    parts = jax.lax.map(part, (jnp.moveaxis(rows, -2, 0), jnp.moveaxis(columns, -2, 0)))
    return jnp.moveaxis(parts, 0, -2).reshape(packing.columns.shape)


def unpack(packing: Packing, packed: Array, shape: Sequence[int]) -> Array:
    """An array with the packed values in their coordinates and 0 in all others."""

    def scatter(values, columns, offsets):
        block = jnp.zeros((offsets.shape[-1] - 1, width), packed.dtype)
        index = _rows(columns, offsets), columns.astype(jnp.int32)
        return block.at[index].set(
            values, mode="drop", unique_indices=True, indices_are_sorted=True
        )

    grid = packing.columns.shape[:-1]
    width = _block_shape(shape, grid)[-1]
    return _from_blocks(_over_grid(scatter, grid)(packed, *packing), grid, shape)


def used(packing: Packing) -> Bool[Array, "*grid K"]:
    """Which places hold a coordinate."""
    shape = packing.columns.shape
    places = jax.lax.broadcasted_iota(jnp.int32, shape, len(shape) - 1)
    return places < packing.offsets[..., -1:]


def _rows(columns: Array, offsets: Array) -> Int[Array, " K"]:
    """The row of each place; unused ones count on from the number of rows."""
    places, count = columns.shape[-1], offsets.shape[-1] - 1
    starts = jnp.zeros(places, jnp.int32).at[offsets[1:]].add(1, mode="drop")
    beyond = jnp.arange(places, dtype=jnp.int32) - offsets[-1]
    return jnp.where(beyond < 0, jnp.cumsum(starts), count + beyond)


def _over_grid(function: Any, grid: Sequence[int]) -> Any:
    for _ in grid:
        function = jax.vmap(function)
    return function


def _block_shape(shape: Sequence[int], grid: Sequence[int]) -> tuple[int, ...]:
    block = tuple(size // parts for size, parts in zip(shape, grid, strict=True))
    return block or (1,)


def _to_blocks(array: Any, grid: Sequence[int]) -> Any:
    """`[*shape]` to `[*grid, rows, columns]`, of NumPy or JAX."""
    block = _block_shape(array.shape, grid)
    if array.ndim:
        pairs = [n for pair in zip(grid, block, strict=True) for n in pair]
        array = array.reshape(pairs)
        array = array.transpose(*range(0, len(pairs), 2), *range(1, len(pairs), 2))
    return array.reshape(*grid, math.prod(block[:-1]), block[-1])


def _from_blocks(blocks: Array, grid: Sequence[int], shape: Sequence[int]) -> Array:
    if not shape:
        return blocks.reshape(())
    n = len(shape)
    apart = blocks.reshape(*grid, *_block_shape(shape, grid))
    order = [
        axis for pair in zip(range(n), range(n, 2 * n), strict=True) for axis in pair
    ]
    return apart.transpose(order).reshape(shape)
