"""Multiple choice: the letter that a completion ends up with."""

import re

from geomjax.data.prompts import Example
from geomjax.rewards.contract import Judgement, final_part

# A letter, perhaps in brackets or in bold, that no longer word continues.
_LETTER = r"(?:\\text(?:bf)?\s*\{\s*)?[(\[*]*([A-Z])[)\]*.:]*\}?"
_BOXED = re.compile(r"\\boxed\s*\{\s*" + _LETTER + r"\s*\}")
_STATED = re.compile(
    r"(?i:answer|choice|option)[\s*:]*(?i:is|would be|=)?[\s*:$]*"
    + _LETTER
    + r"(?![A-Za-z])"
)
_ALONE = re.compile(r"^\W*" + _LETTER + r"\W*$", re.MULTILINE)


def multiple_choice(
    example: Example, completion: str, *, thinking_end: str = "</think>"
) -> Judgement:
    r"""Scores 1 if the completion chooses the example's letter, else 0.

    The choice is the last letter in `\boxed{}`, else the last that is stated ("the
    answer is (B)", "Answer: B"), else the last that stands alone on its line.

    Args:
        example: its answer is a capital letter, with or without brackets.
        completion: the text to score.
        thinking_end: what ends the train of thought, which is not looked at.
    """
    expected = re.fullmatch(r"\W*([A-Z])\W*", example.answer or "")
    if expected is None:
        reason = f"expected a capital letter, got {example.answer!r}"
        return Judgement(0.0, reason, "unparsed reference")
    text = final_part(completion, thinking_end)
    for pattern in (_BOXED, _STATED, _ALONE):
        found = pattern.findall(text)
        if found:
            right = found[-1] == expected[1]
            reason = f"chose {found[-1]}, expected {expected[1]}"
            return Judgement(float(right), reason, answer=found[-1])
    return Judgement(0.0, "no choice found", "unparsed completion")
