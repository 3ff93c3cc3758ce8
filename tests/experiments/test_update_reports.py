"""mask_overlap and trajectory write tables, a record and a report."""

import csv
import json

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from experiments import mask_overlap, trajectory
from experiments.geometry_report import overlap as overlap_report
from experiments.geometry_report import trajectory as trajectory_report

LAYERS, WIDTH = 3, 16
Q = "model.layers.{}.self_attn.q_proj.weight"
UP = "model.layers.{}.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A source and checkpoints 10, 20 and 30 of one run; `bad` holds a NaN."""
    root = tmp_path_factory.mktemp("checkpoints")
    rng = np.random.default_rng(0)
    names = [name.format(i) for i in range(LAYERS) for name in (Q, UP)]
    now = {name: rng.standard_normal((WIDTH, WIDTH)) for name in names}
    now["model.norm.weight"] = np.ones(WIDTH)
    sides = {"source": now}
    for step in (10, 20, 30):
        now = {
            name: w + 0.1 * rng.standard_normal(w.shape) * (rng.random(w.shape) < 0.4)
            for name, w in now.items()
        }
        sides[f"step-{step}"] = now
    sides["bad"] = {name: w.copy() for name, w in now.items()}
    sides["bad"][Q.format(1)][0, 0] = np.nan
    for name, tensors in sides.items():
        (root / name).mkdir()
        stored = {k: w.astype(ml_dtypes.bfloat16) for k, w in tensors.items()}
        save_file(stored, root / name / "model.safetensors")
    return root


def _overlap(root, a, b, workdir):
    return overlap_report.Settings(
        source=str(root / "source"),
        a=str(root / a),
        b=str(root / b),
        workdir=str(workdir),
    )


def _stems(workdir):
    files = list((workdir / "figures").iterdir())
    assert all(path.stat().st_size > 0 for path in files)
    assert len({path.stem for path in files}) * 2 == len(files)
    return {path.stem for path in files}


def test_overlap_of_two_checkpoints(root, tmp_path):
    summary = mask_overlap.mask_overlap(
        _overlap(root, "step-10", "step-30", tmp_path / "out")
    )
    assert _stems(tmp_path / "out") == {"overlap", "lift_map", "overlap_layers"}
    whole = summary["global"]
    markdown = (tmp_path / "out" / "report.md").read_text()
    for column, what in overlap_report.COVERAGES.items():
        observed, chance = whole[column], whole[f"{column}_chance"]
        row = f"| {what} | {chance:.2%} | {observed:.2%} | {observed / chance:.2f} |"
        assert row in markdown
    for group, part in summary["groups"].items():
        assert f"| {group} | {part['numel']:,} |" in markdown
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert record["settings"]["atol"] == 1e-5
    assert len(record["processes"]) == 1
    with open(tmp_path / "out" / "overlap.csv", newline="") as file:
        assert len(list(csv.DictReader(file))) == 2 * LAYERS + 1
    assert (
        json.loads((tmp_path / "out" / "overlap_summary.json").read_text()) == summary
    )


def test_overlap_names_what_is_not_finite(root, tmp_path):
    summary = mask_overlap.mask_overlap(
        _overlap(root, "step-10", "bad", tmp_path / "out")
    )
    assert summary["not_finite"] == [Q.format(1)]
    markdown = (tmp_path / "out" / "report.md").read_text().replace("\\", "")
    assert f"Not finite, left out: {Q.format(1)}." in markdown


def test_no_overlap_without_updates(root, tmp_path):
    mask_overlap.mask_overlap(_overlap(root, "source", "step-10", tmp_path / "out"))
    markdown = (tmp_path / "out" / "report.md").read_text()
    assert "A moved no coordinate by more than 1e-05" in markdown
    assert "overlap.png" not in markdown


def _follow(root, names, workdir):
    return trajectory_report.Settings(
        source=str(root / "source"),
        checkpoints=tuple(str(root / name) for name in names),
        labels=tuple(names),
        workdir=str(workdir),
    )


