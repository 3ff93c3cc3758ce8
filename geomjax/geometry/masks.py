"""Where in the source the update lies: coverage by masks that W alone defines.

M_principal holds the ceil(density * mn) largest entries of the rank-k reconstruction
`|U_k S_k V_k^T|`, M_low the ceil(density * mn) smallest of |W|. The coverage of an
update's support A by a mask M is `|A and M| / |A|`, P1 eq. (24).

A mask by magnitude over bfloat16 weights ends inside thousands of tied entries. Its
size is exact here, and the coverage given is the mean over all ways to break the tie,
with the smallest and the largest beside it.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Shaped, UInt32

from geomjax.geometry.blocks import drop_stale, transpose
from geomjax.geometry.factor import Factors, Numbers, matmul
from geomjax.geometry.select import (
    FINE_KEY_BITS,
    LEVEL_BITS,
    fine_key,
    histogram,
    locate,
    magnitude_key,
)

_CLASSES = 9
_FINE_BITS = FINE_KEY_BITS - LEVEL_BITS
_CACHED = 128
"""Columns whose reconstruction, in float64, fits a core's cache."""
_JOINT = (2 + (1 << _FINE_BITS)) * _CLASSES


class SourceMask(NamedTuple):
    """A pair of masks: the rank of the reconstruction, and the share of entries."""

    rank: int
    density: float


class Coverage(NamedTuple):
    """Coverage of one update support; the last axis runs over the source masks.

    Attributes:
        principal: share of A in M_principal.
        low: share of A in M_low, the mean over tie-breaks.
        low_min: its least value over tie-breaks.
        low_max: its greatest.
        nonprincipal_or_low: share of A outside M_principal or in M_low, the mean.
        nonprincipal_or_low_min: its least value over tie-breaks of M_low.
        nonprincipal_or_low_max: its greatest.
    """

    principal: Float[Numbers, "*p n"]
    low: Float[Numbers, "*p n"]
    low_min: Float[Numbers, "*p n"]
    low_max: Float[Numbers, "*p n"]
    nonprincipal_or_low: Float[Numbers, "*p n"]
    nonprincipal_or_low_min: Float[Numbers, "*p n"]
    nonprincipal_or_low_max: Float[Numbers, "*p n"]


class Coverages(NamedTuple):
    """Coverage of the two supports, and of all entries, which is the chance level."""

    changed: Coverage
    changed_beyond: Coverage
    chance: Coverage


def principal_keys(
    factors: Factors, long: Float[Array, "*p k b"], ranks: Sequence[int]
) -> UInt32[Array, "*p q r b"]:
    """Keys of a block of `|U_k S_k V_k^T|` for several k, in one pass over them.

    Args:
        factors: factors of W.
        long: the block of the long side's vectors.
        ranks: each k.

    Returns:
        `fine_key` of each entry; entries of a reconstruction that agree to 1.2e-7
        relative tie.
    """
    # No entry of a reconstruction exceeds the largest singular value.
    tiny = jnp.finfo(factors.values.dtype).tiny
    bound = jnp.maximum(factors.values[..., :1, None], tiny)
    k = max(ranks)
    columns = transpose(factors.short[..., :k, :] * factors.values[..., :k, None])

    def whole(rows):
        rebuilt, known, keys = jnp.zeros((), rows.dtype), 0, {}
        for rank in sorted(set(ranks)):
            step = matmul(columns[..., known:rank], rows[..., known:rank, :])
            rebuilt = step if known == 0 else rebuilt + step
            keys[rank] = fine_key(rebuilt, bound)
            known = rank
        return jnp.stack([keys[rank] for rank in ranks], axis=-3)

    return lax.platform_dependent(
        long[..., :k, :], cpu=lambda rows: _by_columns(whole, rows), default=whole
    )


