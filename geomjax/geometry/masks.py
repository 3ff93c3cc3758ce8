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
from jaxtyping import Array, Float, Int

from geomjax.geometry.blocks import drop_stale, fold, transpose
from geomjax.geometry.factor import Factors, matmul
from geomjax.geometry.select import fine_key, histogram, kth_smallest, magnitude_key
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
    delta: Float[Array, "*p m n"],
    factors: Factors,
    masks: Sequence[SourceMask],
    *,
    atol: float,
    low_bits: bool = True,
    axis_name: str | None = None,
) -> Coverages:
    """Coverage of the update's supports by the masks of W.

    Args:
        source: W, bfloat16 or float32.
        delta: D, likewise; A is where it is not 0.
        factors: factors of W, up to the largest rank.
        masks: ranks, each at most k, and densities in (0, 1].
        atol: the second support is where |D| exceeds it.
        low_bits: False where W holds bfloat16 values, see `kth_smallest`.
        axis_name: mesh axis over which the long side is sharded, in `shard_map`.

    Returns:
        The coverages; NaN for an empty support.
    """
    *batch, m, n = source.shape
    dtype, k = factors.values.dtype, factors.short.shape[-2]
    shards = 1 if axis_name is None else lax.axis_size(axis_name)
    numel = m * n * shards
    sizes = jnp.asarray([top_count(mask.density, numel) for mask in masks], jnp.int32)
    sizes = jnp.broadcast_to(sizes, (*batch, len(masks)))
    low_cut = kth_smallest(
        magnitude_key, [source], sizes, low_bits=low_bits, axis_name=axis_name
    )
    # No entry of a reconstruction exceeds the largest singular value.
    bound = jnp.maximum(factors.values[..., :1, None, None], 1e-300)
    q, r = len(masks), min(m, n)
    directions = jnp.arange(k, dtype=jnp.int32)
    inside_rank = jnp.stack([directions < mask.rank for mask in masks])
    inside_rank = inside_rank.reshape(*(1 for _ in batch), q, 1, k)
    columns = transpose(factors.short)[..., None, :, :]
    # All masks' reconstructions are one product: rows of U_k U_k^T W for each rank k,
    # which is U_k S_k V_k^T, of the short side.
    kept = jnp.where(inside_rank, columns, 0).reshape(*batch, q * r, k)

    def key(block):
        product = matmul(kept, matmul(factors.short, block.astype(dtype)))
        product = product.reshape(*batch, q, r, block.shape[-1])
        return fine_key(product, bound)

    at = (numel - sizes + 1)[..., None]
    cut = kth_smallest(key, [source], at, axis_name=axis_name)

    def joint(block, delta_block, fresh):
        moved = jnp.abs(delta_block).astype(dtype)
        support = (moved > 0).astype(jnp.int32) + (moved > atol).astype(jnp.int32)
        side = _side(key(block), cut.threshold[..., None])
        low = _side(
            magnitude_key(block)[..., None, :, :], low_cut.threshold[..., None, None]
        )
        index = (side * 3 + low) * 3 + support[..., None, :, :]
        index = drop_stale(index, fresh, 27)
        return histogram(index.reshape(*batch, q, -1), 28)[..., :27]

    tables = fold(joint, source, delta, axis_name=axis_name)
    tables = tables.reshape(*batch, q, 3, 3, 3)
    supports = jnp.stack(
        [
            tables[..., 1] + tables[..., 2],
            tables[..., 2],
            jnp.sum(tables, axis=-1, dtype=jnp.int32),
        ]
    )
    found = _from_table(
        supports,
        jnp.broadcast_to(supports[2:], supports.shape),
        jnp.broadcast_to(sizes[None], (3, *sizes.shape)),
    )
    return Coverages(*(Coverage(*(part[i] for part in found)) for i in range(3)))


def _side(key: Array, threshold: Array) -> Int[Array, "..."]:
    """0 below the threshold, 1 at it, 2 above."""
    return (key >= threshold).astype(jnp.int32) + (key > threshold).astype(jnp.int32)


def _from_table(
    part: Int[Array, "*p n 3 3"],
    everything: Int[Array, "*p n 3 3"],
    counts: Int[Array, "*p n"],
) -> Coverage:
    """Coverage of the entries in `part`: axes are principal side and low side."""
    dtype = jnp.result_type(float)
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
