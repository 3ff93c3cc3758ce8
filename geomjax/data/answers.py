"""Completions back to text, and their scores."""

from collections.abc import Collection
from typing import NamedTuple

import numpy as np
from jaxtyping import Array, Int
from transformers import PreTrainedTokenizerFast


class Completion(NamedTuple):
    """A completion's text, and whether it ended by itself or was cut off."""

    text: str
    stopped: bool


class Score(NamedTuple):
    """A score in [0, 1] and why it was given."""

    value: float
    reason: str


def decode_completions(
    tokens: Int[Array | np.ndarray, "B T"],
    tokenizer: PreTrainedTokenizerFast,
    stop_ids: Collection[int],
) -> list[Completion]:
    """Decodes each completion up to its first stop token.

    Other special tokens are kept in the text, so that a completion that holds one
    does not pass for one that does not.

    Args:
        tokens: sampled token ids, without the prompt; what follows a stop token is
            ignored.
        tokenizer: the tokenizer.
        stop_ids: the ids that end a completion.

    Returns:
        One completion per row, without its stop token.
    """
    stops = frozenset(stop_ids)
    rows = np.asarray(tokens).tolist()
    ends = [
        next((i for i, token in enumerate(row) if token in stops), None) for row in rows
    ]
    texts = tokenizer.batch_decode(
        [row[:end] for row, end in zip(rows, ends, strict=True)],
        skip_special_tokens=False,
        clean_up_tokenization_spaces=False,
    )
    return [
        Completion(text, stopped=end is not None)
        for text, end in zip(texts, ends, strict=True)
    ]


def exact_match(completion: str, answer: str) -> Score:
    r"""Scores 1 if both texts are equal up to whitespace, else 0.

    Runs of whitespace count as one space, and none at either end.

    Examples:
        >>> exact_match(" 3 1\n", "3  1")
        Score(value=1.0, reason='equal')
        >>> exact_match("31", "3 1").value
        0.0
    """
    got, expected = " ".join(completion.split()), " ".join(answer.split())
    if got == expected:
        return Score(1.0, "equal")
    return Score(0.0, f"got {got!r}, expected {expected!r}")
