"""The clipped policy gradient that every advantage shares."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from geomjax.objectives.base import (
    Batch,
    Metrics,
    Objective,
    shift_targets,
    target_hidden,
    weighted_sum,
)
from geomjax.objectives.vocabulary import DEFAULT_CHUNK_TOKENS, token_log_probs
from geomjax.typing import LanguageModel, Params


class Clip(NamedTuple):
    """Bounds of the importance ratio, `1 - low` and `1 + high`.

    P2 and DAPO use (0.2, 0.28), and P2 (1, 1) on rollouts of the teacher.
    """

    low: float
    high: float

    def check(self) -> None:
        """Raises ValueError unless 0 <= low <= 1 and 0 <= high."""
        if not (0 <= self.low <= 1 and 0 <= self.high < float("inf")):
            raise ValueError(
                f"clip is ({self.low}, {self.high}); expected low from 0 to 1, and "
                "high of 0 or more"
            )


def clipped_surrogate(
    log_probs: Float[Array, "B s"],
    behaviour: Float[Array, "B s"],
    advantage: Float[Array, "B s"],
    weights: Float[Array, "B s"],
    clip: Clip,
) -> tuple[Float[Array, ""], Metrics]:
    """PPO's loss, `-sum_t w_t min(rho_t A_t, clip(rho_t, 1 - low, 1 + high) A_t)`.

    `rho_t = pi(a_t) / pi_behaviour(a_t)`; the advantage must be constant.

    Returns:
      The loss, and the metrics `ratio` and `clip_fraction`.
    """
    # A padded slot's log-probability is arbitrary, and exp of it may overflow.
    ratio = jnp.exp(jnp.where(weights != 0, log_probs - behaviour, 0.0))
    clipped = jnp.clip(ratio, 1 - clip.low, 1 + clip.high)
    surrogate = jnp.minimum(ratio * advantage, clipped * advantage)
    metrics = {
        "ratio": weighted_sum(ratio, weights),
        "clip_fraction": weighted_sum(
            (clipped * advantage < ratio * advantage).astype(weights.dtype), weights
        ),
    }
    return -weighted_sum(surrogate, weights), metrics


def policy_gradient(
    student: LanguageModel,
    *,
    temperature: float,
    clip: Clip,
    chunk_tokens: int = DEFAULT_CHUNK_TOKENS,
) -> Objective:
    """`clipped_surrogate` with the advantages that the batch carries.

    The one objective of GRPO, of its mixtures with distillation and of distillation
    with token sparsification or on foreign rollouts: they differ in `batch.advantages`
    alone, so that their runs share one compiled program.

    Args:
      student: The model that is trained.
      temperature: That of the rollout.
      clip: Bounds of the importance ratio.
      chunk_tokens: Tokens whose logits exist at a time.

    Returns:
      The objective; it ignores its context. Metrics: `ratio` and `clip_fraction`.

    Raises:
      ValueError: Bounds out of range; when called, a batch without advantages.
    """
    clip.check()

    def objective(params: Params, context: Params, batch: Batch):
        del context
        targets, shifted = shift_targets(batch)
        if shifted.advantages is None:
            raise ValueError("policy_gradient: the batch carries no advantages")
        log_probs = token_log_probs(
            student,
            params,
            target_hidden(student, params, batch),
            targets,
            temperature=temperature,
            chunk_tokens=chunk_tokens,
        )
        return clipped_surrogate(
            log_probs,
            shifted.behaviour_log_probs,
            shifted.advantages,
            shifted.weights,
            clip,
        )

    return objective
