"""What a reward is: a function from an example and a completion to a judgement."""

from collections.abc import Callable
from typing import Literal, NamedTuple

from geomjax.data.prompts import Example

Status = Literal[
    "judged", "unparsed completion", "unparsed reference", "failed", "timed out"
]


class Judgement(NamedTuple):
    """A score, why it was given, and whether it says anything about the completion.

    Attributes:
        score: usually in [0, 1]; always finite.
        reason: for a person to read.
        status: `judged`; `unparsed completion` where it holds no answer that can be
            read, and `timed out` where judging it took too long (both score 0, as
            wrong ones do: the completion is to blame); `unparsed reference` where the
            dataset's own answer cannot be read, so that no completion could be right,
            and `failed` where the reward raised or its process died. The last two
            (`SILENT`) say nothing about the completion.
        answer: what the completion was read to answer, in a form that equal answers
            share where the reward can tell; None where there is none. Votes are counted
            by it.
    """

    score: float
    reason: str
    status: Status = "judged"
    answer: str | None = None


SILENT: tuple[Status, ...] = ("unparsed reference", "failed")


# A reward may take settings besides, as keyword arguments.
Reward = Callable[[Example, str], Judgement]


UNFINISHED = Judgement(0.0, "thinking was not finished", "unparsed completion")
"""Of a completion that ends inside its train of thought."""


def final_part(
    example: Example, completion: str, thinking_end: str = "</think>"
) -> str | None:
    """What follows the last end of thinking, or everything where there is no thinking.

    None where the thinking was not finished, so that there is no answer: the prompt
    (`Example.thinking`) or the completion opened a thought that the completion does not
    close. What opens one is `thinking_end` without its slash.
    """
    _, ended, rest = completion.rpartition(thinking_end)
    if thinking_end.replace("/", "") in rest or (example.thinking and not ended):
        return None
    return rest
