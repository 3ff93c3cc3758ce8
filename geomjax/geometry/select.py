"""Order statistics by bit pattern: the k-th smallest of millions, without sorting.

Non-negative floats compare as their bit patterns do, so a quantile is found by counting
16 bits at a time: one histogram for bfloat16 values, two for anything else. On a CPU
that is 20 times faster than a sort.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, UInt32

LEVEL_BITS = 16
_BINS = 1 << LEVEL_BITS
_CHUNK = 1 << 14


class Cut(NamedTuple):
    """Where the k-th smallest key lies, and how many keys lie around it.

    Attributes:
        threshold: the k-th smallest key.
        below: number of keys smaller than it, below k.
        tied: number of keys equal to it, at least 1; `below + tied` is at least k.
    """

    threshold: UInt32[Array, "*p"]
    below: Int[Array, "*p"]
    tied: Int[Array, "*p"]


def magnitude_key(x: Float[Array, "*p n"]) -> UInt32[Array, "*p n"]:
    """32-bit keys that order like |x|.

    float32 keys are its 31 bits, so they tie where the values do. float64 keeps 27 bits
    of mantissa over 32 octaves below the largest entry of its row: values that agree
    to 4e-9 relative tie.
    """
    if x.dtype == jnp.float32:
        return lax.bitcast_convert_type(jnp.abs(x), jnp.uint32)
    bits = lax.bitcast_convert_type(jnp.abs(x), jnp.uint64) >> 25
    top = jnp.max(bits, axis=-1, keepdims=True)
    window = jnp.uint64((1 << 32) - 1)
    base = jnp.where(top > window, top - window, 0)
    return jnp.where(bits > base, bits - base, 0).astype(jnp.uint32)


def histogram(index: Int[Array, "*p n"], bins: int) -> Int[Array, "*p bins"]:
    """Counts of each index in [0, bins), for each row.

    A scatter on CPUs and GPUs; on TPUs, where scatters run one entry at a time, a
    product of one-hot matrices.

    Args:
        index: int32, at most 2^31 - 1 entries in all bins of all rows.
        bins: number of bins.

    Returns:
        int32 counts.
    """
    return lax.platform_dependent(
        index,
        tpu=lambda x: histogram_by_matmul(x, bins),
        default=lambda x: histogram_by_scatter(x, bins),
    )


def histogram_by_scatter(index: Int[Array, "*p n"], bins: int) -> Int[Array, "*p bins"]:
    """`histogram` as one scatter-add."""
    *batch, n = index.shape
    rows = index.reshape(-1, n)
    offset = jnp.arange(rows.shape[0], dtype=jnp.int32)[:, None] * bins
    counts = jnp.zeros(rows.shape[0] * bins, jnp.int32)
    flat = (rows + offset).reshape(-1)
    counts = counts.at[flat].add(1, mode="promise_in_bounds")
    return counts.reshape(*batch, bins)


def histogram_by_matmul(index: Int[Array, "*p n"], bins: int) -> Int[Array, "*p bins"]:
    """`histogram` as a product of one-hot matrices of the high and the low half."""
    *batch, n = index.shape
    rows = index.reshape(-1, n)
    low = max(1, 1 << ((bins - 1).bit_length() // 2))
    high = -(-bins // low)
    chunk = min(n, _CHUNK)
    padding = -n % chunk
    # The padding's high index matches no row of the one-hot matrix.
    rows = jnp.pad(rows, ((0, 0), (0, padding)), constant_values=high * low)
    chunks = rows.reshape(rows.shape[0], -1, chunk).swapaxes(0, 1)

    def add(counts, part):
        highs = (part // low)[:, :, None] == jnp.arange(high, dtype=jnp.int32)[
            None, None
        ]
        lows = (part % low)[:, :, None] == jnp.arange(low, dtype=jnp.int32)[None, None]
        product = jnp.einsum(
            "pch,pcl->phl",
            highs.astype(jnp.bfloat16),
            lows.astype(jnp.bfloat16),
            preferred_element_type=jnp.float32,
        )
        return counts + product.astype(jnp.int32), None

    start = jnp.zeros((rows.shape[0], high, low), jnp.int32)
    counts, _ = lax.scan(add, start, chunks)
    return counts.reshape(rows.shape[0], -1)[:, :bins].reshape(*batch, bins)


def kth_smallest(
    key: UInt32[Array, "*p n"], k: Int[Array, "*p q"], *, low_bits: bool = True
) -> Cut:
    """The k-th smallest key of each row, for several k at once.

    Args:
        key: keys, see `magnitude_key`.
        k: positions from 1 to n, int32, any number of them for each row.
        low_bits: False where the low 16 bits of every key are zero, as for bfloat16
            values in float32, which saves the second level.

    Returns:
        A `Cut` with one entry for each k.
    """
    high = (key >> LEVEL_BITS).astype(jnp.int32)
    high_bin, high_below, high_tied = _locate(histogram(high, _BINS)[..., None, :], k)
    if not low_bits:
        threshold = high_bin.astype(jnp.uint32) << LEVEL_BITS
        return Cut(threshold, high_below, high_tied)
    low = (key & (_BINS - 1)).astype(jnp.int32)

    def second_level(position):
        bin_, rest = position
        # Keys of other bins are counted in one more bin, which is dropped.
        inside = jnp.where(high == bin_[..., None], low, _BINS)
        return _locate(histogram(inside, _BINS + 1)[..., :_BINS], rest)

    positions = (jnp.moveaxis(high_bin, -1, 0), jnp.moveaxis(k - high_below, -1, 0))
    located = lax.map(second_level, positions)
    low_bin, below, tied = (jnp.moveaxis(part, 0, -1) for part in located)
    threshold = (high_bin.astype(jnp.uint32) << LEVEL_BITS) | low_bin.astype(jnp.uint32)
    return Cut(threshold, high_below + below, tied)


def _locate(
    counts: Int[Array, "*c bins"], k: Int[Array, "*p"]
) -> tuple[Int[Array, "*p"], Int[Array, "*p"], Int[Array, "*p"]]:
    """The bin that holds the k-th entry, the entries below it, and those in it."""
    total = jnp.cumsum(counts, axis=-1, dtype=jnp.int32)
    bin_ = jnp.sum(total < k[..., None], axis=-1, dtype=jnp.int32)
    total = jnp.broadcast_to(total, (*k.shape, total.shape[-1]))
    counts = jnp.broadcast_to(counts, total.shape)
    up_to = jnp.take_along_axis(total, bin_[..., None], axis=-1)[..., 0]
    tied = jnp.take_along_axis(counts, bin_[..., None], axis=-1)[..., 0]
    return bin_, up_to - tied, tied
