import pytest

from geomjax.data.prompts import Example
from geomjax.rewards.choice import multiple_choice
from geomjax.rewards.contract import Judgement
from geomjax.rewards.exact import exact
from geomjax.rewards.layout import layout


@pytest.mark.parametrize(
    ("completion", "chosen"),
    [
        (r"\boxed{B}", "B"),
        (r"\boxed{\text{B}}", "B"),
        (r"\boxed{\textbf{(B)}}", "B"),
        (r"\boxed{(C)}, no: \boxed{B}", "B"),
        ("The answer is (B).", "B"),
        ("Answer: B", "B"),
        ("**Answer:** **B**", "B"),
        ("the correct option is B) 12", "B"),
        ("A looks right, but the answer is B", "B"),
        ("Hence\n(B)\n", "B"),
        ("<think>\\boxed{A}</think>\nB", "B"),
        ("Answer: A", "A"),
        ("The answer is Apple", None),
        ("B is a letter in this sentence", None),
        ("", None),
    ],
)
def test_multiple_choice(completion, chosen):
    judgement = multiple_choice(Example("?", "(B)", 1), completion)
    assert judgement.score == float(chosen == "B")
    expected = "unparsed completion" if chosen is None else "judged"
    assert judgement.status == expected
    if chosen:
        assert judgement.reason == f"chose {chosen}, expected B"
    assert judgement.answer == chosen


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        (" 3  1\n", Judgement(1.0, "equal", answer="3 1")),
        ("31", Judgement(0.0, "got '31', expected '3 1'", answer="31")),
        (" ", Judgement(0.0, "no text", "unparsed completion")),
    ],
)
def test_exact(completion, expected):
    assert exact(Example("?", "3 1", 1), completion) == expected
    bare = exact(Example("?", None, 1), completion)
    assert bare.status == "unparsed reference"


@pytest.mark.parametrize("answer", [None, "", "12", "AB"])
def test_a_reference_that_is_no_letter_is_told_apart(answer):
    judgement = multiple_choice(Example("?", answer, 1), "Answer: B")
    assert judgement.status == "unparsed reference"


@pytest.mark.parametrize(
    ("completion", "score"),
    [
        ("<think>\nhm\n</think>\nIt is \\boxed{3}.", 1.0),
        ("It is \\boxed{3}.", 0.0),
        ("<think>hm</think> It is 3.", 0.0),
        ("<think>hm \\boxed{3}", 0.0),
        ("<think>a</think><think>b</think>\\boxed{3}", 0.0),
    ],
)
def test_layout(completion, score):
    assert layout(Example("?", None, 1), completion).score == score


def test_layout_by_a_pattern_of_ones_own():
    example = Example("?", None, 1)
    assert layout(example, "yes\nno", pattern="yes.no").score == 1.0
    assert layout(example, "yes, no", pattern="yes.no").score == 0.0
