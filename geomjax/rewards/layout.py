"""The form of a completion, whatever it says."""

import re

from geomjax.data.prompts import THINKING_START, Example
from geomjax.rewards.contract import Judgement

THINKING_THEN_BOXED = r"\s*<think>.+</think>.*\\boxed\{.+\}.*"


def layout(
    example: Example, completion: str, *, pattern: str = THINKING_THEN_BOXED
) -> Judgement:
    r"""Scores 1 if the whole completion matches a regular expression, else 0.

    `.` matches line breaks too. Neither tag may occur twice in the default, which
    wants a train of thought and then an answer in `\boxed{}`.

    Args:
        example: only its field `thinking` is looked at.
        completion: the text to score; where the prompt opened a train of thought, the
            mark that opens it is counted to the completion.
        pattern: the regular expression.
    """
    if example.thinking:
        completion = THINKING_START + completion
    if re.fullmatch(pattern, completion, re.DOTALL) is None:
        return Judgement(0.0, "not of the form asked for")
    for tag in ("<think>", "</think>"):
        if tag in pattern and completion.count(tag) > 1:
            return Judgement(0.0, f"{tag} occurs {completion.count(tag)} times")
    return Judgement(1.0, "of the form asked for")
