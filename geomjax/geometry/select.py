"""Order statistics by bit pattern: the k-th smallest of millions, without sorting.

Non-negative floats compare as their bit patterns do, so a quantile is found by counting
16 bits at a time: one histogram for bfloat16 values, two for anything else. On a CPU
that is 20 times faster than a sort. The histograms are JAX's, of a block at a time;
where the k-th entry lies in their sum is a matter of 65,536 numbers, in NumPy.
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int, UInt32

from geomjax.geometry.blocks import drop_stale

LEVEL_BITS = 16
LEVEL_BINS = 1 << LEVEL_BITS
FINE_KEY_BITS = 28
_FINITE_BINS = 0x7F80
"""Upper 16 bits of infinity in float32."""
_SINGLE_MANTISSA = 23
_CHUNK = 1 << 14


class Cut(NamedTuple):
    """Where the k-th smallest key lies, and how many keys lie around it.

    Attributes:
        threshold: the k-th smallest key.
        below: number of keys smaller than it, below k.
        tied: number of keys equal to it, at least 1; `below + tied` is at least k.
    """

    threshold: UInt32[np.ndarray, "*p"] | Int[np.ndarray, "*p"]
    below: Int[np.ndarray, "*p"]
    tied: Int[np.ndarray, "*p"]


def magnitude_key(x: Float[Array, "*s"]) -> UInt32[Array, "*s"]:
    """The 31 bits of |x| in float32, which order like it and tie where it does."""
    return lax.bitcast_convert_type(jnp.abs(x).astype(jnp.float32), jnp.uint32)


def fine_key(x: Float[Array, "*s"], bound: Float[Array, "*b"]) -> UInt32[Array, "*s"]:
    """28-bit keys that order like |x| below a bound.

    They keep 23 bits of mantissa over the 32 octaves below the bound, so that values
    tie when they agree to 1.2e-7 relative.

    Args:
        x: values.
        bound: no less than |x|, of the same dtype and number of axes.

    Returns:
        The keys, below `2 ** FINE_KEY_BITS`.
    """
    bits = jnp.uint32 if x.dtype == jnp.float32 else jnp.uint64
    surplus = jnp.asarray(jnp.finfo(x.dtype).nmant - _SINGLE_MANTISSA, bits)
    top = lax.bitcast_convert_type(bound, bits) >> surplus
    window = jnp.asarray((1 << FINE_KEY_BITS) - 1, bits)
    base = jnp.where(top > window, top - window, jnp.zeros_like(top))
    keys = lax.bitcast_convert_type(jnp.abs(x), bits) >> surplus
    return (jnp.clip(keys, base, base + window) - base).astype(jnp.uint32)


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
    """`histogram` as a scatter-add for each row.

    One at a time: the bins of several rows would not fit a core's cache, where four
    rows of 2^16 bins take 20 ns an entry and one takes 5 for all four.
    """
    *batch, n = index.shape

    def row(x):
        counts = jnp.zeros(bins, jnp.int32)
        return counts.at[x].add(1, mode="promise_in_bounds")

    rows = index.reshape(-1, n)
    counts = row(rows[0])[None] if len(rows) == 1 else lax.map(row, rows)
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


def count_level(
    keys: UInt32[Array, "*p r b"], fresh: Bool[Array, "..."] | None, bits: int = 32
) -> Int[Array, "*p bins"]:
    """Histogram of the upper 16 bits of a block's keys.

    Args:
        keys: keys of a block.
        fresh: columns that count, see `drop_stale`.
        bits: width of the keys.
    """
    upper = (keys >> (bits - LEVEL_BITS)).astype(jnp.int32)
    index = drop_stale(upper, fresh, LEVEL_BINS)
    flat = index.reshape(*index.shape[:-2], -1)
    return histogram(flat, LEVEL_BINS + 1)[..., :LEVEL_BINS]


def count_inside(
    keys: UInt32[Array, "*p r b"],
    bins: Int[Array, "*p q"],
    fresh: Bool[Array, "..."] | None,
) -> Int[Array, "*p q bins"]:
    """Histograms of the lower 16 bits of 32-bit keys, of those in each given bin."""
    upper = (keys >> LEVEL_BITS).astype(jnp.int32)
    lower = drop_stale((keys & (LEVEL_BINS - 1)).astype(jnp.int32), fresh, LEVEL_BINS)

    def one(bin_):
        index = jnp.where(upper == bin_[..., None, None], lower, LEVEL_BINS)
        flat = index.reshape(*index.shape[:-2], -1)
        return histogram(flat, LEVEL_BINS + 1)[..., :LEVEL_BINS]

    if bins.shape[-1] == 1:
        return one(bins[..., 0])[..., None, :]
    return jnp.moveaxis(lax.map(one, jnp.moveaxis(bins, -1, 0)), 0, -2)


def locate(counts: Int[np.ndarray, "*c bins"], k: Int[np.ndarray, "*p q"]) -> Cut:
    """The bin that holds the k-th entry, the entries below it, and those in it.

    Args:
        counts: histograms, for all q alike if they have no axis for them.
        k: positions, from 1 to the number of entries.

    Returns:
        A `Cut` whose thresholds are bins, in int64.
    """
    total = np.cumsum(counts, axis=-1, dtype=np.int64)
    if total.ndim == k.ndim:
        total = np.broadcast_to(total[..., None, :], (*k.shape, total.shape[-1]))
    # Past the last one where there are no entries: what fills a stack up.
    bin_ = np.minimum(np.sum(total < k[..., None], axis=-1), total.shape[-1] - 1)
    upto = np.take_along_axis(total, bin_[..., None], axis=-1)[..., 0]
    before = np.take_along_axis(total, np.maximum(bin_ - 1, 0)[..., None], axis=-1)
    below = np.where(bin_ > 0, before[..., 0], 0)
    return Cut(bin_, below, upto - below)


def magnitudes() -> Float[np.ndarray, " finite"]:
    """The finite bfloat16 magnitudes, ascending: those of the first bins."""
    bits = np.arange(_FINITE_BINS, dtype=np.uint32) << np.uint32(LEVEL_BITS)
    return bits.view(np.float32).astype(np.float64)


def upto(
    counts: Int[np.ndarray, "p bins"], limits: Float[np.ndarray, "p t"]
) -> Int[np.ndarray, "p t"]:
    """Entries of bfloat16 values with `|x| <= limit`, from their histogram.

    Args:
        counts: `count_level` of `magnitude_key`, summed.
        limits: for each row.
    """
    total = np.cumsum(counts[:, :_FINITE_BINS], axis=-1, dtype=np.int64)
    total = np.pad(total, ((0, 0), (1, 0)))
    bins = np.searchsorted(magnitudes(), limits, side="right")
    return np.take_along_axis(total, bins, axis=-1)


def refine(
    level: Cut, k: Int[np.ndarray, "*p q"], counts: Int[np.ndarray, "*p q bins"] | None
) -> Cut:
    """The k-th smallest key, inside the bin of its upper bits that `locate` found.

    Args:
        level: that bin.
        k: positions, from 1.
        counts: from `count_inside`; None where the low 16 bits of every key are zero,
            as for bfloat16 values.
    """
    upper = level.threshold.astype(np.uint32) << np.uint32(LEVEL_BITS)
    if counts is None:
        return level._replace(threshold=upper)
    low, further, tied = locate(counts, k - level.below)
    return Cut(upper | low.astype(np.uint32), level.below + further, tied)
