import subprocess
import sys

import pytest

from geomjax.data.prompts import Example, Message
from geomjax.data.splits import split_examples


def examples(n, first=0):
    return [Example(f"prompt {i}", str(i), i + 1) for i in range(first, first + n)]


def test_parts_are_disjoint_complete_and_in_order():
    everything = examples(200)
    splits = split_examples(everything, validation=0.2, test=0.1)
    assert sorted(sum(splits, []), key=lambda example: example.line) == everything
    for part in splits:
        assert part == sorted(part, key=lambda example: example.line)


def test_fractions_are_met_on_average():
    splits = split_examples(examples(4000), validation=0.2, test=0.1)
    # Three standard deviations of the binomial counts.
    assert abs(len(splits.validation) - 800) < 76
    assert abs(len(splits.test) - 400) < 57


def test_fractions_do_not_move_a_prompt_when_others_are_added():
    few = split_examples(examples(100), validation=0.3, test=0.2)
    many = split_examples(examples(300)[::-1], validation=0.3, test=0.2)
    for part, larger in zip(few, many, strict=True):
        assert set(part) < set(larger)


def test_counts_are_exact_and_a_larger_validation_keeps_the_test_split():
    small = split_examples(examples(100), validation=10, test=7)
    assert [len(part) for part in small] == [83, 10, 7]
    large = split_examples(examples(100), validation=40, test=7)
    assert large.test == small.test
    assert set(large.validation) > set(small.validation)


def test_all_but_one_may_be_held_out():
    assert [len(p) for p in split_examples(examples(10), validation=4, test=5)] == [
        1,
        4,
        5,
    ]


@pytest.mark.parametrize(("validation", "test"), [(0.3, 0.3), (10, 10)])
def test_duplicates_never_straddle(validation, test):
    chat = (Message("user", "prompt"),)
    everything = examples(40) + examples(40) + [Example(chat, None, 1)] * 3
    splits = split_examples(everything, validation=validation, test=test)
    prompts = [{example.prompt for example in part} for part in splits]
    assert len(set.union(*prompts)) == sum(map(len, prompts)) == 41
    assert sum(map(len, splits)) == 83


def test_seeds_give_different_splits():
    tests = [
        split_examples(examples(50), validation=0, test=10, seed=seed).test
        for seed in range(4)
    ]
    assert len({tuple(part) for part in tests}) == 4


def test_the_same_in_another_process():
    program = (
        "from geomjax.data.prompts import Example\n"
        "from geomjax.data.splits import split_examples\n"
        "es = [Example(f'prompt {i}', str(i), i + 1) for i in range(30)]\n"
        "test = split_examples(es, validation=5, test=5).test\n"
        "print(*[e.line for e in test])"
    )
    got = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    ).stdout
    here = split_examples(examples(30), validation=5, test=5).test
    assert got.split() == [str(example.line) for example in here]


def test_zero_is_an_empty_split_on_purpose():
    splits = split_examples(examples(10), validation=0, test=3)
    assert [len(part) for part in splits] == [7, 0, 3]


@pytest.mark.parametrize(
    ("n", "validation", "test", "said"),
    [
        (10, 5, 5, "train would be empty"),
        (10, 50, 2, "train would be empty"),
        (10, 2, 50, "train and validation would be empty"),
        (10, 0.5, 0.5, "train would be empty"),
        (1, 0.3, 0.3, "would be empty"),
        (0, 1, 1, "train and validation and test would be empty"),
        (10, 0.1, 3, "expected two fractions"),
        (10, -1, 3, "none negative"),
        (10, 0.1, -0.1, "none negative"),
    ],
)
def test_bad_sizes(n, validation, test, said):
    with pytest.raises(ValueError, match=said):
        split_examples(examples(n), validation=validation, test=test)
