"""Mathematical answers, compared as mathematics by the `math-verify` package."""

import re
from typing import Any

from geomjax.data.prompts import Example
from geomjax.rewards.contract import UNFINISHED, Judgement, final_part

try:
    # Here, not where it is used: a pool then says at its start that it is missing, and
    # no answer's time is spent on the second that it takes.
    from math_verify import parse, verify
except ImportError as error:
    raise ImportError(
        "this reward needs the package math-verify; install it with "
        "`pip install 'geomjax[data]'`"
    ) from error

_BOXED = re.compile(r"\\(?:boxed|fbox)\s*\{")
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)  # A brace that is escaped counts as text.
_TOGETHER = re.compile(r"[\s$,;()\[\]\\]*(?:and|or)?[\s$,;()\[\]\\]*")


def mathematics(
    example: Example, completion: str, *, thinking_end: str = "</think>"
) -> Judgement:
    r"""Scores 1 if the completion's answer equals the example's as mathematics, else 0.

    The answer is the content of the last `\boxed{}` (of several that stand together,
    such as \boxed{1} and \boxed{2}, all of them), else the last expression in LaTeX or
    plain, after the train of thought (`final_part`). `math-verify` compares by value
    where it can (1/2 equals 0.5 and \frac{2}{4}; sets without regard to order) and by
    text where it cannot.

    Nothing here bounds the time: sympy can be led to compute for hours by an answer
    such as 9^{9^{9^9}}, in calls that no signal interrupts. `RewardPool` does.

    Args:
        example: its answer is LaTeX, with or without `$` or `\boxed` around it.
        completion: the text to score.
        thinking_end: what ends the train of thought (`final_part`).

    Returns:
        The judgement; `unparsed reference` or `unparsed completion` where no
        expression can be read.
    """
    reference = _parsed_reference(example)
    if isinstance(reference, Judgement):
        return reference
    said = final_part(example, completion, thinking_end)
    if said is None:
        return UNFINISHED
    boxed = last_boxed(said)
    answer = _parse(said if boxed is None else f"\\boxed{{{boxed}}}")
    if not answer:
        return Judgement(0.0, "no expression found", "unparsed completion")
    # The order matters: the first may be a set or an equation that the second meets.
    equal = verify(reference, answer, timeout_seconds=None)
    relation = "equals" if equal else "differs from"
    # All that equal the reference equal each other, however they are written.
    return Judgement(
        float(equal),
        f"{answer[0]} {relation} {reference[0]}",
        answer=str(reference[0] if equal else answer[0]),
    )


def last_boxed(text: str) -> str | None:
    r"""The content of the last `\boxed{}`, joined with those it stands together with.

    `math-verify` would join all that it finds, so that an answer given on the way and
    then corrected would spoil the last one.

    Examples:
        >>> last_boxed(r"\boxed{1}. No, it is \boxed{\frac{1}{2}}.")
        '\\frac{1}{2}'
        >>> last_boxed(r"$\boxed{1}$ and $\boxed{2}$")
        '1, 2'
    """
    contents: list[str] = []
    end = 0
    for start in _BOXED.finditer(text):
        close = _closing_brace(text, start.end())
        if close is None or start.start() < end:  # Cut off, or inside the one before.
            continue
        if not _TOGETHER.fullmatch(text, end, start.start()):
            contents.clear()
        contents.append(text[start.end() : close])
        end = close + 1
    return ", ".join(contents) if contents else None


def _closing_brace(text: str, start: int) -> int | None:
    depth = 1
    for brace in _BRACE.finditer(text, start):
        depth += {"{": 1, "}": -1}.get(brace[0], 0)
        if depth == 0:
            return brace.start()
    return None


def _parsed_reference(example: Example) -> list[Any] | Judgement:
    text = example.answer
    if text is None or not text.strip():
        return Judgement(0.0, "the example has no answer", "unparsed reference")
    marked = (
        text if "$" in text.replace("\\$", "") or "\\boxed" in text else f"${text}$"
    )
    parsed = _parse(marked)
    # The text itself is always among what is found; alone, it is all there is.
    if not parsed or all(isinstance(each, str) for each in parsed):
        return Judgement(0.0, f"cannot read {text!r}", "unparsed reference")
    return parsed


def _parse(text: str) -> list[Any]:
    parsed: list[Any] = parse(text, parsing_timeout=None)
    return parsed
