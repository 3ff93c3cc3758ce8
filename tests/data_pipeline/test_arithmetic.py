"""Chained arithmetic modulo 10."""

import re

import numpy as np

from geomjax.data.arithmetic import ALPHABET, problem, problems, with_slip
from geomjax.data.prompts import Example


def test_a_problem_by_hand():
    digits, signs = np.array([7, 3, 8, 2]), np.array([1, -1, 1])
    assert problem(digits, signs) == ("7+3-8+2=", "024")


def test_answers_are_the_running_values():
    for example in problems(np.random.default_rng(0), 200, (1, 5)):
        terms = re.findall(r"[+-]?\d", example.prompt)
        values = np.cumsum([int(term) for term in terms])[1:] % 10
        assert example.answer == "".join(map(str, values))
        assert example.prompt.endswith("=")
        assert set(example.prompt + example.answer) <= set(ALPHABET)


def test_lengths_and_digits_and_signs_are_all_drawn():
    examples = problems(np.random.default_rng(0), 600, (2, 4))
    lengths = np.bincount([len(example.answer) for example in examples])
    assert lengths[:2].sum() == 0
    assert (abs(lengths[2:] - 200) < 45).all()  # Four standard deviations.
    text = "".join(example.prompt for example in examples)
    assert {character for character in text} == set(ALPHABET)
    plus = text.count("+") / (text.count("+") + text.count("-"))
    assert abs(plus - 0.5) < 0.05


def test_problems_are_numbered_and_a_function_of_the_generator():
    first = problems(np.random.default_rng(3), 20, (2, 4))
    assert first == problems(np.random.default_rng(3), 20, (2, 4))
    assert first != problems(np.random.default_rng(4), 20, (2, 4))
    assert [example.line for example in first] == list(range(1, 21))


def test_a_slip_changes_one_value_and_the_chain_goes_on_from_it():
    example = Example("7+3-8+2=", "024", 1)
    assert with_slip(example, 1, 5) == "057"
    assert with_slip(example, 2, 9) == "029"
    assert with_slip(example, 0, 0) == example.answer
