"""The reward of a completion that must be one sequence of tokens, on the device."""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Int32


def token_match(
    completions: Int[Array, "B R"], answers: Int[Array, "B R"]
) -> Float[Array, " B"]:
    """1 where a completion is its answer, token for token, else 0.

    Stricter than `exact_match` where a tokenizer writes one text in several ways.

    Args:
      completions: Sampled tokens, padded after the stop token.
      answers: As `pad_answers` makes them, with the same token on padding.

    Returns:
      Rewards, float32.
    """
    return (completions == answers).all(axis=1).astype(jnp.float32)


def pad_answers(
    answers: Sequence[Int32[np.ndarray, "_"]], length: int, pad_id: int
) -> Int32[np.ndarray, "B R"]:
    """Answers in the slots of completions.

    Args:
      answers: Token ids, each with its stop token.
      length: Most tokens of a completion, R.
      pad_id: The token on padding.

    Returns:
      The padded answers.

    Raises:
      ValueError: An answer, stop token included, is longer than a completion may be.
    """
    longest = max((len(ids) for ids in answers), default=0)
    if longest > length:
        raise ValueError(
            f"an answer has {longest} tokens with its stop token, and max_new_tokens "
            f"is {length}: it could never be given"
        )
    padded = np.full((len(answers), length), pad_id, np.int32)
    for row, ids in zip(padded, answers, strict=True):
        row[: len(ids)] = ids
    return padded
