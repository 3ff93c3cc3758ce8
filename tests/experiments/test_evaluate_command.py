"""`experiments.evaluate` on the tiny world: figures, intervals, resuming, bad input."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from evaluate_runs import PROBLEMS, SAMPLES, config, evaluated, lines
from hf_folders import bpe_tokenizer

from experiments import evaluate
from experiments.common import workdir as workdirs
from experiments.common.benchmarks import Size
from experiments.common.world import TINY_WORLD
from experiments.evaluation import report
from experiments.evaluation.generations import keep_problems
from experiments.evaluation.suites import EXACT, REWARDS, read_suites
from geomjax.checkpoints.writer import write_safetensors
from geomjax.data.prompts import Example
from geomjax.evaluation.bootstrap import Bootstrap, interval
from geomjax.evaluation.estimators import pass_at_k
from geomjax.models.load import make_decoder, new_config_json, stored_tensors


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """Anchor and teacher on the same problems."""
    folder = tmp_path_factory.mktemp("compared")
    record = evaluated(folder, compare=str(TINY_WORLD / "teacher"))
    return folder, record


def test_greedy_accuracy_is_that_recorded_with_the_world(tmp_path):
    """All 1,024 test problems, through another decoding loop than the one recorded."""
    record = evaluated(tmp_path, samples=1, temperature=0.0, limit=0, rows=256)
    recorded = json.loads((TINY_WORLD / "recipe.json").read_text())["snapshots"]
    found = record["suites"]["tiny-world"]["checkpoint"]["mean"]
    assert found["problems"] == 1024
    assert round(found["mean"], 4) == recorded["anchor"]["test_accuracy"]
    assert found["low"] < found["mean"] < found["high"]


def test_figures_are_those_of_the_generations(compared):
    folder, record = compared
    for model in ("checkpoint", "compare"):
        rows = lines(folder / model / "tiny-world.jsonl")
        assert [(r["problem"], r["sample"]) for r in rows] == [
            (p, s) for p in range(PROBLEMS) for s in range(SAMPLES)
        ]
        problems = lines(folder / model / "tiny-world.problems.jsonl")
        for row in rows:
            expected = problems[row["problem"]]["answer"]
            assert row["score"] == float(row["completion"].strip() == expected)
        scores = np.array([r["score"] for r in rows]).reshape(PROBLEMS, SAMPLES)
        found = record["suites"]["tiny-world"][model]
        assert found["mean"]["mean"] == pytest.approx(scores.mean())
        right = scores.sum(axis=1).astype(int).tolist()
        for k in (1, 2, 4, 8):
            expected = np.mean([pass_at_k(SAMPLES, c, k) for c in right])
            assert found["passes"][str(k)]["mean"] == pytest.approx(expected)
        votes = [[r["answer"] for r in rows[i : i + 8]] for i in range(0, len(rows), 8)]
        agreed = [
            i for i, own in enumerate(votes) if max(map(own.count, own)) > SAMPLES / 2
        ]
        assert agreed
        assert found["majority"]["mean"] >= scores[agreed].mean(axis=1).mean() / 2
        bins = found["by_length"]
        assert sum(b["samples"] for b in bins) == scores.size
        assert found["truncated"]["mean"] == pytest.approx(
            np.mean([not r["stopped"] for r in rows])
        )
        # Sampled, or the test says little of intervals.
        assert 0 < scores.mean() < 1
        assert ((0 < scores.mean(axis=1)) & (scores.mean(axis=1) < 1)).any()


def test_the_difference_is_paired_by_problem(compared):
    folder, record = compared
    means = [
        np.array([r["score"] for r in lines(folder / model / "tiny-world.jsonl")])
        .reshape(PROBLEMS, SAMPLES)
        .mean(axis=1)
        for model in ("checkpoint", "compare")
    ]
    found = record["differences"]["tiny-world"]
    assert found["mean"] == pytest.approx((means[1] - means[0]).mean())
    assert found["low"] > 0.2  # The teacher is better, beyond doubt.
    assert found == interval(means[1] - means[0], Bootstrap(1000))._asdict()


def test_intervals_hold_the_true_accuracy_at_the_stated_rate(compared):
    """Suites of 40 problems with 2 samples, drawn again and again from the world's.

    The truth is the mean over all problems and samples of the anchor.
    """
    folder, _ = compared
    rows = lines(folder / "checkpoint" / "tiny-world.jsonl")
    scores = np.array([r["score"] for r in rows]).reshape(PROBLEMS, SAMPLES)
    generator, repeats, hits = np.random.default_rng(0), 400, 0
    for seed in range(repeats):
        problem = generator.integers(PROBLEMS, size=40)
        sample = generator.integers(SAMPLES, size=(40, 2))
        means = scores[problem[:, None], sample].mean(axis=1)
        found = interval(means, Bootstrap(1000, seed))
        hits += found.low <= scores.mean() <= found.high
    assert abs(hits / repeats - 0.95) < 3 * np.sqrt(0.95 * 0.05 / repeats) + 0.01


def test_a_run_that_was_killed_ends_with_the_same_bytes(compared, tmp_path):
    """Killed in the second block: half of it, and half a line, are on disk."""
    whole, _ = compared
    killed = tmp_path / "killed"
    shutil.copytree(whole, killed)
    written = killed / "checkpoint" / "tiny-world.jsonl"
    block = 8 * 64 // SAMPLES * SAMPLES
    data = written.read_bytes().split(b"\n")
    assert len(data) > 2 * block
    written.write_bytes(b"\n".join(data[: block + 100]) + b'\n{"problem": 77, "sa')
    shutil.rmtree(killed / "compare")
    for name in ("report.html", "report.md", "results.json"):
        (killed / name).unlink()
    evaluated(killed, compare=str(TINY_WORLD / "teacher"))
    files = sorted(p.relative_to(whole) for p in whole.rglob("*") if p.is_file())
    assert len(files) >= 8
    for file in files:
        if file.name == "provenance.json":  # Lists the starts, of which there are two.
            continue
        assert (killed / file).read_bytes() == (whole / file).read_bytes(), file


def test_the_report_shows_figures_and_generations(compared):
    folder, record = compared
    page = (folder / "report.html").read_text()
    mean = record["suites"]["tiny-world"]["compare"]["mean"]
    shown = f"{mean['mean']:.1%} [{100 * mean['low']:.1f}, {100 * mean['high']:.1f}]"
    assert shown in page
    assert page.count("<details data-labels") == 2 * PROBLEMS * SAMPLES
    assert ">incorrect</option>" in page
    assert shown in (folder / "report.md").read_text().replace("\\", "")


def test_no_interval_is_shown_where_all_problems_score_alike():
    same = interval(np.ones(30), Bootstrap(100))
    assert report.shown(same) == "100.0%"
    zero, none = same._replace(mean=0.0), interval(np.ones(0), Bootstrap(100))
    some = interval(np.array([0.0, 0.1, 0.2]), Bootstrap(100))
    table = report._differences({"a": zero, "b": none, "c": some})
    assert [row[-1] for row in table.rows][:2] == ["+0.0", "–"]
    assert table.rows[2][-1].startswith("+10.0 [")


def test_a_reward_that_raises_or_hangs_costs_its_sample(tmp_path, monkeypatch, capsys):
    (tmp_path / "moody_reward.py").write_text(
        "import time\n"
        "from geomjax.rewards.exact import exact\n"
        "def judge(example, completion):\n"
        "    if example.line % 3 == 0 and completion < '5':\n"
        "        raise RuntimeError('moody')\n"
        "    if example.line == SLOW:\n"
        "        time.sleep(60)\n"
        "    return exact(example, completion)\n"
    )
    (suite,) = read_suites("tiny-world", limit=24)
    slow = next(e.line for e in suite.examples if e.line % 3)
    source = tmp_path / "moody_reward.py"
    source.write_text(source.read_text().replace("SLOW", str(slow)))
    monkeypatch.syspath_prepend(str(tmp_path))
    changes = {"samples": 2, "limit": 24, "rows": 64}
    plain = evaluated(tmp_path / "plain", **changes)
    record = evaluated(
        tmp_path / "moody",
        **changes,
        reward="moody_reward:judge",
        reward_timeout_s=3.0,
    )
    found = record["suites"]["tiny-world"]["checkpoint"]
    rows = lines(tmp_path / "moody" / "checkpoint" / "tiny-world.jsonl")
    before = lines(tmp_path / "plain" / "checkpoint" / "tiny-world.jsonl")
    assert len(rows) == 48
    assert found["statuses"]["failed"] > 0
    assert found["statuses"]["timed out"] == 2
    for row, old in zip(rows, before, strict=True):
        if row["status"] == "judged":
            assert row == old
        assert row["completion"] == old["completion"]
    told = [r for r in rows if r["status"] != "failed"]
    by_problem = {}
    for row in told:
        by_problem.setdefault(row["problem"], []).append(row["score"])
    expected = np.mean([np.mean(scores) for scores in by_problem.values()])
    assert found["mean"]["mean"] == pytest.approx(expected)
    assert plain["suites"]["tiny-world"]["checkpoint"]["statuses"] == {"judged": 48}
    assert "judgements to look at: {" in capsys.readouterr().out


AIME = [{"problem": f"What is {i} + 1?", "answer": str(i + 1)} for i in range(3)]


def test_named_suites_are_read_from_local_files(tmp_path):
    aime, own = tmp_path / "aime.jsonl", tmp_path / "own.jsonl"
    aime.write_text("".join(json.dumps(row) + "\n" for row in AIME))
    own.write_text(json.dumps({"prompt": "1+1=", "answer": "2"}) + "\n")
    first, second, third = read_suites(f"aime24={aime}, prompts={own},tiny-world")
    assert [len(s.examples) for s in (first, second, third)] == [3, 1, 1024]
    assert "boxed" in first.examples[0].prompt
    assert (first.reward, second.reward) == (REWARDS["mathematics"], EXACT)
    assert first.source == aime
    limited = read_suites(f"aime24={aime},tiny-world", limit=2, reward="a:b")
    assert [(len(s.examples), s.reward) for s in limited] == [(2, "a:b")] * 2
    own.write_text(own.read_text() + "is not read\n")
    (cut,) = read_suites(f"prompts={own}", limit=1)
    assert len(cut.examples) == 1


def bpe_checkpoint(folder):
    """A random model whose tokenizer knows every byte and has a chat template."""
    tokenizer = bpe_tokenizer()
    size = Size(32, 48, 1, 2, 1, 1, 1, 1, turns=1, calls=1)
    decoder = dataclasses.replace(size.config(), vocab_size=len(tokenizer))
    model = make_decoder(decoder, len(tokenizer))
    params = model.init(jax.random.key(0))
    write_safetensors(folder, stored_tensors(params, model, np.float32))
    fields = new_config_json(model, dtype="float32")
    (folder / "config.json").write_text(json.dumps(fields))
    tokenizer.save_pretrained(folder)
    return tokenizer


def test_a_named_suite_goes_through_template_and_mathematics(tmp_path, capsys):
    """A random model writes bytes, of which nothing may break the report."""
    pytest.importorskip("math_verify", reason="needs the data extra")
    model, data = tmp_path / "model", tmp_path / "aime.jsonl"
    model.mkdir()
    bpe_checkpoint(model)
    unreadable = {"problem": "What is this?", "answer": "?!"}
    rows = [*AIME, unreadable]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    record = evaluated(
        tmp_path / "run",
        checkpoint=str(model),
        suite=f"aime24={data}",
        samples=2,
        max_new_tokens=24,
        top_p=0.95,
        temperature=0.7,
        system="Think first.",
    )
    seen = capsys.readouterr().out
    assert "<s>system\nThink first.<e>\n<s>user\nWhat is 0 + 1?" in seen
    assert seen.count("boxed") == 1  # The first prompt, as the model sees it.
    found = record["suites"]["aime24"]["checkpoint"]
    assert sum(found["statuses"].values()) == 8
    assert found["statuses"]["unparsed reference"] == 2
    assert found["statuses"].keys() <= {
        "judged",
        "unparsed completion",
        "unparsed reference",
    }
    assert found["mean"]["problems"] == 3
    assert record["unparsed_references"] == {"aime24": [4]}
    assert "cannot be read: lines [4]" in seen
    rows = lines(tmp_path / "run" / "checkpoint" / "aime24.jsonl")
    assert all(1 <= row["tokens"] <= 24 for row in rows)
    told = [row["status"] for row in rows if row["problem"] < 3]
    unparsed = [status == "unparsed completion" for status in told]
    assert found["unparsed"]["mean"] == pytest.approx(np.mean(unparsed))
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert page.count("<details data-labels") == 8


def test_a_thought_that_the_template_opens_must_be_finished(tmp_path):
    pytest.importorskip("math_verify", reason="needs the data extra")
    model, data = tmp_path / "model", tmp_path / "aime.jsonl"
    model.mkdir()
    tokenizer = bpe_checkpoint(model)
    tokenizer.chat_template += "<think>\n"
    tokenizer.save_pretrained(model)
    data.write_text("".join(json.dumps(row) + "\n" for row in AIME))
    evaluated(
        tmp_path / "run",
        checkpoint=str(model),
        suite=f"aime24={data}",
        samples=1,
        max_new_tokens=8,
    )
    rows = lines(tmp_path / "run" / "checkpoint" / "aime24.jsonl")
    reasons = [row["reason"] for row in rows]
    assert reasons == ["thinking was not finished"] * len(AIME)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ("aime23", "unknown suite 'aime23'; known: dapo-math-17k"),
        ("openthoughts", "its rows hold no answers to judge by"),
        ("prompts", "name its file"),
        ("tiny-world,tiny-world", "each once; twice: ..tiny-world"),
        (" ,", "expected suites"),
    ],
)
def test_suites_that_cannot_be_evaluated(asked, message):
    with pytest.raises(ValueError, match=message):
        read_suites(asked)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"checkpoint": ""}, "names no checkpoint"),
        ({"samples": 0}, "--samples is 0"),
        ({"chat": "on"}, "no chat template"),
        ({"system": "Be brief."}, "parts of a chat template"),
        ({"top_p": 0.0}, "top_p is 0"),
        ({"reward": "no.such:reward"}, "cannot be loaded"),
        ({"mesh": "data=3"}, "3 places for 8 devices"),
    ],
)
def test_settings_without_a_meaning(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        evaluated(tmp_path, limit=4, **changes)
    assert not (tmp_path / "results.json").exists()


def test_problems_that_changed_are_refused(tmp_path):
    path = tmp_path / "suite.problems.jsonl"
    examples = [Example("1+1=", "2", 1)]
    keep_problems(path, examples)
    keep_problems(path, examples)
    with pytest.raises(workdirs.WorkdirError, match="problems have changed"):
        keep_problems(path, [Example("1+1=", "3", 1)])


def test_generations_that_are_damaged_are_refused(compared, tmp_path):
    folder = tmp_path / "damaged"
    shutil.copytree(compared[0], folder)
    path = folder / "checkpoint" / "tiny-world.jsonl"
    path.write_bytes(path.read_bytes().replace(b'"problem": 3,', b'"other": 3,'))
    with pytest.raises(ValueError, match="is damaged .*; remove it"):
        evaluated(folder, compare=str(TINY_WORLD / "teacher"))


def test_every_flag_is_part_of_the_configuration():
    source = Path(evaluate.__file__).read_text()
    defined = {
        line.split('"')[1]
        for line in source.replace("(\n        ", "(").splitlines()
        if "flags.DEFINE_" in line
    }
    assert defined - {"workdir"} == set(evaluate._FIELDS) == set(config().keys())
