"""Numbers that are functions of singular values alone.

`values` are all singular values of one matrix, or of a stack, in descending order.
A zero matrix gives NaN wherever the definition divides by its size.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float


def stable_rank(values: Float[Array, "*p r"]) -> Float[Array, "*p"]:
    """Stable rank, P1 eq. (20): `||D||_F^2 / sigma_1^2`, in [1, r].

    Differs from the public script in carrying no constant beside sigma_1^2.
    """
    return jnp.sum(jnp.square(values / values[..., :1]), axis=-1)


def entropy_rank(values: Float[Array, "*p r"]) -> Float[Array, "*p"]:
    """`exp(-sum p_i log p_i)` with `p_i = sigma_i / sum sigma`, in [1, r]."""
    p = values / jnp.sum(values, axis=-1, keepdims=True)
    log_p = jnp.log(jnp.where(p > 0, p, 1))
    return jnp.exp(-jnp.sum(p * log_p, axis=-1))


def rank_fraction(values: Float[Array, "*p r"], threshold: float) -> Float[Array, "*p"]:
    """Numerical rank, P1 eq. (21), over r: share of `sigma_i > threshold * sigma_1`."""
    above = values > threshold * values[..., :1]
    fraction = jnp.mean(above, axis=-1, dtype=values.dtype)
    return jnp.where(values[..., 0] > 0, fraction, jnp.nan)


def top_energy(values: Float[Array, "*p r"], k: int) -> Float[Array, "*p"]:
    """P1 eq. (19): `sum_{i<=k} sigma_i^2 / sum sigma_i^2`, 1 where k exceeds r."""
    squares = jnp.square(values)
    return jnp.sum(squares[..., :k], axis=-1) / jnp.sum(squares, axis=-1)


def hill_exponent(values: Float[Array, "*p r"], k: int) -> Float[Array, "*p"]:
    """Hill estimate of the tail exponent from the k leading singular values, P2.

    `[1/(k-1) sum_{i<k} log(sigma_i / sigma_k)]^-1`. P2 does not state its k.

    Args:
        values: singular values, in descending order.
        k: at least 2 and at most r.

    Returns:
        The exponent; NaN where sigma_k is 0 or the k values are equal.

    Raises:
        ValueError: k is out of range.
    """
    r = values.shape[-1]
    if not 2 <= k <= r:
        raise ValueError(f"k={k}: a Hill estimate of {r} values needs 2 <= k <= {r}")
    smallest = values[..., k - 1 : k]
    safe = jnp.where(smallest > 0, smallest, 1)
    logs = jnp.log(jnp.where(smallest > 0, values[..., : k - 1] / safe, 1))
    mean = jnp.mean(logs, axis=-1)
    return jnp.where(mean > 0, 1 / jnp.where(mean > 0, mean, 1), jnp.nan)


def shift(
    source: Float[Array, "*p r"], tuned: Float[Array, "*p r"]
) -> Float[Array, "*p"]:
    """`||sigma(W') - sigma(W)||_2`, the numerator of both spectral shifts."""
    return jnp.linalg.norm(tuned - source, axis=-1)


def default_hill_rank(r: int) -> int:
    """K = max(2, r // 10): our choice, which leaves a tenth of the spectrum."""
    return max(2, r // 10)


def default_angle_rank(r: int) -> int:
    """Rank of the principal angles: 512 as in P2 where r >= 1024, half of r below."""
    return 512 if r >= 1024 else r // 2


def leading_rank(fraction: float, r: int) -> int:
    """P1's k = max(1, floor(fraction * r))."""
    return max(1, int(fraction * r))
