"""Rewards by name; what fails is counted, and costs its own sample alone."""

import pytest

from geomjax.data.code_tests import Case, CodeTests, dump_tests
from geomjax.data.prompts import Example
from geomjax.rewards.judge import REWARDS, Judge

REWARD = """
import os, time

def moody(example, completion, *, bonus=0.0):
    if completion == "raise":
        raise KeyError("missing")
    if completion == "hang":
        time.sleep(60)
    if completion == "die":
        os._exit(3)
    return len(completion) + bonus, "length"
"""


def test_exact_needs_no_process():
    with Judge("exact") as judge:
        examples = [Example("?", "1 2", 1), Example("?", None, 2), Example("?", "3", 3)]
        found = judge(examples, ["1  2 ", "3", "4"])
    assert [each.score for each in found] == [1.0, 0.0, 0.0]
    assert judge.counts == {"judged": 2, "unparsed reference": 1}


def test_mathematics_by_name():
    with Judge("math", timeout_s=60.0) as judge:
        examples = [Example("?", r"\frac{1}{2}", 1), Example("?", "???", 2)]
        assert judge.unusable(examples) == [
            (examples[1], "cannot read '???'"),
        ]
        assert not judge.counts
        (found,) = judge(examples[:1], [r"It is \boxed{0.5}"])
    assert found.score == 1.0


@pytest.mark.parametrize(
    ("name", "good", "bad"),
    [
        ("choice", "(B)", "both"),
        ("code", dump_tests(CodeTests(None, (Case("1", "1"),))), "{}"),
        ("layout", "anything", None),
    ],
)
def test_every_name_loads_and_finds_unusable_answers(name, good, bad):
    with Judge(name, workers=1, timeout_s=60.0) as judge:
        assert judge.unusable([Example("?", good, 1)]) == []
        if bad is not None:
            ((example, _),) = judge.unusable([Example("?", bad, 2)])
            assert example.line == 2


def test_what_a_reward_of_ones_own_does_costs_its_sample_and_is_counted(
    tmp_path, monkeypatch
):
    (tmp_path / "moody_reward.py").write_text(REWARD)
    monkeypatch.syspath_prepend(str(tmp_path))
    texts = ["abc", "raise", "hang", "die", "ab"]
    examples = [Example("?", "x", i) for i in range(5)]
    settings = {"bonus": 0.5}
    with Judge("moody_reward:moody", timeout_s=2.0, settings=settings) as judge:
        found = judge(examples, texts)
    assert [each.score for each in found] == [3.5, 0.0, 0.0, 0.0, 2.5]
    assert judge.counts == {"judged": 2, "failed": 2, "timed out": 1}
    notes = judge.notes()
    assert len(notes) == 2
    assert "2 judgements failed; the first: " in notes[0]
    assert "timed out; the first: took longer than 2 s" in notes[1]


def test_bad_requests():
    with pytest.raises(ValueError, match="reward 'maths'; known: choice, code, exact"):
        Judge("maths")
    with pytest.raises(ValueError, match="cannot be loaded"):
        Judge("geomjax.rewards.exact:inexact")
    with pytest.raises(ValueError, match="2 examples and 1 completions"):
        Judge("exact")([Example("?", "1", 1)] * 2, ["1"])
    assert {"choice", "code", "layout", "math"} == set(REWARDS)
