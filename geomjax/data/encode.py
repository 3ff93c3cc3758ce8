"""Prompts to token ids, once: what is sampled from is what is trained on."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, cast

import numpy as np
from jaxtyping import Int32
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerFast

from geomjax.data.prompts import THINKING_START, Example, Message, summarize

# Tokens at the end of a prompt among which an opened thought shows, were they letters.
_TAIL = 16


class EncodedPrompts(NamedTuple):
    """Examples, the token ids of their prompts in the same order, and what was lost."""

    examples: list[Example]
    token_ids: list[Int32[np.ndarray, "_"]]
    dropped: int


def encode_prompts(
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerFast,
    max_prompt_tokens: int,
    *,
    overlong: Literal["error", "drop"] = "error",
    template_settings: Mapping[str, Any] | None = None,
) -> EncodedPrompts:
    """Encodes prompts, conversations through the tokenizer's chat template.

    A conversation is rendered up to where the reply begins (`add_generation_prompt`),
    and nothing is added to it. Plain text gets the tokenizer's beginning-of-sequence
    token if the tokenizer adds one to texts and the text does not begin with it; an
    end-of-sequence token is never added. No prompt is ever truncated.

    Args:
        examples: the prompts.
        tokenizer: the student's tokenizer.
        max_prompt_tokens: the longest prompt allowed, in tokens.
        overlong: whether a longer prompt is an error, or is dropped and counted.
        template_settings: variables of the chat template (`thinking_settings`).

    Returns:
        The examples kept, each with its field `thinking` set, their token ids, and the
        number dropped.

    Raises:
        ValueError: naming the lines of prompts that are too long, that the chat
            template refuses, that encode to no token, or that hold characters the
            tokenizer does not know; or if all prompts were dropped.
    """
    kept = EncodedPrompts([], [], 0)
    problems: list[str] = []
    bos_ids = added_bos(tokenizer)
    dropped = 0
    for example in examples:
        try:
            ids = _encode(example.prompt, tokenizer, bos_ids, template_settings or {})
        except (ValueError, TemplateError) as error:
            problems.append(f"line {example.line}: {error}")
            continue
        if len(ids) <= max_prompt_tokens:
            kept.examples.append(with_thinking(example, ids, tokenizer))
            kept.token_ids.append(np.array(ids, dtype=np.int32))
        elif overlong == "drop":
            dropped += 1
        else:
            problems.append(
                f"line {example.line}: {len(ids)} tokens, expected at most "
                f"{max_prompt_tokens}"
            )
    if problems:
        raise ValueError(f"prompts:\n{summarize(problems)}")
    if not kept.examples:
        raise ValueError(
            f"prompts: none is left; all {dropped} are longer than "
            f"{max_prompt_tokens} tokens"
        )
    return kept._replace(dropped=dropped)


def with_thinking(
    example: Example, ids: Sequence[int], tokenizer: PreTrainedTokenizerFast
) -> Example:
    """The example, with whether its encoded prompt ends by opening a thought."""
    tail = str(tokenizer.decode(list(ids[-_TAIL:]))).rstrip()
    return example._replace(thinking=tail.endswith(THINKING_START))


def added_bos(tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """The beginning-of-sequence id if the tokenizer adds it to a text, or nothing."""
    first = tokenizer.encode("a")[:1]
    return first if first == [tokenizer.bos_token_id] else []


def encode_text(text: str, tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """The ids of a text, to which nothing is added.

    Raises:
        ValueError: if it holds characters that the tokenizer does not know.
    """
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False)
    unknown = tokenizer.unk_token_id
    if unknown in ids and tokenizer.unk_token not in text:
        first = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        start, end = first["offset_mapping"][ids.index(unknown)]
        raise ValueError(f"the tokenizer does not know {text[start:end]!r}")
    return ids


def render(
    messages: Sequence[Message],
    tokenizer: PreTrainedTokenizerFast,
    settings: Mapping[str, Any],
    *,
    reply_next: bool,
) -> str:
    """A conversation in the tokenizer's chat template.

    Args:
        messages: the turns.
        tokenizer: one with a chat template.
        settings: variables of the template.
        reply_next: whether the text goes on to where the assistant's reply begins.

    Raises:
        ValueError: if the tokenizer has no chat template.
        TemplateError: what the template raises.
    """
    if tokenizer.chat_template is None:
        raise ValueError("is a conversation, but the tokenizer has no chat template")
    text = tokenizer.apply_chat_template(
        [message._asdict() for message in messages],
        add_generation_prompt=reply_next,
        tokenize=False,
        **settings,
    )
    return cast(str, text)  # Of its many return types, that of tokenize=False.


def _encode(
    prompt: str | tuple[Message, ...],
    tokenizer: PreTrainedTokenizerFast,
    bos_ids: list[int],
    settings: Mapping[str, Any],
) -> list[int]:
    if isinstance(prompt, str):
        text = prompt
    else:
        text = render(prompt, tokenizer, settings, reply_next=True)
        bos_ids = []
    ids = encode_text(text, tokenizer)
    if not ids:
        raise ValueError("encodes to no token")
    return ids if ids[: len(bos_ids)] == bos_ids else bos_ids + ids
