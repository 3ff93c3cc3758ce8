"""Chained arithmetic modulo 10: a verifiable task that small models learn in minutes.

A prompt is a chain such as `7+3-8+2=`; its answer gives the running value after each
operation, here `024` (7+3 is 0, 0-8 is 2, 2+2 is 4). One wrong step spoils the answer.
"""

import numpy as np

from geomjax.data.prompts import Example

ALPHABET = "0123456789+-="


def problem(digits: np.ndarray, signs: np.ndarray) -> tuple[str, str]:
    """The prompt and answer of one chain.

    Args:
      digits: `[n + 1]` integers from 0 to 9.
      signs: `[n]` of +1 and -1, the operations.

    Returns:
      Prompt and answer.
    """
    terms = [str(digits[0])]
    value, values = int(digits[0]), []
    for digit, sign in zip(digits[1:], signs, strict=True):
        terms.append(f"{'+' if sign > 0 else '-'}{digit}")
        value = (value + int(sign) * int(digit)) % 10
        values.append(str(value))
    return "".join(terms) + "=", "".join(values)


def problems(
    generator: np.random.Generator, count: int, operations: tuple[int, int]
) -> list[Example]:
    """Random problems, each with its answer.

    Args:
      generator: Source of randomness.
      count: Number of problems.
      operations: Fewest and most operations in a chain, equally likely in between.

    Returns:
      The examples, numbered from line 1.
    """
    fewest, most = operations
    lengths = generator.integers(fewest, most + 1, count)
    digits = generator.integers(0, 10, (count, most + 1))
    signs = generator.integers(0, 2, (count, most)) * 2 - 1
    made = [
        problem(d[: n + 1], s[:n])
        for n, d, s in zip(lengths, digits, signs, strict=True)
    ]
    return [Example(prompt, answer, i) for i, (prompt, answer) in enumerate(made, 1)]
