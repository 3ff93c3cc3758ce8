"""Advantages of distillation, thinned out and mixed with those of a reward (P2)."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


def mix_advantages(
    alpha: Float[Array, ""],
    distillation: Float[Array, "B S"],
    reward: Float[Array, " B"],
) -> Float[Array, "B S"]:
    """`A_t = alpha A_OPD,t + (1 - alpha) A_RLVR`, P2's mixture.

    The distillation advantage `log pi_T(a_t) - log pi(a_t)` enters raw, in nats, as P2
    has it; the reward's is the group-normalised one, the same for all tokens of a row.

    Args:
      alpha: Share of distillation, in [0, 1].
      distillation: Advantages of the tokens.
      reward: Advantages of the rows.

    Returns:
      The advantages of the tokens.
    """
    return alpha * distillation + (1 - alpha) * reward[:, None]


def keep_tokens(
    scores: Float[Array, "B S"],
    completion: Bool[Array, "B S"],
    share: Float[Array, ""],
) -> Bool[Array, "B S"]:
    """The tokens of each completion with the highest scores.

    Args:
      scores: The gap `r_t = log pi(a_t) - log pi_T(a_t)` for P2's "top" tokens, or
        random numbers for its control. Of equal scores the earlier token is kept.
      completion: The tokens to choose from.
      share: rho in (0, 1]; of T tokens `ceil(rho T)` are kept.

    Returns:
      The chosen tokens.
    """
    lengths = completion.sum(axis=1, keepdims=True)
    # Not one more where the float32 product lies a rounding error above a whole number.
    count = jnp.ceil(share * lengths.astype(jnp.float32) * (1 - 1e-6))
    order = jnp.argsort(jnp.where(completion, -scores, jnp.inf), axis=1, stable=True)
    rank = jnp.argsort(order, axis=1, stable=True)
    return completion & (rank < count.astype(rank.dtype))


def rescaled(
    advantages: Float[Array, "B S"],
    completion: Bool[Array, "B S"],
    kept: Bool[Array, "B S"],
) -> Float[Array, "B S"]:
    """P2's sparsified signal, `T / sum(m) * m_t A_t` in each row.

    Args:
      advantages: A_t.
      completion: The T tokens of each row.
      kept: m, those of them that are kept.

    Returns:
      The advantages; the tokens that are not kept have 0.
    """
    total = completion.sum(axis=1, keepdims=True).astype(advantages.dtype)
    number = kept.sum(axis=1, keepdims=True).astype(advantages.dtype)
    return jnp.where(kept, advantages * (total / jnp.maximum(number, 1.0)), 0.0)
