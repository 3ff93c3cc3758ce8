"""What an objective takes and returns."""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from geomjax.typing import Params


class Batch(NamedTuple):
    """Token sequences to train on.

    Attributes:
      tokens: `[B, S]` int32.
      positions: `[B, S]` int32, place of each token in its own sequence.
      segment_ids: `[B, S]` int32, 0 for padding.
      weights: `[B, S]` float32, weight of each token as a target. They sum to one over
        a mini-batch and are 0 for prompts and padding, so that a loss is
        `sum(weights * token_loss)` and the losses of micro-batches simply add.
      behaviour_log_probs: `[B, S]` float32, log-probability with which each target was
        sampled; 0 where it was not sampled.
    """

    tokens: Int[Array, "B S"]
    positions: Int[Array, "B S"]
    segment_ids: Int[Array, "B S"]
    weights: Float[Array, "B S"]
    behaviour_log_probs: Float[Array, "B S"]


Metrics = dict[str, Float[Array, ""]]

Objective = Callable[[Params, Params, Batch], tuple[Float[Array, ""], Metrics]]
"""`(params, context, batch) -> (loss, metrics)`, differentiated in `params`.

`context` holds parameters that are not trained, such as the teacher's. Loss and metrics
are sums over tokens with the batch's weights, so they too add over micro-batches.
"""


def token_mean(completion: Bool[Array, "B S"]) -> Float[Array, "B S"]:
    """Equal weights on all targets of a mini-batch, summing to one.

    The first slot can be no target, as nothing precedes it.
    """
    target = completion.at[:, 0].set(False).astype(jnp.float32)
    return target / jnp.maximum(target.sum(), 1.0)


def weighted_sum(
    values: Float[Array, "*axes"], weights: Float[Array, "*axes"]
) -> Float[Array, ""]:
    """`sum(weights * values)` where the weight is not 0: padding may hold anything."""
    return jnp.sum(jnp.where(weights != 0, values, 0.0) * weights)


def shift_targets(batch: Batch) -> tuple[Int[Array, "B s"], Batch]:
    """Aligns each hidden state with the token it predicts, s = S - 1.

    Returns:
      The targets `[B, S - 1]`, and the batch with `weights` and `behaviour_log_probs`
      of those targets; hidden states are to be cut with `hidden[:, :-1]`.
    """
    return batch.tokens[:, 1:], batch._replace(
        weights=batch.weights[:, 1:],
        behaviour_log_probs=batch.behaviour_log_probs[:, 1:],
    )
