"""Duplicates within a dataset, and its overlap with evaluation sets."""

import hashlib
import json
import re
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

from geomjax.data.prompts import Example

WORDS = 13  # GPT-3 (arXiv 2005.14165, appendix C) and most decontamination since.
_WORD = re.compile(r"\w+")


class Duplicate(NamedTuple):
    """An example whose prompt and images have occurred before, by index.

    `same_answer` is False where the two disagree on the answer.
    """

    index: int  # type: ignore[assignment] # hides a method
    first: int
    same_answer: bool


class Overlap(NamedTuple):
    """An example that shares words in a row with a problem of an evaluation set."""

    index: int  # type: ignore[assignment] # hides a method
    suite: str
    line: int
    words: str


def find_duplicates(examples: Sequence[Example]) -> list[Duplicate]:
    """The examples that repeat an earlier one exactly, prompt and images.

    DAPO-Math-17k, for one, holds each of its 17,398 problems about a hundred times.
    """
    seen: dict[bytes, int] = {}  # By hashes, which are shorter than prompts.
    found = []
    for index, example in enumerate(examples):
        name = hashlib.blake2b(_identity(example).encode(), digest_size=16).digest()
        first = seen.setdefault(name, index)
        if first != index:
            same = examples[first].answer == example.answer
            found.append(Duplicate(index, first, same))
    return found


def find_overlap(
    examples: Sequence[Example],
    suites: Mapping[str, Sequence[Example]],
    *,
    wording: Collection[str] = (),
    words: int = WORDS,
) -> list[Overlap]:
    """The examples that share `words` words in a row with an evaluation problem.

    Words are runs of letters and digits, without regard to case; of a conversation the
    user's turns count. A problem of fewer words is found where all of it occurs.

    Args:
        examples: what is to be trained on.
        suites: the evaluation sets by name.
        wording: instructions that are part of many prompts, such as where to put the
            answer; they are left out on both sides.
        words: how many words in a row make an overlap.

    Returns:
        For each example at most one overlap, the first in its text.
    """
    drop = [" ".join(_WORD.findall(phrase.lower())) for phrase in wording]
    grams: dict[int, dict[str, tuple[str, int]]] = defaultdict(dict)
    for suite, problems in suites.items():
        for problem in problems:
            tokens = _tokens(problem, drop)
            for gram in _grams(tokens, min(words, len(tokens))):
                grams[gram.count(" ") + 1].setdefault(gram, (suite, problem.line))
    found = []
    for index, example in enumerate(examples):
        tokens = _tokens(example, drop)
        for length, known in grams.items():
            hit = next((g for g in _grams(tokens, length) if g in known), None)
            if hit is not None:
                found.append(Overlap(index, *known[hit], hit))
                break
    return found


def without(
    examples: Sequence[Example], found: Sequence[Duplicate | Overlap]
) -> list[Example]:
    """The examples that were not found, in their order."""
    drop = {each.index for each in found}
    return [example for i, example in enumerate(examples) if i not in drop]


def fingerprint(examples: Sequence[Example]) -> str:
    """A hash of all prompts, answers and images in their order.

    Kept with a run, it tells whether the data that it resumes on is what it began on.
    """
    whole = hashlib.blake2b(digest_size=16)
    for example in examples:
        whole.update(json.dumps([_identity(example), example.answer]).encode())
    return whole.hexdigest()


def _identity(example: Example) -> str:
    images = [image.digest for image in example.images]
    return json.dumps([example.prompt, images])


def _tokens(example: Example, drop: Sequence[str]) -> list[str]:
    prompt = example.prompt
    text = (
        prompt
        if isinstance(prompt, str)
        else "\n".join(m.content for m in prompt if m.role == "user")
    )
    joined = " " + " ".join(_WORD.findall(text.lower())) + " "
    for phrase in drop:
        # A mark that is no word keeps what stood before and after from meeting.
        joined = joined.replace(f" {phrase} ", " | ") if phrase else joined
    return joined.split()


def _grams(tokens: Sequence[str], length: int) -> list[str]:
    if length == 0:
        return []
    return [
        " ".join(part)
        for i in range(len(tokens) - length + 1)
        if "|" not in (part := tokens[i : i + length])
    ]
