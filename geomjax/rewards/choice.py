"""Multiple choice: the letter that a completion ends up with."""

import re

from geomjax.data.prompts import Example
from geomjax.rewards.contract import UNFINISHED, Judgement, final_part

# A letter, perhaps in brackets or in bold.
_OPEN = r"(?:\\text(?:bf)?\s*\{\s*)?[(\[*]*"
_LETTER = _OPEN + r"([A-Z])[)\]*.:]*\}?"
_BOXED = re.compile(r"\\boxed\s*\{\s*" + _LETTER + r"\s*\}")
# What may follow a letter that is a choice: the end of its line, brackets and stops, a
# reason. "A function" and "I think" go on otherwise, and so does "A or B".
_CLOSE = (
    r"(?![)\]*}$]*\s+(?:and|or)\s+[(\[*]*[A-Z]\b)"
    r"(?=[)\]*}$;!?]|[.,:](?!\w)|[ \t]*(?:\n|\Z)|\s+(?:because|since|as|which)\b)"
)
_IS = r"(?::|=|\b(?:is|must be|should be|would be)\b)"
_STATED = re.compile(
    r"(?i:\b(?:answer|choice|option)[\s*]*" + _IS + r"[\s*:$]*"
    r"(?:(?:option|choice)\s+)?)"
    + _OPEN
    + "([A-Z])"
    + _CLOSE
    + r"|(?i:\b(?:answer|choice|option)\s+)"
    + _LETTER
    + r"(?i:\s+is\s+(?:the\s+)?(?:correct|right|best)\b)"
)
_ALONE = re.compile(r"^\W*" + _LETTER + r"\W*$", re.MULTILINE)


def multiple_choice(
    example: Example, completion: str, *, thinking_end: str = "</think>"
) -> Judgement:
    r"""Scores 1 if the completion chooses the example's letter, else 0.

    The choice is the last letter in `\boxed{}`, else the last that is stated, else the
    last that stands alone on its line. A statement is "answer", "choice" or "option",
    then a colon, "is" or the like, then the letter, at which its clause ends ("the
    answer is (B)", "Answer: B", "the best choice is B because ..."); or "option B is
    correct". A letter that words go on from ("the answer is A function ...") is prose.

    Args:
        example: its answer is a capital letter, with or without brackets.
        completion: the text to score.
        thinking_end: what ends the train of thought (`final_part`).
    """
    expected = re.fullmatch(r"\W*([A-Z])\W*", example.answer or "")
    if expected is None:
        reason = f"expected a capital letter, got {example.answer!r}"
        return Judgement(0.0, reason, "unparsed reference")
    text = final_part(example, completion, thinking_end)
    if text is None:
        return UNFINISHED
    for pattern in (_BOXED, _STATED, _ALONE):
        found = [match[match.lastindex or 0] for match in pattern.finditer(text)]
        if found:
            right = found[-1] == expected[1]
            reason = f"chose {found[-1]}, expected {expected[1]}"
            return Judgement(float(right), reason, answer=found[-1])
    return Judgement(0.0, "no choice found", "unparsed completion")
