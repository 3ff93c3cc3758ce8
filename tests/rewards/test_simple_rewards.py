import pytest

from geomjax.data.code_tests import Case, CodeTests, dump_tests
from geomjax.data.prompts import Example
from geomjax.rewards.choice import multiple_choice
from geomjax.rewards.code import code
from geomjax.rewards.contract import UNFINISHED, Judgement, final_part
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
        ("The answer is A function of x, so B", None),
        ("The answer is A\nfunction of x", "A"),
        ("The answer is I think B", None),
        ("The answer, I think, is B", None),
        ("The answer is not A but B", None),
        ("The answer is A or B", None),
        ("The answer is (A) or (B)", None),
        ("The answer is A-level", None),
        ("The answer is A.M. or P.M.", None),
        ("Answer:\nA large number", None),
        ("The answer is B because A is not prime", "B"),
        ("The answer is: **B**", "B"),
        ("The answer is $\\text{(B)}$.", "B"),
        ("The correct answer is option B.", "B"),
        ("The answer must be B, as A is even", "B"),
        ("the best choice is\n\n[B]", "B"),
        ("answer = B", "B"),
        ("Option A is wrong, I see.", None),
        ("Option A is wrong, so option B is correct.", "B"),
        ("Choice (B) is the right one", "B"),
        ("Option A is not correct", None),
        ("Option A: too small\nOption B: too large", None),
        ("A) 1\nB) 2", None),
        ("Answers vary: I", None),
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


@pytest.mark.parametrize(
    ("opened", "completion", "said"),
    [
        (False, "B", "B"),
        (False, "hm</think>B", "B"),  # The prompt was not seen to open a thought.
        (False, "<think>A</think>B", "B"),
        (False, "<think>A</think>C</think>B", "B"),
        (False, "<think>B", None),
        (False, "<think>A</think>B<think>", None),
        (True, "B", None),
        (True, "A</think>B", "B"),
        (True, "A</think><think>C</think>B", "B"),
        (True, "A</think>", ""),
    ],
)
def test_an_answer_follows_the_last_finished_thought(opened, completion, said):
    example = Example("?", "B", 1, thinking=opened)
    assert final_part(example, completion) == said
    tests = Example("?", dump_tests(CodeTests("f", (Case([], 1),))), 1, thinking=opened)
    judgements = [
        multiple_choice(example, completion),
        exact(example, completion),
        code(tests, completion),
    ]
    if said is None:
        assert judgements == [UNFINISHED] * 3
    else:
        assert UNFINISHED not in judgements
        assert [each.score for each in judgements] == [said == "B", said == "B", 0]


def test_a_thought_that_the_prompt_opened_is_part_of_the_layout():
    completion = "hm</think> It is \\boxed{3}."
    assert layout(Example("?", None, 1), completion).score == 0.0
    assert layout(Example("?", None, 1, thinking=True), completion).score == 1.0


def test_layout_by_a_pattern_of_ones_own():
    example = Example("?", None, 1)
    assert layout(example, "yes\nno", pattern="yes.no").score == 1.0
    assert layout(example, "yes, no", pattern="yes.no").score == 0.0
