"""Every regime at its smallest, from start to report."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file

from configs.training_regimes import get_config
from experiments import training_regimes
from geomjax.train.log import read_rows

pytestmark = pytest.mark.slow
ARMS = {"sft", "sft_anchor", "opd", "rlvr", "offline"}


@pytest.fixture(scope="module")
def finished(smoke):
    return smoke.run("training_regimes")


def rows(workdir, arm, seed=0, kind="train"):
    found = read_rows(workdir / "arms" / arm / f"seed_{seed}")
    return [row for row in found if row["kind"] == kind]


def test_results_hold_every_arm_and_claim(finished):
    workdir, record = finished
    assert json.loads((workdir / "results.json").read_text()) == record
    assert set(record["arms"]) == ARMS
    assert len(record["claims"]) == 15
    sources = [claim["source"] for claim in record["claims"]]
    assert sources.count("ours: same start and rate") == 3
    assert (
        record["arms"]["sft_anchor"]["learning_rate"]
        == (record["arms"]["opd"]["learning_rate"])
    )
    for claim in record["claims"]:
        assert claim["holds"] in (True, False, None)
        assert len(claim["samples"]) == 1
        assert claim["source"]
        assert claim["statistic"]
    for arm in record["arms"].values():
        assert [seed["seed"] for seed in arm["seeds"]] == [0]
        assert len(arm["trajectories"][0]) == len(arm["progress"]) == 3
        for kind in ("stored", "master"):
            summary = arm["geometry"][kind]
            assert 0 <= summary["bf16_unchanged_fraction"] <= 1
            assert summary["mean"]["normalized_spectral_shift"] is not None
        assert arm["geometry"]["master"]["relative_frobenius"] > 0


def test_nothing_is_compiled_twice_and_rates_share_programs(finished):
    _, record = finished
    counts = record["compilations"]
    assert set(counts.values()) == {1}
    assert {"learn imitate", "learn distill", "learn reward"} <= set(counts)


def test_the_report_shows_claims_papers_and_figures(finished):
    workdir, _ = finished
    text = (workdir / "report.md").read_text()
    for part in (
        "OPD leaves more weights unchanged in bfloat16 than SFT",
        "P2 OPD, 8B from 32B",
        "its chance level",
        "python",
    ):
        assert part in text
    figures = {path.stem for path in (workdir / "figures").iterdir()}
    assert figures == {"accuracy", "trajectories"}


def test_arms_learn_from_what_they_should(finished):
    workdir, _ = finished
    reward = rows(workdir, "rlvr")
    assert all(0 <= row["reward"] <= 1 for row in reward)
    assert all(0 <= row["groups_without_contrast"] <= 1 for row in reward)
    assert "gap" not in reward[0]
    assert "gap" in rows(workdir, "opd")[0]
    assert "reward" not in rows(workdir, "sft")[0]
    # Cross-entropy on right answers falls fast from the base.
    loss = [row["loss"] for row in rows(workdir, "sft")]
    assert loss[-1] < loss[0]
    # The first update on a rollout has ratios of one: drawn and scored alike.
    assert rows(workdir, "opd")[0]["ratio"] == pytest.approx(1, abs=1e-3)


def test_the_wait_for_prompts_is_measured(finished):
    workdir, _ = finished
    for arm in ("sft", "opd", "rlvr"):
        path = workdir / "arms" / arm / "seed_0" / "finished.json"
        record = json.loads(path.read_text())
        assert 0 < record["input_wait_s"] < record["seconds"]


def test_snapshots_are_on_the_way_from_start_to_end(finished):
    workdir, _ = finished
    folder = workdir / "arms" / "opd" / "seed_0"
    kept = sorted(path.name for path in (folder / "snapshots").iterdir())
    assert kept == ["step_000002", "step_000004", "step_000006"]
    weights = [
        load_file(folder / "snapshots" / name / "model.safetensors") for name in kept
    ]
    final = load_file(folder / "final" / "model.safetensors")
    for name, array in final.items():
        np.testing.assert_array_equal(weights[-1][name], array)
    name = "model.layers.0.mlp.up_proj.weight"
    assert (weights[0][name] != weights[1][name]).any()


def test_a_finished_study_is_read_back(finished, monkeypatch):
    """No run is trained again, and the same record comes out."""
    workdir, record = finished
    monkeypatch.setattr(
        training_regimes.Study, "_train", lambda *args: pytest.fail("trained again")
    )
    again = training_regimes.run(get_config("smoke"), workdir)
    for part in ("arms", "claims"):
        assert again[part] == record[part]
