"""Prompts as conversations: system prompts, worked examples, thinking modes."""

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerFast

from geomjax.data.encode import EncodedPrompts
from geomjax.data.prompts import Example, Message


def as_conversations(
    examples: Sequence[Example],
    *,
    system: str | None = None,
    shots: Sequence[Example] = (),
) -> list[Example]:
    """Puts a system prompt and worked examples in front of every prompt.

    Plain text becomes the user's turn. A conversation keeps its turns; one that brings
    a system prompt of its own cannot be given another.

    Args:
        examples: the prompts.
        system: the system prompt, or None for none.
        shots: worked examples, each with an answer: a user's and an assistant's turn.

    Raises:
        ValueError: if a shot has no answer, or system prompts would be two.
    """
    bare = [shot.line for shot in shots if shot.answer is None]
    if bare:
        raise ValueError(f"few-shot: the examples of lines {bare} have no answer")
    front = [Message("system", system)] if system is not None else []
    turns = [
        message
        for shot in shots
        for message in (*_turns(shot), Message("assistant", shot.answer or ""))
    ]
    seen = [image for shot in shots for image in shot.images]
    made = []
    for example in examples:
        own = _turns(example)
        head = [message for message in own if message.role == "system"]
        if head and system is not None:
            raise ValueError(
                f"line {example.line} has a system prompt already; give none"
            )
        rest = [message for message in own if message.role != "system"]
        prompt = (*front, *head, *turns, *rest)
        made.append(example._replace(prompt=prompt, images=(*seen, *example.images)))
    return made


def thinking_settings(
    tokenizer: PreTrainedTokenizerFast, thinking: bool | None
) -> Mapping[str, Any]:
    """What tells a chat template whether the reply begins with thinking.

    Args:
        tokenizer: one whose template knows `enable_thinking`, as those of Qwen3 do.
        thinking: on or off, or None for the template's own choice.

    Returns:
        Settings for `encode_prompts`.

    Raises:
        ValueError: if the template does not know the setting, and would ignore it.
    """
    if thinking is None:
        return {}
    if "enable_thinking" not in str(tokenizer.chat_template or ""):
        raise ValueError(
            f"thinking: got {thinking}, but the chat template knows no "
            "`enable_thinking`; expected None, or a tokenizer whose template has it"
        )
    return {"enable_thinking": thinking}


def describe_first(encoded: EncodedPrompts, tokenizer: PreTrainedTokenizerFast) -> str:
    """The first prompt as the model will see it: its text and its ids."""
    ids = encoded.token_ids[0].tolist()
    text = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    return (
        f"first prompt (line {encoded.examples[0].line}, {len(ids)} tokens; "
        f"{encoded.dropped} prompts were dropped as too long):\n{text}\nids: {ids}"
    )


def _turns(example: Example) -> tuple[Message, ...]:
    prompt = example.prompt
    return (Message("user", prompt),) if isinstance(prompt, str) else prompt