def test_trajectory_of_a_run(root, tmp_path):
    names = ("step-10", "step-20", "step-30")
    rows = trajectory.follow(_follow(root, names, tmp_path / "out"))
    assert len(rows) == 3 * 2 * LAYERS
    figures = {"trajectory", "end_rank_map", "early_similarity_map"}
    assert _stems(tmp_path / "out") == figures
    means = json.loads((tmp_path / "out" / "trajectory_summary.json").read_text())
    markdown = (tmp_path / "out" / "report.md").read_text()
    point = means["all"][1]
    start = f"| step-20 | {point['delta_frobenius']:.4g} | {point['stable_rank']:.4g} |"
    assert start in markdown
    with open(tmp_path / "out" / "trajectory.csv", newline="") as file:
        written = list(csv.DictReader(file))
    assert float(written[0]["stable_rank"]) == rows[0]["stable_rank"]


def test_snapshots_of_two_runs_are_no_trajectory(root, tmp_path):
    runs = [tmp_path / "arms" / "opd" / f"seed_{seed}" for seed in (0, 1)]
    steps = [run / "snapshots" / "step_000001" for run in runs]
    one = [str(steps[0]), str(runs[0] / "final"), str(root / "step-10")]
    # Without metrics they are nobody's runs, whatever they are called.
    trajectory.require_one_run([*one, str(steps[1])])
    for run in runs:
        run.mkdir(parents=True)
        (run / "metrics.jsonl").touch()
    trajectory.require_one_run(one)
    with pytest.raises(
        ValueError, match=r"seed_0/.* and .*seed_1/.* of different runs"
    ):
        trajectory.require_one_run([*one, str(steps[1])])
    settings = _follow(root, ("step-10",), tmp_path / "out")
    with pytest.raises(ValueError, match="of different runs"):
        trajectory.follow(settings._replace(checkpoints=tuple(map(str, steps))))


def test_trajectory_names_what_is_not_finite_or_still(root, tmp_path):
    names = ("source", "bad", "step-30")
    rows = trajectory.follow(_follow(root, names, tmp_path / "out"))
    bad = [row["name"] for row in rows if row["notes"].startswith("not finite")]
    assert bad == [Q.format(1)]
    markdown = (tmp_path / "out" / "report.md").read_text().replace("\\", "")
    assert f"Not finite, in no mean: {Q.format(1)} at bad." in markdown
    assert "Its stable rank" not in markdown
    still = trajectory.follow(_follow(root, ("source",), tmp_path / "still"))
    assert all(row["delta_frobenius"] == 0 for row in still)
    markdown = (tmp_path / "still" / "report.md").read_text()
    assert "The last checkpoint equals the source" in markdown
    assert not (tmp_path / "still" / "figures").exists()


@pytest.mark.parametrize(
    ("labels", "wanted"),
    [
        (("step-10", "step-200"), ([10, 200], "step")),
        (("run/10/model", "run/20/model"), ([10, 20], "step")),
        (("b2", "b1"), ([1, 2], "checkpoint")),
        (("first", "b1"), ([1, 2], "checkpoint")),
    ],
)
def test_steps_are_read_from_labels_that_increase(labels, wanted):
    x, label = trajectory_report.steps(labels)
    assert (x.tolist(), label) == wanted


def test_a_folder_that_cannot_be_made_is_found_before_the_work(
    root, tmp_path, monkeypatch
):
    (tmp_path / "file").write_text("")
    workdir = tmp_path / "file" / "out"
    for module in (mask_overlap, trajectory):
        monkeypatch.setattr(module, "open_source", pytest.fail)
    with pytest.raises(NotADirectoryError, match="file/out"):
        mask_overlap.mask_overlap(_overlap(root, "step-10", "bad", workdir))
    with pytest.raises(NotADirectoryError, match="file/out"):
        trajectory.follow(_follow(root, ("step-10",), workdir))
