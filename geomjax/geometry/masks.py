"""Where in the source the update lies: coverage by masks that W alone defines.

M_principal holds the ceil(density * mn) largest entries of the rank-k reconstruction
`|U_k S_k V_k^T|`, M_low the ceil(density * mn) smallest of |W|. The coverage of an
update's support A by a mask M is `|A and M| / |A|`, P1 eq. (24).

A mask by magnitude over bfloat16 weights ends inside thousands of tied entries. Its
size is exact here, and the coverage given is the mean over all ways to break the tie,
with the smallest and the largest beside it.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from geomjax.geometry.factor import matmul, transpose
from geomjax.geometry.select import (
    histogram,
    kth_smallest,
    magnitude_key,
)
from geomjax.geometry.sparsity import top_count


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

    principal: Float[Array, "*p n"]
    low: Float[Array, "*p n"]
    low_min: Float[Array, "*p n"]
    low_max: Float[Array, "*p n"]
    nonprincipal_or_low: Float[Array, "*p n"]
    nonprincipal_or_low_min: Float[Array, "*p n"]
    nonprincipal_or_low_max: Float[Array, "*p n"]


class Coverages(NamedTuple):
    """Coverage of the two supports, and of all entries, which is the chance level."""

    changed: Coverage
    changed_beyond: Coverage
    chance: Coverage


def coverage(
    source: Float[Array, "*p m n"],
    changed: Bool[Array, "*p m n"],
    changed_beyond: Bool[Array, "*p m n"],
    values: Float[Array, "*p r"],
    left: Float[Array, "*p k m"],
    right: Float[Array, "*p k n"],
    masks: Sequence[SourceMask],
    *,
    low_bits: bool = True,
) -> Coverages:
    """Coverage of two nested supports by the masks of W.

    Args:
        source: W, in float32.
        changed: the support A.
        changed_beyond: a subset of it, the entries that moved by more than a tolerance.
        values: singular values of W, in descending order.
        left: leading left singular vectors of W as rows, up to the largest rank.
        right: leading right singular vectors.
        masks: ranks, each at most k, and densities in (0, 1].
        low_bits: False where W holds bfloat16 values, see `kth_smallest`.

    Returns:
        The coverages; NaN for an empty support.
    """
    *batch, m, n = source.shape
    flat = (*batch, m * n)
    k = left.shape[-2]
    directions = jnp.arange(k, dtype=jnp.int32)
    scaled = transpose(left * values[..., :k, None])
    counts = jnp.asarray([top_count(mask.density, m * n) for mask in masks], jnp.int32)
    source_key = magnitude_key(source.reshape(flat))
    position = jnp.broadcast_to(counts, (*batch, len(masks)))
    low_cut = kth_smallest(source_key, position, low_bits=low_bits)
    support = (changed.astype(jnp.int32) + changed_beyond.astype(jnp.int32)).reshape(
        flat
    )

    def one(mask):
        rank, count, low_threshold = mask
        kept = jnp.where(directions < rank, 1, 0).astype(scaled.dtype)
        kept = scaled * kept.reshape(*(1 for _ in batch), 1, k)
        key = magnitude_key(matmul(kept, right).reshape(flat))
        at = jnp.broadcast_to(m * n - count + 1, (*batch, 1))
        cut = kth_smallest(key, at)
        principal_side = _side(key, cut.threshold)
        low_side = _side(source_key, low_threshold[..., None])
        index = (principal_side * 3 + low_side) * 3 + support
        table = histogram(index, 27).reshape(*batch, 3, 3, 3)
        return table

    ranks = jnp.asarray([mask.rank for mask in masks], jnp.int32)
    low_thresholds = jnp.moveaxis(low_cut.threshold, -1, 0)
    tables = lax.map(one, (ranks, counts, low_thresholds))
    tables = jnp.moveaxis(tables, 0, len(batch))
    return Coverages(
        changed=_from_table(tables[..., 1] + tables[..., 2], tables, position),
        changed_beyond=_from_table(tables[..., 2], tables, position),
        chance=_from_table(jnp.sum(tables, axis=-1), tables, position),
    )


def _side(key: Array, threshold: Array) -> Int[Array, "*p n"]:
    """0 below the threshold, 1 at it, 2 above."""
    return (key >= threshold).astype(jnp.int32) + (key > threshold).astype(jnp.int32)


def _from_table(
    part: Int[Array, "*p n 3 3"],
    tables: Int[Array, "*p n 3 3 3"],
    counts: Int[Array, "*p n"],
) -> Coverage:
    """Coverage of the entries in `part`: axes are principal side and low side."""
    dtype = jnp.result_type(float)
    everything = jnp.sum(tables, axis=-1)
    principal_sizes = jnp.sum(everything, axis=-1).astype(dtype)
    low_sizes = jnp.sum(everything, axis=-2).astype(dtype)
    part = part.astype(dtype)
    count = counts.astype(dtype)

    tied = principal_sizes[..., 1]
    share = (count - principal_sizes[..., 2]) / tied
    in_principal = part[..., 2, :] + share[..., None] * part[..., 1, :]

    tied = low_sizes[..., 1]
    wanted = count - low_sizes[..., 0]
    share = wanted / tied
    by_low = jnp.sum(part, axis=-2)
    below, at = by_low[..., 0], by_low[..., 1]
    least = jnp.maximum(0, wanted - (tied - at))
    most = jnp.minimum(wanted, at)

    total = jnp.sum(part, axis=(-2, -1))
    # Principal and not low: above the low cut, and those at it that are left out.
    at = in_principal[..., 1]
    outside = in_principal[..., 2]
    left_out_least = jnp.maximum(0, at - wanted)
    left_out_most = jnp.minimum(at, tied - wanted)
    return Coverage(
        principal=jnp.sum(in_principal, axis=-1) / total,
        low=(below + share * by_low[..., 1]) / total,
        low_min=(below + least) / total,
        low_max=(below + most) / total,
        nonprincipal_or_low=1 - (outside + (1 - share) * at) / total,
        nonprincipal_or_low_min=1 - (outside + left_out_most) / total,
        nonprincipal_or_low_max=1 - (outside + left_out_least) / total,
    )