def _by_columns(
    f: Callable[[Array], Array], x: Float[Array, "*p k b"]
) -> Shaped[Array, "*s b"]:
    """`f(x)`, a few columns at a time: what is between them stays in a core's cache."""
    b = x.shape[-1]
    if b <= 2 * _CACHED:
        return f(x)
    out = jax.eval_shape(f, x)

    def step(i, out):
        # The last columns are computed twice where there is no whole number of parts.
        start = jnp.minimum(i * _CACHED, b - _CACHED)
        part = f(lax.dynamic_slice_in_dim(x, start, _CACHED, axis=-1))
        return lax.dynamic_update_slice_in_dim(out, part, start, axis=-1)

    parts = jnp.int32(-(-b // _CACHED))
    return lax.fori_loop(jnp.int32(0), parts, step, jnp.zeros(out.shape, out.dtype))


def joint_counts(
    keys: UInt32[Array, "*p q r b"],
    bins: Int[Array, "*p q"],
    source: Float[Array, "*p r b"],
    low_thresholds: UInt32[Array, "*p q"],
    delta: Float[Array, "*p r b"],
    atol: float,
    fresh: Bool[Array, "..."] | None,
) -> Int[Array, "*p q c"]:
    """Counts of a block's entries by mask and support, to be summed over blocks.

    An entry's class is its side of the low cut (3) and the supports that hold it (3).
    Entries are counted by class below and above the bin of the principal cut, and in it
    by the lower bits of their key too.

    Args:
        keys: from `principal_keys`.
        bins: upper bits of the principal cut of each mask.
        source: the block of W.
        low_thresholds: key of the low cut of each mask.
        delta: the block of D.
        atol: the second support is where |D| exceeds it.
        fresh: columns that count, see `drop_stale`.

    Returns:
        `2 * 9 + 4096 * 9` counts for each mask.
    """
    moved = jnp.abs(delta).astype(jnp.result_type(float))
    support = (moved > 0).astype(jnp.int32) + (moved > atol).astype(jnp.int32)
    magnitudes = magnitude_key(source)

    def one(mask):
        """One mask at a time, see `histogram_by_scatter`."""
        keys, bin_, low = mask
        kind = _side(magnitudes, low[..., None, None]) * 3 + support
        upper = (keys >> _FINE_BITS).astype(jnp.int32)
        lower = (keys & ((1 << _FINE_BITS) - 1)).astype(jnp.int32)
        bin_ = bin_[..., None, None]
        outside = jnp.where(upper > bin_, jnp.int32(_CLASSES), jnp.int32(0))
        index = kind + jnp.where(upper == bin_, (lower + 2) * _CLASSES, outside)
        index = drop_stale(index, fresh, _JOINT)
        flat = index.reshape(*index.shape[:-2], -1)
        return histogram(flat, _JOINT + 1)[..., :_JOINT]

    masks = tuple(
        jnp.moveaxis(x, axis, 0)
        for x, axis in ((keys, -3), (bins, -1), (low_thresholds, -1))
    )
    return jnp.moveaxis(lax.map(one, masks), 0, -2)


def joint_table(
    counts: Int[np.ndarray, "*p q c"], at: Int[np.ndarray, "*p q"]
) -> Int[np.ndarray, "*p q 3 3 3"]:
    """Entries by principal side, low side and support, from sums of `joint_counts`.

    Args:
        counts: the sums.
        at: which entry of the cut's bin the principal cut is, from 1.
    """
    inside = counts[..., 2 * _CLASSES :].reshape(*at.shape, -1, _CLASSES)
    cut = locate(inside.sum(axis=-1), at).threshold[..., None, None]
    place = np.arange(inside.shape[-2]).reshape(*(1,) * at.ndim, -1, 1)

    def total(chosen):
        return np.sum(inside, axis=-2, where=chosen)

    sides = np.stack(
        [
            counts[..., :_CLASSES] + total(place < cut),
            total(place == cut),
            counts[..., _CLASSES : 2 * _CLASSES] + total(place > cut),
        ],
        axis=-2,
    )
    return sides.reshape(*at.shape, 3, 3, 3)


def coverages(tables: Numbers, sizes: Numbers) -> Coverages:
    """Coverage of both supports and the chance level, from `joint_table`.

    Args:
        tables: `[*p, q, 3, 3, 3]`.
        sizes: entries of each mask, `[*p, q]`.

    Returns:
        The coverages; NaN for an empty support.
    """
    everything = tables.sum(axis=-1)
    parts = (tables[..., 1] + tables[..., 2], tables[..., 2], everything)
    return Coverages(*(_from_table(part, everything, sizes) for part in parts))


def _side(key: Array, threshold: Array) -> Int[Array, "..."]:
    """0 below the threshold, 1 at it, 2 above."""
    return (key >= threshold).astype(jnp.int32) + (key > threshold).astype(jnp.int32)


def _from_table(part: Numbers, everything: Numbers, counts: Numbers) -> Coverage:
    """Coverage of the entries in `part`: axes are principal side and low side."""
    xp = part.__array_namespace__()
    dtype = jnp.result_type(float)
    principal_sizes = everything.sum(axis=-1).astype(dtype)
    low_sizes = everything.sum(axis=-2).astype(dtype)
    part = part.astype(dtype)
    count = counts.astype(dtype)

    tied = principal_sizes[..., 1]
    share = (count - principal_sizes[..., 2]) / tied
    in_principal = part[..., 2, :] + share[..., None] * part[..., 1, :]

    tied = low_sizes[..., 1]
    wanted = count - low_sizes[..., 0]
    share = wanted / tied
    by_low = part.sum(axis=-2)
    below, at = by_low[..., 0], by_low[..., 1]
    least = xp.maximum(0, wanted - (tied - at))
    most = xp.minimum(wanted, at)

    total = part.sum(axis=(-2, -1))
    # Principal and not low: above the low cut, and those at it that are left out.
    at = in_principal[..., 1]
    outside = in_principal[..., 2]
    left_out_least = xp.maximum(0, at - wanted)
    left_out_most = xp.minimum(at, tied - wanted)
    return Coverage(
        principal=in_principal.sum(axis=-1) / total,
        low=(below + share * by_low[..., 1]) / total,
        low_min=(below + least) / total,
        low_max=(below + most) / total,
        nonprincipal_or_low=1 - (outside + (1 - share) * at) / total,
        nonprincipal_or_low_min=1 - (outside + left_out_most) / total,
        nonprincipal_or_low_max=1 - (outside + left_out_least) / total,
    )
