"""Chained arithmetic modulo 10."""

import re

import numpy as np
import pytest

from geomjax.data.arithmetic import (
    ALPHABET,
    ZEROS,
    alphabet,
    hinted,
    in_scripts,
    problem,
    problems,
    with_slip,
)
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


def test_minima_and_maxima_are_another_task_of_the_same_form():
    digits, signs = np.array([7, 3, 8, 2]), np.array([1, -1, 1])
    assert problem(digits, signs, "<>") == ("7<3>8<2=", "382")
    example = Example("7<3>8<2=", "382", 1)
    assert with_slip(example, 0, 9) == "992"
    assert with_slip(example, 1, 1) == "311"
    plain = problems(np.random.default_rng(5), 100, (3, 4))
    other = problems(np.random.default_rng(5), 100, (3, 4), operators="<>")
    for one, two in zip(plain, other, strict=True):
        assert one.prompt == two.prompt.replace("<", "+").replace(">", "-")
    assert set(alphabet(operators="<>")) == {*"0123456789<>="}
    with pytest.raises(
        ValueError, match=r"operators are '\*/'; expected '\+-' or '<>'"
    ):
        alphabet(operators="*/")


def test_scripts_are_thirteen_sets_of_ten_digits():
    characters = alphabet(13)
    assert characters.startswith(ALPHABET)
    assert len(set(characters)) == len(characters) == 13 * 10 + 3
    digits = [c for c in characters if c.isdecimal()]
    assert [int(digit) for digit in digits] == 13 * list(range(10))
    assert alphabet() == ALPHABET
    for scripts in (0, 14):
        with pytest.raises(ValueError, match="expected 1 to 13"):
            alphabet(scripts)


def test_a_problem_in_other_scripts_is_the_same_problem():
    example = Example(
        in_scripts("7+3-8+2=", (3, 0, 0, 1)), in_scripts("024", (3,) * 3), 1
    )
    assert example.prompt == "७+3-8+٢="
    assert example.answer == "०२४"
    assert with_slip(example, 1, 5) == in_scripts("057", (3,) * 3)
    assert hinted(example).prompt == "०२४=७+3-8+٢="


def test_each_digit_has_a_script_and_the_answer_that_of_the_first():
    plain = problems(np.random.default_rng(5), 300, (3, 4))
    mixed = problems(np.random.default_rng(5), 300, (3, 4), scripts=13)
    drawn = []
    for one, other in zip(plain, mixed, strict=True):
        digits = [character for character in other.prompt if character.isdecimal()]
        scripts = [ZEROS.index(chr(ord(digit) - int(digit))) for digit in digits]
        assert other.prompt == in_scripts(one.prompt, scripts)
        assert other.answer == in_scripts(one.answer, scripts[:1] * len(one.answer))
        drawn += scripts
    counts = np.bincount(drawn, minlength=13)
    expected = len(drawn) / 13
    assert (abs(counts - expected) < 4 * np.sqrt(expected)).all()
