import numpy as np
import pytest

from geomjax.data.answers import Completion, decode_completions, exact_match
from geomjax.data.characters import character_tokenizer

TOKENIZER = character_tokenizer("012 .", pad="<pad>", eos="<eos>", bos="<bos>")
PAD, EOS, BOS = 0, 1, 2


def ids(text):
    return TOKENIZER.encode(text)


def test_completions_end_before_their_first_stop_token():
    rows = [
        [*ids("0 1"), EOS, PAD],
        [*ids("01"), EOS, *ids("2"), EOS],  # What follows a stop token is ignored.
        [EOS, *ids("0000")],
        ids("01201"),
    ]
    assert decode_completions(np.array(rows, dtype=np.int32), TOKENIZER, {EOS}) == [
        Completion("0 1", True),
        Completion("01", True),
        Completion("", True),
        Completion("01201", False),
    ]


def test_any_of_several_stop_tokens_ends():
    rows = np.array([[*ids("0"), BOS, *ids("1"), EOS]], dtype=np.int32)
    assert decode_completions(rows, TOKENIZER, (EOS, BOS)) == [Completion("0", True)]


def test_other_special_tokens_and_spaces_stay_in_the_text():
    rows = np.array([[*ids("0 ."), BOS, EOS]], dtype=np.int32)
    assert decode_completions(rows, TOKENIZER, [EOS]) == [Completion("0 .<bos>", True)]


@pytest.mark.parametrize(
    ("text", "answer", "value"),
    [
        ("3 1 5", "3 1 5", 1.0),
        ("  3\n1\t 5 ", "3 1  5", 1.0),
        ("", " ", 1.0),
        ("31 5", "3 1 5", 0.0),
        ("3 1", "3 1 5", 0.0),
        ("a", "A", 0.0),
        ("5.0", "5", 0.0),
    ],
)
def test_exact_match(text, answer, value):
    assert exact_match(text, answer).value == value


def test_a_miss_says_why():
    assert exact_match(" 3  1", "4").reason == "got '3 1', expected '4'"
