"""Equality of all that a completion answers with the answer."""

from geomjax.data.answers import exact_match
from geomjax.data.prompts import Example
from geomjax.rewards.contract import UNFINISHED, Judgement, final_part


def exact(
    example: Example, completion: str, *, thinking_end: str = "</think>"
) -> Judgement:
    """Scores 1 if the completion is the example's answer up to whitespace, else 0.

    Args:
        example: its answer is a text.
        completion: the text to score; empty, it holds no answer but an empty one.
        thinking_end: what ends the train of thought (`final_part`).
    """
    if example.answer is None:
        return Judgement(0.0, "the example has no answer", "unparsed reference")
    text = final_part(example, completion, thinking_end)
    if text is None:
        return UNFINISHED
    said = " ".join(text.split())
    if not said and example.answer.strip():
        return Judgement(0.0, "no text", "unparsed completion")
    found = exact_match(text, example.answer)
    return Judgement(found.value, found.reason, answer=said)
