import pytest

pytest.importorskip("math_verify", reason="needs the data extra")

from geomjax.data.prompts import Example
from geomjax.rewards.contract import UNFINISHED
from geomjax.rewards.mathematics import last_boxed, mathematics

EQUAL = [
    ("34", r"so it is \boxed{34}."),
    ("34", "Answer: 34"),
    ("34", "Answer: $34$"),
    ("34", r"**Answer:** \(34\)"),
    ("034", r"\boxed{34}"),
    (r"\frac{1}{2}", r"\boxed{0.5}"),
    (r"\frac{1}{2}", r"\boxed{\dfrac{2}{4}}"),
    (r"\frac12", "The answer is 1/2"),
    ("0.125", r"$\frac{1}{8}$"),
    (r"2\sqrt{3}", r"\boxed{\sqrt{12}}"),
    (r"\frac{\sqrt{2}}{2}", r"\boxed{\frac{1}{\sqrt{2}}}"),
    (r"11\sqrt2", r"\boxed{11\sqrt{2}}"),
    (r"\pi", r"\boxed{\pi}"),
    ("1000", r"\boxed{1,000}"),
    (r"\$32,348", r"\boxed{32348}"),
    ("x=5", r"\boxed{5}"),
    ("5", r"\boxed{x = 5}"),
    ("1,2,3", r"\boxed{3, 2, 1}"),
    ("1,2", r"$\boxed{2}$ and $\boxed{1}$"),
    (r"\{1,2\}", r"\boxed{\{2,1\}}"),
    (r"(-\infty, 3)", r"\boxed{(-\infty,3)}"),
    (r"[0,1) \cup (2,3]", r"\boxed{(2,3] \cup [0,1)}"),
    (r"\left( 3, \frac{\pi}{2} \right)", r"\boxed{(3, \pi/2)}"),
    (
        r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}",
        r"\boxed{\begin{pmatrix}1\\2\end{pmatrix}}",
    ),
    ("6 - 5i", r"\boxed{-5i + 6}"),
    ("x^2+2x+1", r"\boxed{(x+1)^2}"),
    (r"30^\circ", r"\boxed{30}"),
    (r"\text{Evelyn}", r"\boxed{\text{Evelyn}}"),
    (r"5.4 \times 10^{3}", r"\boxed{5400}"),
    ("10\\%", r"\boxed{10\%}"),
    ("204", "<think>Is it \\boxed{3}? No.</think> It is $\\boxed{204}$."),
    ("2", r"First \boxed{1}. Looking at it for longer, I find that it is \boxed{2}"),
    (r"$\frac{3}{4}$", r"\boxed{\frac{3}{4}}"),
    (r"\boxed{7}", "The answer is 7."),
]

DIFFERENT = [
    ("34", r"\boxed{35}"),
    ("34", r"\boxed{3.4}"),
    ("34", r"\boxed{-34}"),
    ("204", "<think>\\boxed{204}</think> It is \\boxed{203}."),
    (r"\frac{1}{2}", r"\boxed{\frac{1}{3}}"),
    ("0.125", r"\boxed{0.13}"),
    (r"2\sqrt{3}", r"\boxed{2\sqrt{2}}"),
    (r"(-\infty, 3)", r"\boxed{(-\infty, 3]}"),
    (r"(3, \frac{\pi}{2})", r"\boxed{(\frac{\pi}{2}, 3)}"),
    ("1,2,3", r"\boxed{1,2}"),
    ("x^2+2x+1", r"\boxed{(x+2)^2}"),
    ("6 - 5i", r"\boxed{6 + 5i}"),
    (r"\text{Evelyn}", r"\boxed{\text{Navin}}"),
    (
        r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}",
        r"\boxed{\begin{pmatrix}2\\1\end{pmatrix}}",
    ),
    ("2", r"First \boxed{2}. Looking at it for longer, I find that it is \boxed{1}"),
    ("1", r"\boxed{x}"),
    ("2", r"\boxed{1}, \boxed{2}"),
    ("2", r"\boxed{1} or \boxed{2}"),
    ("2", r"\boxed{1, 2}"),
]


@pytest.mark.parametrize(("answer", "completion"), EQUAL)
def test_equal_answers_score_one(answer, completion):
    judgement = mathematics(Example("?", answer, 1), completion)
    assert (judgement.score, judgement.status) == (1.0, "judged"), judgement
    assert " equals " in judgement.reason


@pytest.mark.parametrize(("answer", "completion"), DIFFERENT)
def test_different_answers_score_zero(answer, completion):
    judgement = mathematics(Example("?", answer, 1), completion)
    assert (judgement.score, judgement.status) == (0.0, "judged"), judgement
    assert " differs from " in judgement.reason


@pytest.mark.parametrize(
    "completion",
    ["", "I do not know.", r"\boxed{}", "<think>It may be 34, or \\boxed{34}"],
)
def test_a_completion_without_an_answer_is_unparsed(completion):
    judgement = mathematics(Example("?", "34", 1), completion)
    assert (judgement.score, judgement.status) == (0.0, "unparsed completion")


def test_a_thought_that_the_prompt_opened_must_be_finished():
    example = Example("?", "34", 1, thinking=True)
    assert mathematics(example, r"It may be \boxed{34}") == UNFINISHED
    assert mathematics(example, r"Hm.</think>It is \boxed{34}").score == 1.0


@pytest.mark.parametrize("answer", [None, "", "  ", "???", r"\frac{1}{"])
def test_a_reference_that_cannot_be_read_is_told_apart(answer):
    example = Example("?", answer, 1)
    for completion in ("34", ""):
        judgement = mathematics(example, completion)
        assert judgement.status == "unparsed reference"
        assert judgement.score == 0.0


@pytest.mark.parametrize(
    ("text", "content"),
    [
        (r"\boxed{\{1\}}", r"\{1\}"),
        (r"\boxed{\frac{1}{2}} or so", r"\frac{1}{2}"),
        (r"\boxed{1}$, $\boxed{2}", "1, 2"),
        (r"\boxed{1} but \boxed{2}", "2"),
        (r"\boxed{a\boxed{b}c}", r"a\boxed{b}c"),
        (r"\boxed{1}, then cut off \boxed{2", "1"),
        (r"\boxed {3}", "3"),
        ("no", None),
        (r"\boxed{", None),
    ],
)
def test_last_boxed(text, content):
    assert last_boxed(text) == content


def test_votes_go_to_values_not_to_their_spelling():
    """What equals the reference is one answer; of others, numbers are by value."""

    def answer(completion):
        return mathematics(Example("?", r"2\sqrt{2}", 1), completion).answer

    assert answer(r"\boxed{\sqrt{8}}") == answer(r"\boxed{2\sqrt{2}}") is not None
    assert answer(r"\boxed{0.5}") == answer(r"\boxed{\frac{2}{4}}") == "1/2"
    assert answer(r"\boxed{3}") != answer(r"\boxed{4}")
    assert answer("no idea") is None
