"""Null updates: what the same numbers would be if training had no structure.

A null has the update's norm and nothing else of it: what an update's columns show
beyond its null's is the training's doing. Two of them, from g standard normal:

    gaussian   W' = W + g ||D|| / ||g||, for spectra and subspaces
    rounded    W' = bfloat16(W + c g) with c such that ||W' - W|| = ||D||: how much of
               the sparsity, the near-zero bias and the coverage by masks comes from the
               number format

A tensor is drawn in chunks of its entries, in its own order, so that a few compiled
programs serve tensors of every shape. `||W' - W||` of the second grows with c in steps,
of which the one nearest to the norm from above is taken, by bisection of c.
"""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from geomjax.typing import PRNGKey

CHUNKS = (1 << 12, 1 << 16, 1 << 20)
"""Entries of a chunk: the least that holds the tensor, or the greatest of them."""
_LARGEST = 1e30


def chunk_length(numel: int) -> int:
    """Entries of the chunks of a tensor with so many."""
    return next((size for size in CHUNKS if numel <= size), CHUNKS[-1])


@partial(jax.jit, static_argnames="length")
def noise(
    key: PRNGKey, index: Int[Array, ""], count: Int[Array, ""], *, length: int
) -> Float[Array, " n"]:
    """A chunk of g.

    Args:
        key: PRNG key of the tensor.
        index: number of the chunk.
        count: entries of it that are the tensor's; the others are 0.
        length: entries of it.

    Returns:
        The chunk in float32.
    """
    drawn = jax.random.normal(jax.random.fold_in(key, index), (length,), jnp.float32)
    return jnp.where(jnp.arange(length, dtype=jnp.int32) < count, drawn, 0)


@jax.jit
def gaussian(
    source: Float[Array, " n"], drawn: Float[Array, " n"], scale: Float[Array, ""]
) -> Float[Array, " n"]:
    """A chunk of W' = W + scale g in float32."""
    return source.astype(jnp.float32) + scale.astype(jnp.float32) * drawn


@jax.jit
def rounded(
    source: Float[Array, " n"], drawn: Float[Array, " n"], scale: Float[Array, ""]
) -> Float[Array, " n"]:
    """A chunk of W' = bfloat16(W + scale g), from W holding bfloat16 values."""
    return _moved(source, drawn, scale).astype(jnp.bfloat16)


@jax.jit
def _moved_energy(source, drawn, scale):
    moved = _moved(source, drawn, scale) - source.astype(jnp.float32)
    return jnp.sum(jnp.square(moved.astype(jnp.result_type(float))))


def _moved(source, drawn, scale):
    out = source.astype(jnp.float32) + scale.astype(jnp.float32) * drawn
    return lax.reduce_precision(out, exponent_bits=8, mantissa_bits=7)


def rounded_scale(
    source: Sequence[Float[Array, " n"]],
    drawn: Sequence[Float[Array, " n"]],
    norm: float,
) -> np.float32:
    """The least c, in float32, for which ||bfloat16(W + c g) - W|| is the norm or more.

    Args:
        source: W in chunks, holding bfloat16 values.
        drawn: g, likewise.
        norm: Frobenius norm of the update.

    Returns:
        c; 0 for a norm of 0.
    """
    if not norm > 0:
        return np.float32(0)

    def enough(c: np.float32) -> bool:
        parts = [_moved_energy(w, g, c) for w, g in zip(source, drawn, strict=True)]
        return sum(map(float, parts)) >= norm * norm

    # Past this c the rounding, at most |w'| / 256, cannot bring the norm down to it.
    high = np.float32(4 * norm / np.sqrt(energy(drawn)) + 1e-30)
    while not enough(high) and high < _LARGEST:
        high *= np.float32(4)
    low = np.float32(0)
    while np.nextafter(low, high) < high:
        middle = low + (high - low) / np.float32(2)
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high


@jax.jit
def _energy(x):
    return jnp.sum(jnp.square(x.astype(jnp.result_type(float))))


def energy(chunks: Sequence[Float[Array, " n"]]) -> float:
    """Sum of squares over chunks, in the widest enabled float."""
    return sum(float(part) for part in [_energy(x) for x in chunks])
