"""The second moment E[g g^T] of many vectors, by way of their Gram matrix.

With N vectors of d numbers as the rows of G, the second moment `M = G^T G / N` is
d x d, and its nonzero eigenvalues are those of the N x N matrix `G G^T / N`. So nothing
of size d x d is ever made.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from geomjax.geometry.factor import matmul


class SecondMoment(NamedTuple):
    """E[g g^T] of N vectors.

    Attributes:
      values: `[N]` eigenvalues of M in descending order, not negative.
      vectors: `[N, N]` their eigenvectors in the space of the rows, as columns; the
        direction i in the vectors' own space is `G^T vectors[:, i] / sqrt(N values_i)`.
      mean_square: `E ||g||^2`, the trace of M.
      square_of_mean: `||E g||^2`.
    """

    values: Float[Array, " N"]
    vectors: Float[Array, "N N"]
    mean_square: Float[Array, ""]
    square_of_mean: Float[Array, ""]

    @property
    def variance(self) -> Float[Array, ""]:
        """`E ||g - E g||^2`, the trace of the covariance (division by N)."""
        return jnp.maximum(self.mean_square - self.square_of_mean, 0.0)

    @property
    def participation(self) -> Float[Array, ""]:
        """`tr(M)^2 / tr(M^2)`: the number of directions that the energy is spread over.

        In [1, min(N, d)]; NaN where all vectors are zero.
        """
        return jnp.square(self.values.sum()) / jnp.square(self.values).sum()

    def top_share(self, k: int) -> Float[Array, ""]:
        """Share of the energy in the k leading directions, in [0, 1]."""
        return self.values[:k].sum() / self.values.sum()


def second_moment(gradients: Float[Array, "N d"]) -> SecondMoment:
    """Eigenvalues and leading directions of `G^T G / N`.

    Args:
      gradients: The vectors as rows; in float64 for directions of small energy.

    Returns:
      The second moment.
    """
    gram = matmul(gradients, gradients.T) / gradients.shape[0]
    values, vectors = jnp.linalg.eigh((gram + gram.T) / 2)
    mean = gradients.mean(axis=0)
    return SecondMoment(
        values=jnp.maximum(values[::-1], 0.0),
        vectors=vectors[:, ::-1],
        mean_square=jnp.trace(gram),
        square_of_mean=jnp.sum(jnp.square(mean)),
    )


def alignment(
    a: Float[Array, "N d"],
    b: Float[Array, "M d"],
    a_moment: SecondMoment,
    b_moment: SecondMoment,
    k: int,
) -> Float[Array, ""]:
    """`||U_k(a)^T U_k(b)||_F^2 / k` of the k leading directions of two second moments.

    The same measure as P2's similarity of subspaces; chance is about k / d.

    Args:
      a: Vectors.
      b: Others of the same space.
      a_moment: `second_moment(a)`.
      b_moment: `second_moment(b)`.
      k: Directions compared.

    Returns:
      The alignment, in [0, 1] up to rounding; NaN where either has fewer directions.

    Raises:
      ValueError: k is below 1 or above N, M or d.
    """
    most = min(*a.shape, *b.shape)
    if not 1 <= k <= most:
        raise ValueError(f"k={k}: expected 1 to {most} directions")

    def directions(rows, moment):
        energy = rows.shape[0] * moment.values[:k]
        # An eigenvalue this small is rounding, and its direction arbitrary.
        floor = jnp.finfo(rows.dtype).eps * rows.shape[0] * moment.values[0]
        norms = jnp.sqrt(jnp.where(moment.values[:k] > floor, energy, jnp.nan))
        return matmul(moment.vectors[:, :k].T, rows) / norms[:, None]

    cosines = matmul(directions(a, a_moment), directions(b, b_moment).T)
    return jnp.sum(jnp.square(cosines)) / k
