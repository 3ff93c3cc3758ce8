"""Angles between leading subspaces, and the energy of an update inside them.

Subspaces are given as rows of orthonormal vectors, the leading ones first.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from geomjax.geometry.factor import eigenvalues, matmul, transpose


def sines(a: Float[Array, "*p k m"], b: Float[Array, "*p k m"]) -> Float[Array, "*p k"]:
    """Sines of the principal angles between two k-dimensional subspaces.

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
    squares = eigenvalues(matmul(residual, transpose(residual)))
    return jnp.sqrt(jnp.clip(squares, 0, 1))


def angles(
    a: Float[Array, "*p k m"], b: Float[Array, "*p k m"]
) -> Float[Array, "*p k"]:
    """Principal angles in radians, in descending order, in [0, pi/2].

    `cos(theta_i) = sigma_i(A B^T)`, computed from the sine side (see `sines`).
    """
    s = sines(a, b)
    return jnp.arctan2(s, jnp.sqrt((1 - s) * (1 + s)))


def nested_mean_sines(
    a: Float[Array, "*p k m"], b: Float[Array, "*p k m"], ranks: Sequence[int]
) -> Float[Array, "*p n"]:
    """Mean sine between the leading subspaces of several ranks, P1's rotation.

    Args:
        a: orthonormal rows, of which the leading ones span the smaller subspaces.
        b: likewise.
        ranks: dimensions, each at most k.

    Returns:
        For each rank the mean of `sin(theta_i)`.
    """
    # One loop body for all ranks: rows past the rank are zeroed, which adds zeros to
    # the sines. The compiled program is a quarter of that of four separate ones.
    rows = jnp.arange(a.shape[-2], dtype=jnp.int32)

    def one(rank):
        keep = jnp.where(rows < rank, 1, 0).astype(a.dtype)
        keep = keep.reshape(*(1 for _ in a.shape[:-2]), -1, 1)
        return jnp.sum(sines(a * keep, b * keep), axis=-1) / rank.astype(a.dtype)

    means = lax.map(one, jnp.asarray(ranks, jnp.int32))
    return jnp.moveaxis(means, 0, -1)


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
    delta: Float[Array, "*p m n"],
    left: Float[Array, "*p k m"],
    right: Float[Array, "*p k n"],
    ranks: Sequence[int],
) -> ProjectedEnergies:
    """Energy of D in the leading subspaces of several ranks.

    The one-sided energies come from `U_k^T D` and `D V_k` themselves: with the thin
    factor of a rectangular matrix, `U^T D V` has already lost the part of D outside
    the long side's range.

    Args:
        delta: D.
        left: leading left singular vectors of W, as rows.
        right: leading right singular vectors of W, as rows.
        ranks: dimensions, each at most k.

    Returns:
        The three energies for each rank.
    """
    from_left = matmul(left, delta)
    from_right = matmul(right, transpose(delta))
    core = jnp.square(matmul(from_left, transpose(right)))
    rows = jnp.cumsum(jnp.sum(jnp.square(from_left), axis=-1), axis=-1)
    columns = jnp.cumsum(jnp.sum(jnp.square(from_right), axis=-1), axis=-1)
    last = jnp.asarray(ranks, jnp.int32) - 1
    joint = [jnp.sum(core[..., :k, :k], axis=(-2, -1)) for k in ranks]
    return ProjectedEnergies(
        jnp.stack(joint, axis=-1), rows[..., last], columns[..., last]
    )
