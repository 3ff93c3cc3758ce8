"""Chained arithmetic modulo 10: a verifiable task that small models learn in minutes.

A prompt is a chain such as `7+3-8+2=`; its answer gives the running value after each
operation, here `024` (7+3 is 0, 0-8 is 2, 2+2 is 4). One wrong step spoils the answer.
With other operators it is another task in the same form: `7<3>8=`, with the lesser and
the greater of two digits, is answered `38`. With the digits of many scripts it is the
same task with a vocabulary of some hundred tokens: each digit of a prompt is in a
script of its own, and the answer in that of the first.
"""

from collections.abc import Iterable
from itertools import repeat

import numpy as np

from geomjax.data.prompts import Example

ALPHABET = "0123456789+-="
ARITHMETIC = "+-"
EXTREMES = "<>"
"""Pairs of operators: sum and difference modulo 10, or minimum and maximum."""
ZEROS = "0٠۰०০੦૦୦௦౦೦൦๐"
"""The digit zero of thirteen scripts, ASCII first; Unicode has its nine others next."""


def alphabet(scripts: int = 1, operators: str = ARITHMETIC) -> str:
    """The characters of problems with digits of the first so many scripts.

    Raises:
      ValueError: There are not so many, or the operators are no known pair.
    """
    if operators not in (ARITHMETIC, EXTREMES):
        raise ValueError(
            f"operators are {operators!r}; expected {ARITHMETIC!r} or {EXTREMES!r}"
        )
    if not 1 <= scripts <= len(ZEROS):
        raise ValueError(f"scripts is {scripts}; expected 1 to {len(ZEROS)}")
    more = (chr(ord(zero) + i) for zero in ZEROS[1:scripts] for i in range(10))
    return f"0123456789{operators}=" + "".join(more)


def apply(operator: str, value: int, digit: int) -> int:
    """One step of a chain."""
    if operator in EXTREMES:
        return min(value, digit) if operator == "<" else max(value, digit)
    return (value + digit if operator == "+" else value - digit) % 10


def in_scripts(text: str, scripts: Iterable[int]) -> str:
    """Text with its ASCII digits written in other scripts, one of them for each digit.

    >>> in_scripts("7+3", (0, 3))
    '7+३'
    """
    following = iter(scripts)
    return "".join(
        chr(ord(ZEROS[next(following)]) + int(character))
        if character.isdecimal()
        else character
        for character in text
    )


def problem(
    digits: np.ndarray, signs: np.ndarray, operators: str = ARITHMETIC
) -> tuple[str, str]:
    """The prompt and answer of one chain.

    Args:
      digits: `[n + 1]` integers from 0 to 9.
      signs: `[n]` of +1 and -1, for the first and the second operator.
      operators: A pair of them.

    Returns:
      Prompt and answer.
    """
    terms = [str(digits[0])]
    value, values = int(digits[0]), []
    for digit, sign in zip(digits[1:], signs, strict=True):
        operator = operators[0] if sign > 0 else operators[1]
        terms.append(f"{operator}{digit}")
        value = apply(operator, value, int(digit))
        values.append(str(value))
    return "".join(terms) + "=", "".join(values)


def with_slip(example: Example, position: int, digit: int) -> str:
    """The answer with one value replaced, and the chain going on from it.

    Shows what follows after a mistake, which a model that is sampled from will make:
    `7+3-8+2=` with a 5 at position 1 is answered `057`.

    Args:
      example: A problem.
      position: Which value is replaced, from 0.
      digit: What it is replaced by.

    Returns:
      The answer, as long as the right one.
    """
    assert isinstance(example.prompt, str)
    zero = ord(example.prompt[0]) - int(example.prompt[0])
    signs, digits = example.prompt[1:-1:2], example.prompt[2:-1:2]
    values = [int(value) for value in example.answer or ""]
    values[position] = digit
    for i in range(position + 1, len(values)):
        values[i] = apply(signs[i], values[i - 1], int(digits[i]))
    return "".join(chr(zero + value) for value in values)


def hinted(example: Example) -> Example:
    """The problem with its answer in front, as a privileged reader has it."""
    return example._replace(prompt=f"{example.answer}={example.prompt}")


def problems(
    generator: np.random.Generator,
    count: int,
    operations: tuple[int, int],
    scripts: int = 1,
    operators: str = ARITHMETIC,
) -> list[Example]:
    """Random problems, each with its answer.

    Scripts are drawn for every digit of a prompt: a model then has to know which
    characters are the same digit. Each problem in one script would be as many tasks as
    there are scripts.

    Args:
      generator: Source of randomness.
      count: Number of problems.
      operations: Fewest and most operations in a chain, equally likely in between.
      scripts: How many scripts digits are written in.
      operators: A pair of them, equally likely.

    Returns:
      The examples, numbered from line 1.
    """
    fewest, most = operations
    lengths = generator.integers(fewest, most + 1, count)
    digits = generator.integers(0, 10, (count, most + 1))
    signs = generator.integers(0, 2, (count, most)) * 2 - 1
    made = [
        problem(d[: n + 1], s[:n], operators)
        for n, d, s in zip(lengths, digits, signs, strict=True)
    ]
    if scripts > 1:  # One script draws nothing: its problems stay what they were.
        chosen = generator.integers(0, scripts, (count, most + 1)).tolist()
        made = [
            (in_scripts(prompt, drawn), in_scripts(answer, repeat(drawn[0])))
            for (prompt, answer), drawn in zip(made, chosen, strict=True)
        ]
    return [Example(prompt, answer, i) for i, (prompt, answer) in enumerate(made, 1)]
