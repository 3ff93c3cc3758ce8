"""Conversations as token sequences whose targets are the assistant's replies."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerFast

from geomjax.data.encode import added_bos, encode_text, render
from geomjax.data.packing import TokenSequence
from geomjax.data.prompts import Example, Message, summarize

Piece = tuple[str, bool]
"""Text, and whether it is a reply."""


class EncodedConversations(NamedTuple):
    """Examples, their token sequences in the same order, and what was lost."""

    examples: list[Example]
    sequences: list[TokenSequence]
    dropped: int


def encode_conversations(
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerFast,
    max_tokens: int,
    *,
    stop_tokens: Collection[int],
    replies: Literal["all", "last"] = "last",
    overlong: Literal["error", "drop"] = "error",
    template_settings: Mapping[str, Any] | None = None,
) -> EncodedConversations:
    """Encodes conversations with their replies, each reply up to its stop token.

    What stands before a reply is encoded as `encode_prompts` does it, so that a model
    is trained on what it will be asked with. The targets are the text of a reply and
    the stop token that ends it; what a template writes after that is none. Plain text
    is followed by the answer and the end-of-sequence token.

    Args:
      examples: Prompts, each with its (last) reply as the answer.
      tokenizer: The tokenizer.
      max_tokens: The longest sequence allowed.
      stop_tokens: Ids that end a reply.
      replies: Which replies are targets: all of the assistant's, or the last.
      overlong: Whether a longer sequence is an error, or is dropped and counted.
      template_settings: Variables of the chat template.

    Raises:
      ValueError: Naming the lines of conversations that are too long, have no reply,
        or whose replies the chat template changes later on (as Qwen3's drops the
        thinking of earlier turns: train on the last reply alone); or all were dropped.
    """
    kept = EncodedConversations([], [], 0)
    problems: list[str] = []
    dropped = 0
    bos_ids = added_bos(tokenizer)
    for example in examples:
        try:
            pieces = _pieces(example, tokenizer, replies, template_settings or {})
            plain = isinstance(example.prompt, str)
            sequence = _encode(
                pieces, tokenizer, frozenset(stop_tokens), bos_ids if plain else []
            )
        except (ValueError, TemplateError) as error:
            problems.append(f"line {example.line}: {error}")
            continue
        if len(sequence.tokens) <= max_tokens:
            kept.examples.append(example)
            kept.sequences.append(sequence)
        elif overlong == "drop":
            dropped += 1
        else:
            problems.append(
                f"line {example.line}: {len(sequence.tokens)} tokens, expected at most "
                f"{max_tokens}"
            )
    if problems:
        raise ValueError(f"conversations:\n{summarize(problems)}")
    if not kept.examples:
        raise ValueError(
            f"conversations: none is left; all {dropped} are longer than {max_tokens} "
            "tokens"
        )
    return kept._replace(dropped=dropped)


def _pieces(
    example: Example,
    tokenizer: PreTrainedTokenizerFast,
    replies: Literal["all", "last"],
    settings: Mapping[str, Any],
) -> list[Piece]:
    """The text of a conversation, cut where replies begin and end."""
    if example.answer is None:
        raise ValueError("has no answer, which is what it would be trained on")
    if isinstance(example.prompt, str):
        return [(example.prompt, False), (example.answer + tokenizer.eos_token, True)]
    turns = (*example.prompt, Message("assistant", example.answer))
    ends = [i for i, turn in enumerate(turns) if turn.role == "assistant"]
    ends = ends if replies == "all" else ends[-1:]
    whole = render(turns, tokenizer, settings, reply_next=False)
    pieces: list[Piece] = []
    done = 0
    for i in ends:
        begin = render(turns[:i], tokenizer, settings, reply_next=True)
        end = render(turns[: i + 1], tokenizer, settings, reply_next=False)
        # A later render of an earlier reply must be what it was when it was given.
        if not end.startswith(begin) or not whole.startswith(end):
            raise ValueError(
                f"the chat template changes the reply of turn {i + 1} once others "
                "follow; train on the last reply alone"
            )
        before, reply = whole[done : len(begin)], whole[len(begin) : len(end)]
        pieces += [(before, False), (reply, True)]
        done = len(end)
    return pieces


def _encode(
    pieces: Sequence[Piece],
    tokenizer: PreTrainedTokenizerFast,
    stop_tokens: frozenset[int],
    bos_ids: list[int],
) -> TokenSequence:
    first = encode_text(pieces[0][0], tokenizer)
    tokens = bos_ids if first[: len(bos_ids)] != bos_ids else []
    tokens, targets = list(tokens), [False] * len(tokens)
    for text, is_reply in pieces:
        ids = encode_text(text, tokenizer)
        ends = [j for j, token in enumerate(ids) if token in stop_tokens]
        if is_reply and not ends:
            raise ValueError(
                "the chat template ends a reply without a stop token, so that a model "
                "would never learn to stop"
            )
        last = ends[-1] if is_reply else -1
        tokens += ids
        targets += [j <= last for j in range(len(ids))]
    # What follows the last stop token, such as a line break, is not sampled either.
    end = len(targets) - targets[::-1].index(True)
    return TokenSequence(np.array(tokens[:end], np.int32), np.array(targets[:end]))
