"""Singular values and leading singular vectors from the Gram matrix of the short side.

A Gram matrix squares the condition number: a singular value sigma_i is good to
`eps * sigma_1**2 / sigma_i`, at worst `sqrt(eps) * sigma_1` at the bottom of the
spectrum (1e-8 sigma_1 in float64, 3e-4 sigma_1 in float32). Every threshold of the
tables lies above that in float64, where the whole computation is matrix products and
one symmetric eigenproblem of size r = min(m, n). That costs a quarter of a bidiagonal
SVD on a CPU, and the part that grows with the long side shards along it. Enter float64
with `with jax.enable_x64(True):`.

Vectors are kept as rows, so that every product contracts the last axes, the layout in
which XLA's CPU products reach their full rate.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from geomjax.geometry.blocks import fold, transpose


class Factors(NamedTuple):
    """Singular values of a matrix, and singular vectors of its short side.

    The vectors of the long side follow from the matrix, block by block (`long_rows`).

    Attributes:
        values: all r = min(m, n) singular values, in descending order.
        short: the leading k singular vectors of the short side, as rows.
        scale: 1 / sigma_i of those, 0 where sigma_i is rounding noise.
    """

    values: Float[Array, "*p r"]
    short: Float[Array, "*p k r"]
    scale: Float[Array, "*p k"]

    def long_rows(self, block: Float[Array, "*p r b"]) -> Float[Array, "*p k b"]:
        """The entries of the long side's vectors that belong to a block of columns."""
        return matmul(self.short, block) * self.scale[..., None]


def matmul(a: Float[Array, "*p m k"], b: Float[Array, "*p k n"]) -> Array:
    """A matrix product in full precision on every backend."""
    return jnp.matmul(a, b, precision=lax.Precision.HIGHEST)


def gram(
    x: Float[Array, "*p m n"], *, axis_name: str | None = None
) -> Float[Array, "*p r r"]:
    """X X^T for a wide matrix, X^T X for a tall one, in the widest enabled float."""
    dtype = jnp.result_type(float)

    def part(block, fresh):
        block = block.astype(dtype)
        return matmul(block, transpose(block))

    return fold(part, x, axis_name=axis_name)


def eigenvectors(
    symmetric: Float[Array, "*p r r"],
) -> tuple[Float[Array, "*p r"], Float[Array, "*p r r"]]:
    """Eigenvalues in descending order, and the eigenvectors as rows.

    On a CPU the stack is taken one matrix at a time: XLA spreads a batched LAPACK call
    over its thread pool, and two such calls in one program can wait for each other.
    """
    r = symmetric.shape[-1]

    def one(x):
        return lax.linalg.eigh(x, symmetrize_input=False)

    def one_by_one(x):
        vectors, values = lax.map(one, x.reshape(-1, r, r))
        return vectors.reshape(x.shape), values.reshape(x.shape[:-1])

    vectors, values = lax.platform_dependent(symmetric, cpu=one_by_one, default=one)
    return values[..., ::-1], transpose(vectors)[..., ::-1, :]


def eigenvalues(symmetric: Float[Array, "*p r r"]) -> Float[Array, "*p r"]:
    """Eigenvalues of symmetric matrices, in descending order."""
    return eigenvectors(symmetric)[0]


def singular_values(
    x: Float[Array, "*p m n"], *, axis_name: str | None = None
) -> Float[Array, "*p r"]:
    """All singular values in descending order, without vectors.

    Args:
        x: matrices of any shape and float dtype.
        axis_name: mesh axis over which the long side is sharded, in `shard_map`.

    Returns:
        `sqrt(eig(gram(x)))`, clipped at 0, in the widest enabled float.
    """
    squares = eigenvalues(gram(x, axis_name=axis_name))
    return jnp.sqrt(jnp.maximum(squares, 0))


def factor(
    x: Float[Array, "*p m n"], k: int, *, axis_name: str | None = None
) -> Factors:
    """All singular values, and the leading `k` singular vectors.

    A direction whose singular value is below the accuracy of the Gram matrix gets a
    zero vector on the long side: ask `is_defined` before trusting a subspace that
    reaches that far.

    Args:
        x: matrices of any shape and float dtype.
        k: vectors wanted, at most min(m, n).
        axis_name: mesh axis over which the long side is sharded, in `shard_map`.

    Returns:
        The factors, in the widest enabled float.
    """
    squares, vectors = eigenvectors(gram(x, axis_name=axis_name))
    values = jnp.sqrt(jnp.maximum(squares, 0))
    leading = values[..., :k]
    known = leading > floor(values)[..., None]
    scale = jnp.where(known, 1 / jnp.where(known, leading, 1), 0)
    return Factors(values, vectors[..., :k, :], scale)


def floor(values: Float[Array, "*p r"]) -> Float[Array, "*p"]:
    """The size below which a singular value from a Gram matrix is rounding noise."""
    eps = jnp.finfo(values.dtype).eps
    return values[..., 0] * jnp.sqrt(eps * values.shape[-1])


def is_defined(values: Float[Array, "*p r"], k: int) -> Bool[Array, "*p"]:
    """Whether the leading k-dimensional subspace exists and is unique.

    It is not where the rank is below k, or where sigma_k equals sigma_{k+1} to within
    rounding, as in an identity matrix.
    """
    defined = values[..., k - 1] > floor(values)
    if k < values.shape[-1]:
        squares = jnp.square(values)
        gap = squares[..., k - 1] - squares[..., k]
        noise = 1000 * jnp.finfo(values.dtype).eps * squares[..., 0]
        defined &= gap > noise
    return defined
