"""How many coordinates moved, and how much of the update the largest of them carry."""

import math
from collections.abc import Sequence

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from geomjax.geometry.select import kth_smallest, magnitude_key


def energy(x: Float[Array, "*p n"]) -> Float[Array, "*p"]:
    """Sum of squares of each row, in the widest enabled float."""
    wide = x.astype(jnp.result_type(float))
    return jnp.sum(jnp.square(wide), axis=-1)


def fraction_within(
    x: Float[Array, "*p n"], tolerances: Float[Array, "*p t"]
) -> Float[Array, "*p t"]:
    """Share of entries with `|x| <= tolerance`, for several tolerances.

    Args:
        x: float32 values.
        tolerances: thresholds in the widest enabled float; the comparison is exact.

    Returns:
        Shares in [0, 1].
    """
    dtype = tolerances.dtype
    magnitude = jnp.abs(x)

    def share(tolerance):
        inside = magnitude.astype(dtype) <= tolerance[..., None]
        return jnp.mean(inside, axis=-1, dtype=dtype)

    return jnp.moveaxis(lax.map(share, jnp.moveaxis(tolerances, -1, 0)), 0, -1)


def fraction_below(
    x: Float[Array, "*p n"], tolerances: Float[Array, "*p t"]
) -> Float[Array, "*p t"]:
    """`fraction_within` with a strict comparison."""
    return fraction_within(x, jnp.nextafter(tolerances, jnp.zeros_like(tolerances)))


def bf16_unchanged(
    source: Float[Array, "*p n"], tuned: Float[Array, "*p n"], eta: float = 1e-3
) -> Float[Array, "*p"]:
    """P2's share of `|w' - w| <= eta * max(|w|, |w'|)` on bfloat16 values.

    As eta is below half a unit in the last place of bfloat16, this is equality.
    """
    values = jnp.maximum(jnp.abs(source), jnp.abs(tuned))
    same = jnp.abs(tuned - source) <= jnp.asarray(eta, source.dtype) * values
    return jnp.mean(same, axis=-1, dtype=jnp.result_type(float))


def top_count(fraction: float, numel: int) -> int:
    """ceil(fraction * numel), at least 1: the size of every mask given by a share."""
    return min(numel, max(1, math.ceil(fraction * numel)))


def coordinate_energy(
    x: Float[Array, "*p n"], fractions: Sequence[float], *, low_bits: bool = True
) -> Float[Array, "*p f"]:
    """P1 eq. (17): energy of the ceil(fraction * n) largest entries, over all energy.

    Args:
        x: D, in float32.
        fractions: shares of the coordinates, in (0, 1].
        low_bits: False where the values are bfloat16 ones, see `kth_smallest`.

    Returns:
        Shares of the energy; NaN where x is zero.
    """
    n = x.shape[-1]
    dtype = jnp.result_type(float)
    key = magnitude_key(x)
    counts = jnp.asarray([top_count(f, n) for f in fractions], jnp.int32)
    counts = jnp.broadcast_to(counts, (*x.shape[:-1], len(fractions)))
    cut = kth_smallest(key, n - counts + 1, low_bits=low_bits)

    def above(threshold):
        larger = key > threshold[..., None]
        return energy(jnp.where(larger, x, 0))

    larger_energy = lax.map(above, jnp.moveaxis(cut.threshold, -1, 0))
    value = lax.bitcast_convert_type(cut.threshold, jnp.float32).astype(dtype)
    # Entries equal to the threshold carry equal energy: which of them are taken is
    # without effect.
    from_tied = (counts - (n - cut.below - cut.tied)).astype(dtype) * jnp.square(value)
    return (jnp.moveaxis(larger_energy, 0, -1) + from_tied) / energy(x)[..., None]
