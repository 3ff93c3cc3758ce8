"""Rows of a cache that come and go: moved, taken and filled anew, in static shapes.

Every row's cached tokens stand together and end at `cache.length`, the slot that the
next token of all rows is written to; what a row attends to is decided by positions and
segment ids, so it does not matter where in the row they stand. Making room is then one
shift of the whole cache.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from geomjax.models.cache import Cache, LayerCache


def repack(
    cache: Cache, rows: Int[Array, " r"], length: Int[Array, ""], slots: int
) -> Cache:
    """The given rows of a cache, moved so that they end at `length`.

    Args:
      cache: Its rows hold at most `length` tokens each.
      rows: Which of its rows, in which order.
      length: Slots filled afterwards, at most `slots`.
      slots: Slots of the new cache, more or fewer than before.

    Returns:
      The cache; slots that held no token of a row are padding.
    """
    shift = length - cache.length

    def move(array, axis):
        array = jnp.take(array, rows, axis=0)
        wider = max(slots, array.shape[axis])
        room = [(0, 0)] * array.ndim
        room[axis] = (0, wider - array.shape[axis])
        moved = jnp.roll(jnp.pad(array, room), shift, axis=axis)
        return jax.lax.slice_in_dim(moved, 0, slots, axis=axis)

    layers = tuple(
        LayerCache(keys=move(layer.keys, 3), values=move(layer.values, 2))
        for layer in cache.layers
    )
    # What a roll brings round from the other end is no token.
    slot = jnp.arange(slots)
    inside = (slot >= shift) & (slot < length)
    segment_ids = jnp.where(inside[None], move(cache.segment_ids, 1), 0)
    return cache._replace(
        layers=layers,
        positions=move(cache.positions, 1),
        segment_ids=segment_ids,
        length=length,
    )


def fill_rows(cache: Cache, rows: Int[Array, " r"], newcomers: Cache) -> Cache:
    """Gives rows of a cache to the sequences of another.

    Args:
      cache: At least as many slots filled as `newcomers` has.
      rows: The row of each newcomer.
      newcomers: Their prompts, which end in its last slot.

    Returns:
      The cache; nothing is left of what the rows held.
    """
    width = newcomers.segment_ids.shape[1]
    start = cache.length - width

    def put(array, new, axis):
        slab = jax.lax.dynamic_slice_in_dim(array, start, width, axis=axis)
        slab = slab.at[rows].set(new)
        return jax.lax.dynamic_update_slice_in_dim(array, slab, start, axis=axis)

    layers = tuple(
        LayerCache(
            keys=put(old.keys, new.keys, 3), values=put(old.values, new.values, 2)
        )
        for old, new in zip(cache.layers, newcomers.layers, strict=True)
    )
    cleared = cache.segment_ids.at[rows].set(0)
    return cache._replace(
        layers=layers,
        positions=put(cache.positions, newcomers.positions, 1),
        segment_ids=put(cleared, newcomers.segment_ids, 1),
    )
