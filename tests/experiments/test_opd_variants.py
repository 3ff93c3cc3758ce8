"""OPD in several worlds: their configurations, claims by hand, and a small study."""

import json
from pathlib import Path

import pytest

from configs.opd_variants import get_config
from experiments import opd_variants
from experiments.common.outcome import Outcome
from experiments.opd_variants import Sizes, claims, of_arm, variants_table
from experiments.reproduction.results import Results
from experiments.studies.measured import Measured


@pytest.fixture
def worlds(tmp_path, monkeypatch):
    monkeypatch.setattr(opd_variants, "world_folder", lambda name: tmp_path / name)
    return tmp_path


def test_an_arm_has_its_own_world_and_teacher(worlds):
    config = get_config("tiny")
    opd = of_arm(config, "opd")
    assert (opd.world, opd.student, opd.teacher) == ("", "", "")
    large_teacher = of_arm(config, "large_teacher")
    assert (large_teacher.world, large_teacher.student) == ("", "")
    assert large_teacher.teacher == str(worlds / "deep" / "teacher")
    large_student = of_arm(config, "large_student")
    assert (large_student.world, large_student.teacher) == ("deep", "")
    assert of_arm(config, "other_task").world == "extremes"
    assert config.world == ""
    for name in config.arms:
        part = of_arm(config, name)
        assert list(part.arms) == [name]
        assert part.arms[name].learning_rate == 1e-5


def test_a_bundled_teacher_can_teach_another_worlds_student(worlds):
    config = get_config("tiny")
    config.arms.large_student.teacher_world = ""
    teacher = Path(of_arm(config, "large_student").teacher)
    assert teacher == opd_variants.TINY_WORLD / "teacher"
    config.arms.large_student.teacher = "mine"
    assert of_arm(config, "large_student").teacher == "mine"


def test_the_papers_arms_name_its_models():
    config = get_config("paper")
    part = of_arm(config, "large_student")
    assert part.student == "qwen3-14b-sft-anchor"
    assert part.base == "Qwen/Qwen3-14B-Base"
    assert part.teacher == "Qwen/Qwen3-32B"
    assert set(config.arms) == set(opd_variants.PAPER)


def arm(*unchanged, gain=0.1):
    """An arm of three seeds."""
    rows = [
        {"kind": "eval", "step": i, "test_accuracy": a, "validation_reverse_kl": 1.0}
        for i, a in enumerate((0.3, 0.3 + gain))
    ]
    runs = [Outcome(s, 1e-5, Path(), 1.0, None, 1.0, 0.0, rows) for s in range(3)]
    rest = {"relative_frobenius": 0.01, "median": {"stable_rank": 4.0}}
    stored = [{"global": {opd_variants.UNCHANGED: x}} for x in unchanged]
    return Measured(runs, {"stored": stored, "master": [{"global": rest}] * 3}, [], ())


def test_claims_are_judged_by_distances():
    arms = {
        "opd": arm(0.50, 0.51, 0.52),
        "large_teacher": arm(0.53, 0.54, 0.50),
        "large_student": arm(0.60, 0.62, 0.61),
        "other_task": arm(0.80, 0.81, 0.82),
    }
    teacher, student, task, seeds = claims(arms)
    assert teacher.samples == pytest.approx((0.03, 0.03, 0.02))
    assert teacher.holds is True
    assert student.samples == pytest.approx((0.07, 0.08, 0.11))
    assert student.holds is True
    assert task.samples == pytest.approx((0.3, 0.3, 0.3))
    assert task.holds is False
    assert seeds.range == pytest.approx(0.02)
    assert seeds.samples == (0.50, 0.51, 0.52)
    sizes = dict.fromkeys(arms, Sizes(400_000, 4_700_000))
    table = variants_table(arms, sizes)
    assert [row[1:3] for row in table.rows] == [[0.4, 4.7]] * 4
    assert table.rows[2][4] == 0.566
    assert table.rows[0][8].mean == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("samples", "apart", "holds"),
    [
        ((0.5, 0.515, 0.51), 0.015, True),
        ((0.5, 0.525, 0.51), 0.025, False),
        ((0.5, 0.501), 0.001, None),
        ((0.5,), None, None),
        ((0.5, None, 0.5, 0.5), None, None),
    ],
)
def test_seeds_agree_by_their_range(samples, apart, holds):
    *_, seeds = claims({"opd": arm(*samples)})
    assert seeds.range == (apart and pytest.approx(apart))
    assert seeds.holds is holds
    record = json.loads(json.dumps(seeds.record()))
    assert record == seeds.record()
    assert record["holds"] is holds
    shown = Results(Path(), {"claims": [record]}).claims()
    assert shown == [seeds.shown()]
    assert "below 0.02, of at least 3 seeds" in shown[0].evidence


@pytest.mark.slow
def test_a_small_study_from_start_to_report(tmp_path):
    workdir = tmp_path / "run"
    record = opd_variants.run(get_config("smoke"), workdir)
    assert json.loads((workdir / "results.json").read_text()) == record
    assert set(record["arms"]) == {"opd", "large_teacher"}
    # In the bundled world alone both arms are one and the same.
    first, second = record["arms"].values()
    assert first["geometry"] == second["geometry"]
    assert len(record["claims"]) == 2
    assert record["claims"][0]["samples"] == [0.0, 0.0]
    assert set(record["compilations"].values()) == {1}
    assert "opd: learn distill" in record["compilations"]
    assert record["config"]["arms"]["opd"]["teacher"] == ""
    text = (workdir / "report.md").read_text()
    assert "Beside the paper" in text
    for name in record["arms"]:
        assert (workdir / name / "arms" / name / "seed_1" / "final").is_dir()
