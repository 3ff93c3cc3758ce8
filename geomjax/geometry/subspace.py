"""Angles between leading subspaces, and the energy of an update inside them.

A subspace on the short side of a matrix is given by its vectors; one on the long side
by the matrix and its `Factors`, from which the vectors follow block by block.
"""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from geomjax.geometry.blocks import fold, transpose
from geomjax.geometry.factor import (
    Factors,
    Numbers,
    eigenvalues,
    gram_rows,
    matmul,
    symmetric,
)


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
    return sines(symmetric(residual_gram(a, b, matmul(b, transpose(a)))))


def nested_residuals(
    a: Float[np.ndarray, "k r"], b: Float[np.ndarray, "k r"], ranks: Sequence[int]
) -> list[Float[np.ndarray, "_ _"]]:
    """The matrices whose eigenvalues are squared sines, of several nested ranks.

    With R = B - C A for C = B A^T of all k rows, what is left of the leading j rows of
    b outside those of a is `R_j + C_jx A_x`, x being the others of a: one product of
    the full size serves all ranks. As a is orthonormal, its Gram matrix is a sum of
    two.

    Args:
        a: orthonormal rows.
        b: orthonormal rows.
        ranks: dimensions, up to k.
    """
    cosines = b @ a.T
    rest = b - cosines @ a
    gram = rest @ rest.T
    out = []
    for j in ranks:
        others = cosines[:j, j:]
        out.append(gram[:j, :j] + others @ others.T)
    return out


def residual_gram(
    a: Float[Array, "*p k b"],
    b: Float[Array, "*p k b"],
    cosines: Float[Array, "*p k k"],
) -> tuple[Float[Array, "*p s c"], ...]:
    """`gram_rows` of B - (B A^T) A, to be summed over blocks of columns.

    Args:
        a: a block of columns of orthonormal rows.
        b: the same block of others.
        cosines: B A^T, over all blocks.

    Returns:
        Rows of the Gram matrix whose eigenvalues are the squared sines.
    """
    return gram_rows(b - matmul(cosines, a))


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
        return [
            residual_gram(a[..., :k, :], b[..., :k, :], cosines[..., :k, :k])
            for k in ranks
        ]

    totals = fold(residuals, source, tuned, axis_name=axis_name)
    return [sines(symmetric(rows)) for rows in totals]


def sines(residual: Float[Array, "*p k k"]) -> Float[Array, "*p k"]:
    """Sines in descending order, from the Gram matrix of the residual."""
    return jnp.sqrt(jnp.clip(eigenvalues(residual), 0, 1))


def angles(sines: Float[Numbers, "*p k"]) -> Float[Numbers, "*p k"]:
    """Principal angles in radians, in [0, pi/2], from their sines."""
    xp = sines.__array_namespace__()
    return xp.arctan2(sines, xp.sqrt((1 - sines) * (1 + sines)))


def inside(
    short: Float[Array, "*p k r"],
    long: Float[Array, "*p k b"],
    delta: Float[Array, "*p r b"],
) -> tuple[Float[Array, "*p k"], Float[Array, "*p k r"]]:
    """What a block of D has in W's leading directions, to be summed over blocks.

    Args:
        short: leading vectors of the short side, as rows.
        long: a block of columns of those of the long side.
        delta: the block of D.

    Returns:
        Energy of D along each vector of the short side, and the product of the long
        side's with D^T.
    """
    on_short = jnp.sum(jnp.square(matmul(short, delta)), axis=-1)
    return on_short, matmul(long, transpose(delta))


def energies(
    short: Float[np.ndarray, "*p k r"],
    on_short: Float[np.ndarray, "*p k"],
    on_long: Float[np.ndarray, "*p k r"],
    ranks: Sequence[int],
) -> tuple[Float[np.ndarray, "*p n"], ...]:
    """Energies on the short side, on the long side and on both, from sums of `inside`.

    The energies on one side come from `U_k^T D` and `D V_k` themselves: with the thin
    factor of a rectangular matrix, `U^T D V` has already lost the part of D outside
    the long side's range. P1 eq. (23), before the division.

    Args:
        short: leading vectors of the short side, as rows.
        on_short: the first sum.
        on_long: the second.
        ranks: dimensions of the subspaces.

    Returns:
        `||U_k^T D||^2`, `||D V_k||^2` and `||U_k^T D V_k||^2` for each rank, U being
        the short side's vectors.
    """
    core = np.square(on_long @ short.swapaxes(-1, -2))
    along_long = np.square(on_long).sum(axis=-1)
    by_short = [on_short[..., :k].sum(axis=-1) for k in ranks]
    by_long = [along_long[..., :k].sum(axis=-1) for k in ranks]
    joint = [core[..., :k, :k].sum(axis=(-2, -1)) for k in ranks]
    return tuple(np.stack(part, axis=-1) for part in (by_short, by_long, joint))
