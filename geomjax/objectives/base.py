"""What an objective takes and returns."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from geomjax.typing import LanguageModel, Params, prompted


class Batch(NamedTuple):
    """Token sequences to train on.

    Attributes:
      tokens: `[B, S]` int32.
      positions: `[B, S]` int32, place of each token in its own sequence.
      segment_ids: `[B, S]` int32, 0 for padding.
      weights: `[B, R]` float32, weight of the tokens in the last R slots as targets,
        R <= S; the others are none, and nothing is computed for them alone. They sum
        to one over a mini-batch and are 0 for prompts and padding, so that a loss is
        `sum(weights * token_loss)` and the losses of micro-batches simply add.
      behaviour_log_probs: `[B, R]` float32, log-probability with which each of these
        was sampled; 0 where it was not sampled.
      advantages: `[B, R]` float32, constant, for the objectives that take them; None
        otherwise.
      images: The images of the rows, as the model's `with_images` takes them; None for
        text.
    """

    tokens: Int[Array, "B S"]
    positions: Int[Array, "B S"]
    segment_ids: Int[Array, "B S"]
    weights: Float[Array, "B R"]
    behaviour_log_probs: Float[Array, "B R"]
    advantages: Float[Array, "B R"] | None = None
    images: Any = None


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
    """The tokens that are targets, s = min(R, S - 1): the first slot can be none.

    Returns:
      The targets `[B, s]`, and the batch with `weights`, `behaviour_log_probs` and
      `advantages` of those targets; `target_hidden` gives the hidden states that
      predict them.
    """
    count = _target_count(batch)
    advantages = batch.advantages
    return batch.tokens[:, -count:], batch._replace(
        weights=batch.weights[:, -count:],
        behaviour_log_probs=batch.behaviour_log_probs[:, -count:],
        advantages=None if advantages is None else advantages[:, -count:],
    )


def target_hidden(
    model: LanguageModel, params: Params, batch: Batch
) -> Float[Array, "B s D"]:
    """Hidden states of the slots before the targets; the last token is never read."""
    inputs = batch.tokens, batch.positions, batch.segment_ids
    tokens, positions, segment_ids = (x[:, :-1] for x in inputs)
    last = _target_count(batch)
    model = prompted(model, batch.images)
    return model.apply(params, tokens, positions, segment_ids, last=last)


def _target_count(batch: Batch) -> int:
    return min(batch.weights.shape[1], batch.tokens.shape[1] - 1)
