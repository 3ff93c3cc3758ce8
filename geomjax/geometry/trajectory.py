"""How an update grows: its leading right subspace against that of another time."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from geomjax.geometry.blocks import fold, transpose
from geomjax.geometry.factor import Factors, matmul


def right_similarity(
    a: Float[Array, "*p m n"],
    b: Float[Array, "*p m n"],
    a_factors: Factors,
    b_factors: Factors,
) -> Float[Array, "*p"]:
    """P2's `Sim_K = ||V_K(a)^T V_K(b)||_F^2 / K`, of right singular vectors.

    Args:
        a: an update.
        b: another of the same tensor.
        a_factors: its factors with K vectors.
        b_factors: those of b.

    Returns:
        The similarity in [0, 1]; chance is about K / n.
    """
    m, n = a.shape[-2:]
    dtype, k = a_factors.values.dtype, a_factors.short.shape[-2]
    if m >= n:
        cosines = matmul(a_factors.short, transpose(b_factors.short))
    else:

        def part(a_block, b_block, fresh):
            left = a_factors.long_rows(a_block.astype(dtype))
            return matmul(left, transpose(b_factors.long_rows(b_block.astype(dtype))))

        cosines = fold(part, a, b)
    return jnp.sum(jnp.square(cosines), axis=(-2, -1)) / k
