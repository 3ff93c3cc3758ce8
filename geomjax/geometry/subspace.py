"""Angles between leading subspaces, and the energy of an update inside them.

A subspace on the short side of a matrix is given by its vectors; one on the long side
by the matrix and its `Factors`, from which the vectors follow block by block.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from geomjax.geometry.blocks import fold, transpose
from geomjax.geometry.factor import Factors, eigenvalues, matmul


def short_sines(
    a: Float[Array, "*p k r"], b: Float[Array, "*p k r"]
) -> Float[Array, "*p k"]:
    """Sines of the principal angles between two subspaces given by their vectors.

    The singular values of the residual `B - (B A^T) A`, which is what is left of b
    outside a. From the cosines, `sqrt(1 - cos^2)` would have a floor near `sqrt(eps)`
    (3e-4 in float32), far above the angles that short training runs leave.

    Args:
        a: orthonormal rows.
        b: orthonormal rows.

    Returns:
        The sines in descending order, in [0, 1].
    """
    residual = b - matmul(matmul(b, transpose(a)), a)
    return _sines(matmul(residual, transpose(residual)))


def long_sines(
    source: Float[Array, "*p m n"],
    tuned: Float[Array, "*p m n"],
    source_factors: Factors,
    tuned_factors: Factors,
    ranks: Sequence[int],
    *,
    axis_name: str | None = None,
) -> list[Float[Array, "*p k"]]:
    """`short_sines` on the long side of W and W', for several nested ranks.

    Args:
        source: W.
        tuned: W'.
        source_factors: its factors, of at least the largest rank.
        tuned_factors: those of W'.
        ranks: dimensions k of the leading subspaces.
        axis_name: mesh axis over which the long side is sharded, in `shard_map`.

    Returns:
        For each rank its sines in descending order.
    """
    dtype = source_factors.values.dtype

    def vectors(block, tuned_block):
        a = source_factors.long_rows(block.astype(dtype))
        return a, tuned_factors.long_rows(tuned_block.astype(dtype))

    def overlaps(block, tuned_block, fresh):
        a, b = vectors(block, tuned_block)
        return matmul(b, transpose(a))

    cosines = fold(overlaps, source, tuned, axis_name=axis_name)

    def residuals(block, tuned_block, fresh):
        a, b = vectors(block, tuned_block)
        grams = []
        for k in ranks:
            rest = b[..., :k, :] - matmul(cosines[..., :k, :k], a[..., :k, :])
            grams.append(matmul(rest, transpose(rest)))
        return grams

    return [_sines(g) for g in fold(residuals, source, tuned, axis_name=axis_name)]


def _sines(squared: Float[Array, "*p k k"]) -> Float[Array, "*p k"]:
    return jnp.sqrt(jnp.clip(eigenvalues(squared), 0, 1))


def angles(sines: Float[Array, "*p k"]) -> Float[Array, "*p k"]:
    """Principal angles in radians, in [0, pi/2], from their sines."""
    return jnp.arctan2(sines, jnp.sqrt((1 - sines) * (1 + sines)))


class ProjectedEnergies(NamedTuple):
    """Energy of a matrix inside leading subspaces of W, one entry for each rank.

    Attributes:
        joint: `||U_k^T D V_k||_F^2`, P1 eq. (23) before the division.
        left: `||U_k^T D||_F^2`.
        right: `||D V_k||_F^2`.
    """

    joint: Float[Array, "*p n"]
    left: Float[Array, "*p n"]
    right: Float[Array, "*p n"]


def projected_energies(
    source: Float[Array, "*p m n"],
    delta: Float[Array, "*p m n"],
    factors: Factors,
    ranks: Sequence[int],
    *,
    axis_name: str | None = None,
) -> ProjectedEnergies:
    """Energy of D in the leading subspaces of W of several ranks.

    The one-sided energies come from `U_k^T D` and `D V_k` themselves: with the thin
    factor of a rectangular matrix, `U^T D V` has already lost the part of D outside
    the long side's range.

    Args:
        source: W.
        delta: D.
        factors: factors of W, of at least the largest rank.
        ranks: dimensions k.
        axis_name: mesh axis over which the long side is sharded, in `shard_map`.

    Returns:
        The three energies for each rank.
    """
    dtype, largest = factors.values.dtype, max(ranks)
    short = factors.short[..., :largest, :]

    def part(block, delta_block, fresh):
        long = factors.long_rows(block.astype(dtype))[..., :largest, :]
        delta_block = delta_block.astype(dtype)
        inside = matmul(short, delta_block)
        return (
            jnp.sum(jnp.square(inside), axis=-1),
            matmul(long, transpose(delta_block)),
        )

    on_short, on_long = fold(part, source, delta, axis_name=axis_name)
    core = jnp.square(matmul(on_long, transpose(short)))
    joint = [jnp.sum(core[..., :k, :k], axis=(-2, -1)) for k in ranks]
    last = jnp.asarray(ranks, jnp.int32) - 1
    by_short = jnp.cumsum(on_short, axis=-1)[..., last]
    by_long = jnp.cumsum(jnp.sum(jnp.square(on_long), axis=-1), axis=-1)[..., last]
    m, n = source.shape[-2:]
    left, right = (by_short, by_long) if m <= n else (by_long, by_short)
    return ProjectedEnergies(jnp.stack(joint, axis=-1), left, right)
