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

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxlib import lapack
from jaxtyping import Array, Bool, Float

from geomjax.geometry.blocks import fold, transpose

Numbers = Array | np.ndarray
"""What the small results are in: traced by JAX, or fetched and finished in NumPy."""
if TYPE_CHECKING:
    AnyArray = Any
else:
    # On a device, on the host, or described for a compiler.
    AnyArray = Array | np.ndarray | jax.ShapeDtypeStruct
_GRAM_PARTS = 4
"""Parts in which the lower triangle of a Gram matrix is computed: 5/8 of the work."""
_SMALLEST_PART = 64


class Factors(NamedTuple):
    """Singular values of a matrix, and singular vectors of its short side.

    The vectors of the long side follow from the matrix, block by block (`long_rows`).

    Attributes:
        values: all r = min(m, n) singular values, in descending order.
        short: the leading k singular vectors of the short side, as rows.
        scale: 1 / sigma_i of those, 0 where sigma_i is rounding noise.
    """

    values: Float[AnyArray, "*p r"]
    short: Float[AnyArray, "*p k r"]
    scale: Float[AnyArray, "*p k"]

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
        return gram_rows(block.astype(dtype))

    return symmetric(fold(part, x, axis_name=axis_name))


def gram_rows(x: Float[Array, "*p r b"]) -> tuple[Float[Array, "*p _ _"], ...]:
    """Rows of the lower triangle of X X^T, in parts, to be summed over blocks.

    On TPUs cut from the whole product: there a product in float64 is a program of its
    own, and four take six times as long to compile as one.
    """
    r = x.shape[-2]
    size = r if r % _GRAM_PARTS or r < _GRAM_PARTS * _SMALLEST_PART else r // 4
    starts = range(0, r, size)

    def parts(x):
        return tuple(
            matmul(x[..., i : i + size, :], transpose(x[..., : i + size, :]))
            for i in starts
        )

    def cut(x):
        whole = matmul(x, transpose(x))
        return tuple(whole[..., i : i + size, : i + size] for i in starts)

    return lax.platform_dependent(x, tpu=cut, default=parts)


def symmetric(rows: Sequence[Float[Array, "*p _ _"]]) -> Float[Array, "*p r r"]:
    """The symmetric matrix whose lower triangle `gram_rows` gave."""
    r = rows[-1].shape[-1]
    unpadded = [(0, 0)] * (rows[0].ndim - 1)
    full = [jnp.pad(part, (*unpadded, (0, r - part.shape[-1]))) for part in rows]
    lower = jnp.concatenate(full, axis=-2)
    if len(rows) == 1:
        return lower
    # The barrier keeps XLA from evaluating the comparisons while it compiles.
    index = lax.optimization_barrier(jnp.arange(r, dtype=jnp.int32))
    below = (index[:, None] >= index[None]).reshape(*(1,) * (lower.ndim - 2), r, r)
    return jnp.where(below, lower, transpose(lower))


def lower(rows: Sequence[Float[np.ndarray, "_ _"]]) -> Float[np.ndarray, "r r"]:
    """The lower triangle that `gram_rows` gave, of one matrix, in memory of its own."""
    r = rows[-1].shape[-1]
    out, start = np.zeros((r, r)), 0
    for part in rows:
        count, width = part.shape
        out[start : start + count, :width] = part
        start += count
    return out


def eigenvectors(
    symmetric: Float[Array, "*p r r"],
) -> tuple[Float[Array, "*p r"], Float[Array, "*p r r"]]:
    """Eigenvalues in descending order, and the eigenvectors as rows."""

    def one(x):
        return lax.linalg.eigh(x, symmetrize_input=False)

    vectors, values = lax.platform_dependent(
        symmetric, cpu=lambda x: _one_by_one(one, x), default=one
    )
    return values[..., ::-1], transpose(vectors)[..., ::-1, :]


def eigenvalues(symmetric: Float[Array, "*p r r"]) -> Float[Array, "*p r"]:
    """Eigenvalues of symmetric matrices, in descending order.

    On a CPU half the time of `eigenvectors`: LAPACK is asked for values alone, which
    `lax.linalg.eigh` never does.
    """

    def one(x):
        return lax.linalg.eigh(x, symmetrize_input=False)[1]

    values = lax.platform_dependent(
        symmetric, cpu=lambda x: _one_by_one(_lapack_values, x), default=one
    )
    return values[..., ::-1]


def _one_by_one(f, symmetric: Float[Array, "*p r r"]):
    """Takes a stack one matrix at a time.

    XLA spreads a batched LAPACK call over its thread pool, and two such calls in one
    program can wait for each other.
    """
    *batch, r, _ = symmetric.shape
    matrices = symmetric.reshape(-1, r, r)
    if len(matrices) == 1:
        out = jax.tree.map(lambda x: x[None], f(matrices[0]))
    else:
        out = lax.map(f, matrices)
    return jax.tree.map(lambda x: x.reshape(*batch, *x.shape[1:]), out)


def _lapack_values(symmetric: Float[Array, "r r"]) -> Float[Array, " r"]:
    target = lapack.prepare_lapack_call("syevd_ffi", symmetric.dtype)
    shape, dtype = symmetric.shape, symmetric.dtype
    call = jax.ffi.ffi_call(
        target,
        (
            jax.ShapeDtypeStruct(shape, dtype),
            jax.ShapeDtypeStruct(shape[-1:], dtype),
            jax.ShapeDtypeStruct((), jnp.int32),
        ),
        input_output_aliases={0: 0},
    )
    no_vectors, triangle = np.uint8(ord("N")), np.uint8(ord("L"))
    _, values, info = call(symmetric, mode=no_vectors, uplo=triangle)
    return jnp.where(info == 0, values, jnp.nan)


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
    return from_gram(gram(x, axis_name=axis_name), k)


def from_gram(symmetric: Float[Array, "*p r r"], k: int) -> Factors:
    """`factor` of the matrix with this Gram matrix of its short side."""
    if k == 0:
        return from_squares(eigenvalues(symmetric), symmetric[..., :0, :])
    squares, vectors = eigenvectors(symmetric)
    return from_squares(squares, vectors[..., :k, :])


def from_squares(
    squares: Float[Numbers, "*p r"], vectors: Float[Numbers, "*p k r"]
) -> Factors:
    """Factors from the eigenvalues of a Gram matrix and its leading eigenvectors."""
    xp = squares.__array_namespace__()
    values = xp.sqrt(xp.maximum(squares, 0))
    leading = values[..., : vectors.shape[-2]]
    known = leading > floor(values[..., None, :])
    scale = xp.where(known, 1 / xp.where(known, leading, 1), 0)
    return Factors(values, vectors, scale)


def floor(values: Float[Numbers, "*p r"]) -> Float[Numbers, "*p"]:
    """The size below which a singular value from a Gram matrix is rounding noise."""
    eps = float(jnp.finfo(values.dtype).eps)
    return values[..., 0] * math.sqrt(eps * values.shape[-1])


def is_defined(values: Float[Numbers, "*p r"], k: int) -> Bool[Numbers, "*p"]:
    """Whether the leading k-dimensional subspace exists and is unique.

    It is not where the rank is below k, or where sigma_k equals sigma_{k+1} to within
    rounding, as in an identity matrix.
    """
    defined = values[..., k - 1] > floor(values)
    if k < values.shape[-1]:
        squares = values**2
        gap = squares[..., k - 1] - squares[..., k]
        noise = 1000 * float(jnp.finfo(values.dtype).eps) * squares[..., 0]
        defined &= gap > noise
    return defined
