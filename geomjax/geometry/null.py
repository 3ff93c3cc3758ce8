"""Null updates: what the same numbers would be if training had no structure.

A null has the update's norm and nothing else of it: what an update's columns show
beyond its null's is the training's doing.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from geomjax.typing import PRNGKey

_HALVINGS = 60


def gaussian(
    key: PRNGKey, norm: Float[Array, ""], shape: tuple[int, ...]
) -> Float[Array, "..."]:
    """D0 = g * norm / ||g||_F with g standard normal, for spectra and subspaces.

    Args:
        key: PRNG key.
        norm: Frobenius norm of the update.
        shape: its shape.

    Returns:
        D0 in float32.
    """
    g = jax.random.normal(key, shape, jnp.float32)
    return g * (norm.astype(jnp.float32) / jnp.linalg.norm(g))


def rounded(
    key: PRNGKey, source: Float[Array, "*s"], norm: Float[Array, ""]
) -> Float[Array, "*s"]:
    """W' = bfloat16(W + c * g) with c such that ||W' - W||_F is the norm.

    Shows how much of the sparsity, the near-zero bias and the coverage by masks comes
    from the number format. `||W' - W||` grows with c in steps, of which the one nearest
    to the norm from above is taken, by bisection of c.

    Args:
        key: PRNG key.
        source: W, holding bfloat16 values.
        norm: Frobenius norm of the update to match.

    Returns:
        W' in bfloat16.
    """
    w = source.astype(jnp.float32)
    g = jax.random.normal(key, source.shape, jnp.float32)
    # Past this c the rounding, at most |w'| / 256, cannot bring the norm down to it.
    top = 4 * norm / jnp.linalg.norm(g.astype(norm.dtype)) + 1e-30

    def moved(c):
        out = w + c.astype(jnp.float32) * g
        return lax.reduce_precision(out, exponent_bits=8, mantissa_bits=7)

    def size(c):
        return jnp.linalg.norm((moved(c) - w).astype(norm.dtype))

    def grow(bounds):
        return bounds[0], bounds[1] * 4

    low, high = lax.while_loop(
        lambda bounds: (size(bounds[1]) < norm) & (bounds[1] < 1e30),
        grow,
        (jnp.zeros_like(top), top),
    )

    def halve(_, bounds):
        low, high = bounds
        middle = (low + high) / 2
        short = size(middle) < norm
        return jnp.where(short, middle, low), jnp.where(short, high, middle)

    _, c = lax.fori_loop(0, _HALVINGS, halve, (low, high))
    return jnp.where(norm > 0, moved(c), w).astype(jnp.bfloat16)
