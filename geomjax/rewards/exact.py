"""Equality of the whole completion with the answer."""

from geomjax.data.answers import exact_match
from geomjax.data.prompts import Example
from geomjax.rewards.contract import Judgement


def exact(example: Example, completion: str) -> Judgement:
    """Scores 1 if the completion is the example's answer up to whitespace, else 0.

    Args:
        example: its answer is a text.
        completion: the text to score; empty, it holds no answer but an empty one.
    """
    if example.answer is None:
        return Judgement(0.0, "the example has no answer", "unparsed reference")
    said = " ".join(completion.split())
    if not said and example.answer.strip():
        return Judgement(0.0, "no text", "unparsed completion")
    found = exact_match(completion, example.answer)
    return Judgement(found.value, found.reason, answer=said)
