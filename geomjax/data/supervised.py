"""Prompts with given responses, in the layout that rollouts have."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int32

from geomjax.data.batches import pad_prompts


class Responses(NamedTuple):
    """Sequences of which a part are targets: padded (S = P + R), or packed into rows.

    `completion` is True on the response's tokens, which are the targets; positions and
    segments are as in `PromptBatch`.
    """

    tokens: Int32[np.ndarray, "B S"]
    positions: Int32[np.ndarray, "B S"]
    segment_ids: Int32[np.ndarray, "B S"]
    completion: Bool[np.ndarray, "B S"]


def pad_responses(
    prompts: Sequence[Int32[np.ndarray, "_"]],
    responses: Sequence[Int32[np.ndarray, "_"]],
    *,
    prompt_length: int,
    response_length: int,
    pad_id: int,
) -> Responses:
    """Joins prompts and responses so that every response starts in column P.

    Args:
      prompts: Token ids of the prompts, each of at most `prompt_length`.
      responses: Token ids of the responses, the stop token included.
      prompt_length: P, in tokens.
      response_length: R, in tokens.
      pad_id: The token id on padding.

    Returns:
      The padded sequences.

    Raises:
      ValueError: A prompt or a response is longer than its part, or there is not one
        response for each prompt.
    """
    if len(prompts) != len(responses):
        raise ValueError(
            f"got {len(prompts)} prompts and {len(responses)} responses; expected one "
            "response for each prompt"
        )
    left = pad_prompts(prompts, prompt_length, pad_id)
    lengths = np.array([len(ids) for ids in responses], np.int32)
    if lengths.max(initial=0) > response_length:
        worst = int(lengths.argmax())
        raise ValueError(
            f"response {worst} has {lengths[worst]} tokens, expected at most "
            f"{response_length}"
        )
    right = np.full((len(responses), response_length), pad_id, np.int32)
    for row, ids in zip(right, responses, strict=True):
        row[: len(ids)] = ids
    column = np.arange(response_length, dtype=np.int32)[None, :]
    real = column < lengths[:, None]
    following = left.positions[:, -1:] + 1 + column
    return Responses(
        tokens=np.concatenate([left.tokens, right], axis=1),
        positions=np.concatenate(
            [left.positions, np.where(real, following, 0)], axis=1
        ),
        segment_ids=np.concatenate([left.segment_ids, real.astype(np.int32)], axis=1),
        completion=np.concatenate([np.zeros_like(left.tokens, bool), real], axis=1),
    )
