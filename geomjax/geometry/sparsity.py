"""How many coordinates moved, and how much of the update the largest of them carry."""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from geomjax.geometry import select
from geomjax.geometry.factor import Numbers


def energy(x: Float[Array, "*p n"]) -> Float[Array, "*p"]:
    """Sum of squares of each row, in the widest enabled float."""
    wide = x.astype(jnp.result_type(float))
    return jnp.sum(jnp.square(wide), axis=-1)


def fraction(mask: Bool[Array, "*p n"]) -> Float[Array, "*p"]:
    """Share of true entries, counted in integers."""
    count = jnp.sum(mask, axis=-1, dtype=jnp.result_type(int))
    return count.astype(jnp.result_type(float)) / mask.shape[-1]


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
    magnitude = jnp.abs(x)
    limits = float32_upto(tolerances)

    def share(limit):
        return fraction(magnitude <= limit[..., None])

    # Unrolled: XLA's CPU backend runs the body of a loop on one core.
    shares = [share(limits[..., i]) for i in range(limits.shape[-1])]
    return jnp.stack(shares, axis=-1)


def float32_upto(tolerances: Float[Numbers, "*s"]) -> Float[Numbers, "*s"]:
    """The largest float32 up to each: float32 values compare with both alike."""
    xp = tolerances.__array_namespace__()
    nearest = tolerances.astype(xp.float32)
    down = xp.nextafter(nearest, xp.zeros_like(nearest))
    return xp.where(nearest.astype(tolerances.dtype) > tolerances, down, nearest)


def bf16_same(
    source: Float[Array, "*s"], tuned: Float[Array, "*s"], eta: float = 1e-3
) -> Bool[Array, "*s"]:
    """P2's `|w' - w| <= eta * max(|w|, |w'|)` on bfloat16 values.

    As eta is below half a unit in the last place of bfloat16, this is equality.
    """
    values = jnp.maximum(jnp.abs(source), jnp.abs(tuned))
    return jnp.abs(tuned - source) <= jnp.asarray(eta, source.dtype) * values


def bf16_unchanged(
    source: Float[Array, "*p n"], tuned: Float[Array, "*p n"]
) -> Float[Array, "*p"]:
    """Share of the entries whose bfloat16 value did not move, see `bf16_same`."""
    return fraction(bf16_same(source, tuned))


def top_count(fraction: float, numel: int) -> int:
    """ceil(fraction * numel), at least 1: the size of every mask given by a share."""
    return min(numel, max(1, math.ceil(fraction * numel)))


def energy_above(
    x: Float[Array, "*p m n"], thresholds: Float[Array, "*p f"]
) -> Float[Array, "*p f"]:
    """Energy of the entries with `|x| > threshold`, for several float32 thresholds."""
    dtype = jnp.result_type(float)

    def above(value):
        larger = jnp.abs(x).astype(jnp.float32) > value[..., None, None]
        kept = jnp.where(larger, x, jnp.zeros_like(x)).astype(dtype)
        return jnp.sum(jnp.square(kept), axis=(-2, -1))

    parts = [above(thresholds[..., i]) for i in range(thresholds.shape[-1])]
    return jnp.stack(parts, axis=-1)


def energy_beyond(
    counts: Int[np.ndarray, "p bins"], thresholds: Float[np.ndarray, "p f"]
) -> Float[np.ndarray, "p f"]:
    """`energy_above` of bfloat16 values, from their histogram.

    Args:
        counts: `select.count_level` of `select.magnitude_key`, summed.
        thresholds: for each row.
    """
    values = select.magnitudes()
    energies = counts[:, : len(values)] * np.square(values)
    # Of the values from each on, and of none; the smallest are added last.
    total = np.pad(np.cumsum(energies[:, ::-1], axis=-1), ((0, 0), (1, 0)))
    bins = np.searchsorted(values, thresholds, side="right")
    return np.take_along_axis(total, len(values) - bins, axis=-1)
