"""Puts a teacher's view of a completion beside the student's, in one row."""

import jax
import jax.numpy as jnp

from geomjax.data.batches import PromptBatch
from geomjax.rollout.sample import Rollout


def join_views(drawn: Rollout, privileged: PromptBatch, last: int) -> Rollout:
    """Rows as `geomjax.objectives.privileged` describes them.

    Args:
      drawn: `[B, S]`, completions in the last slots.
      privileged: `[B, P]`, the teacher's prompts, row for row.
      last: Slots of the completion.

    Returns:
      The rows, `[B, P + last + S]`; nothing of the teacher's view is a target.

    Raises:
      ValueError: The prompts have images, for which the rows have no place.
    """
    if drawn.images is not None:
        raise ValueError("privileged views are of text; the prompts have images")
    start = drawn.tokens.shape[1] - last
    real = drawn.segment_ids[:, start:]
    # A completion goes on where its prompt ended, whichever prompt it is.
    ahead = jnp.arange(1, last + 1, dtype=jnp.int32)[None]
    place = privileged.positions[:, -1:] + ahead
    tokens, positions, segment_ids = (
        jnp.concatenate([prompt, completion], axis=1)
        for prompt, completion in (
            (privileged.tokens, drawn.tokens[:, start:]),
            (privileged.positions, jnp.where(real > 0, place, 0)),
            (privileged.segment_ids, real),
        )
    )
    none = jnp.zeros(tokens.shape, bool)
    view = Rollout(
        tokens, positions, segment_ids, none, none.astype(drawn.log_probs.dtype)
    )
    return jax.tree.map(lambda *pair: jnp.concatenate(pair, axis=1), view, drawn)
