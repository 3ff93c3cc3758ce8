"""Singular values and leading singular vectors from the Gram matrix of the short side.

A Gram matrix squares the condition number: its singular values are good to about
`sqrt(eps) * sigma_1` (1e-8 sigma_1 in float64, 3e-4 sigma_1 in float32) in the worst
case, at the bottom of the spectrum; a value sigma_i is good to
`eps * sigma_1**2 / sigma_i`. Every threshold of the tables lies above that in float64,
where the whole computation is matrix products and one symmetric eigenproblem of size
min(m, n). That costs a quarter of a bidiagonal SVD on a CPU, and half of it shards by
rows. Enter float64 with `with jax.enable_x64(True):`.

Vectors are kept as rows, so that every product contracts the last axes, which is the
layout in which XLA's CPU products reach their full rate (a product that contracts the
first axes runs at a third of it).
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int


class Factors(NamedTuple):
    """Singular values of a matrix and its leading singular vectors, as rows.

    Attributes:
        values: all r = min(m, n) singular values, in descending order.
        left: the leading k left singular vectors.
        right: the leading k right singular vectors.
    """

    values: Float[Array, "*p r"]
    left: Float[Array, "*p k m"]
    right: Float[Array, "*p k n"]


def transpose(x: Float[Array, "*p m n"]) -> Float[Array, "*p n m"]:
    """Swaps the last two axes."""
    return jnp.swapaxes(x, -1, -2)


def matmul(a: Float[Array, "*p m k"], b: Float[Array, "*p k n"]) -> Array:
    """A matrix product in full precision on every backend."""
    return jnp.matmul(a, b, precision=lax.Precision.HIGHEST)


def wide(x: Float[Array, "*p m n"]) -> Float[Array, "*p r long"]:
    """The matrix or its transpose, whichever has no more rows than columns.

    The transpose is materialised: XLA would otherwise fold it into the products that
    use it, which then contract their first axes.
    """
    m, n = x.shape[-2:]
    return x if m <= n else lax.optimization_barrier(transpose(x))


def gram(x: Float[Array, "*p m n"]) -> Float[Array, "*p r r"]:
    """X X^T for a wide matrix, X^T X for a tall one."""
    short = wide(x)
    return matmul(short, transpose(short))


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


def singular_values(x: Float[Array, "*p m n"]) -> Float[Array, "*p r"]:
    """All singular values in descending order, without vectors.

    Args:
        x: matrices of any shape; float64 for the accuracy stated above.

    Returns:
        `sqrt(eig(gram(x)))`, clipped at 0.
    """
    return jnp.sqrt(jnp.maximum(eigenvalues(gram(x)), 0))


def factor(x: Float[Array, "*p m n"], k: int) -> Factors:
    """All singular values and the leading `k` singular vectors of both sides.

    The short side's vectors are eigenvectors of the Gram matrix; the other side's are
    `x^T u / sigma` and `x v / sigma`. A direction whose singular value is below the
    accuracy of the Gram matrix gets a zero vector there: use `is_defined` before
    trusting a subspace that reaches that far.

    Args:
        x: matrices of any shape.
        k: vectors wanted, at most min(m, n).

    Returns:
        The factors.
    """
    m, n = x.shape[-2:]
    rows = wide(x)
    squares, vectors = eigenvectors(matmul(rows, transpose(rows)))
    values = jnp.sqrt(jnp.maximum(squares, 0))
    short = vectors[..., :k, :]
    leading = values[..., :k, None]
    known = leading > floor(values)[..., None, None]
    scale = jnp.where(known, 1 / jnp.where(known, leading, 1), 0)
    long = matmul(short, rows) * scale
    return Factors(values, *((short, long) if m <= n else (long, short)))


def floor(values: Float[Array, "*p r"]) -> Float[Array, "*p"]:
    """The size below which a singular value from a Gram matrix is rounding noise."""
    eps = jnp.finfo(values.dtype).eps
    return values[..., 0] * jnp.sqrt(eps * values.shape[-1])


def rank(values: Float[Array, "*p r"]) -> Int[Array, "*p"]:
    """Number of singular values above `floor`."""
    return jnp.sum(values > floor(values)[..., None], axis=-1)


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
