"""The parts that studies share, and their configurations."""

import json
import sys
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import (
    dynamics,
    loss_forms,
    objective_controls,
    opd_variants,
    p2,
    precision,
    subspace_locking,
    training_regimes,
)
from experiments import redo
from experiments import subspace_locking as subspace_locking_study
from experiments.common import provenance
from experiments.common import workdir as workdirs
from experiments.common.outcome import Outcome
from experiments.common.world import TINY_WORLD
from experiments.loss_forms import claims as form_claims
from experiments.objective_controls import claims as control_claims
from experiments.studies import study as study_module
from experiments.studies.begin import begin
from experiments.studies.costs import cost_table
from experiments.studies.measured import Measured, study_metrics
from experiments.studies.moments import moments_section
from experiments.studies.rate import require_proportional, with_rate
from experiments.studies.report import accuracy_plot, arms_table
from experiments.studies.run import Run
from experiments.studies.settings import base_folder, check_settings
from experiments.studies.study import snapshot_steps
from experiments.studies.verdict import Verdict, differences
from geomjax.analysis import plots
from geomjax.optim import OptimizerSpec, build, random_basis

STUDIES = {
    "training_regimes": training_regimes,
    "subspace_locking": subspace_locking,
    "objective_controls": objective_controls,
    "loss_forms": loss_forms,
    "precision": precision,
    "dynamics": dynamics,
    "opd_variants": opd_variants,
}


def verdict(side, threshold, *samples):
    return Verdict("A above B", "P2, Table 1", "share", side, threshold, samples)


@pytest.mark.parametrize(
    ("side", "threshold", "samples", "holds"),
    [
        # Mean 2, deviation 1, half width 4.303 / sqrt(3) = 2.484.
        ("above", -0.5, (1.0, 2.0, 3.0), True),
        ("above", -0.4, (1.0, 2.0, 3.0), None),
        ("above", 4.4, (1.0, 2.0, 3.0), None),
        ("above", 4.5, (1.0, 2.0, 3.0), False),
        ("below", 4.5, (1.0, 2.0, 3.0), True),
        ("below", 4.4, (1.0, 2.0, 3.0), None),
        ("below", -0.5, (1.0, 2.0, 3.0), False),
        ("above", 0.0, (0.0, 0.0, 0.0), None),
        ("above", 0.0, (5.0,), None),
        ("above", 0.0, (5.0, None, 5.0), None),
        ("above", 0.0, (5.0, float("nan"), 5.0), None),
    ],
)
def test_a_claim_is_decided_by_its_whole_interval(side, threshold, samples, holds):
    claim = verdict(side, threshold, *samples)
    assert claim.holds is holds
    assert claim.shown().holds is holds
    record = claim.record()
    assert record["holds"] is holds
    assert record["threshold"] == threshold
    assert len(record["samples"]) == len(samples)
    assert all(s is None or s == s for s in record["samples"])


def test_the_evidence_says_what_was_measured_and_the_threshold():
    shown = verdict("above", 0.25, 1.0, 2.0, 3.0).shown()
    assert shown.claim == "A above B (P2, Table 1)"
    assert "share: 2 (± 2.48; seeds: 1, 2, 3)" in shown.evidence
    undecided = ", which contains it: not decided"
    assert shown.evidence.endswith(f"threshold: the interval above 0.25{undecided}")
    shown = verdict("above", -0.5, 1.0, 2.0, 3.0).shown()
    assert shown.evidence.endswith("threshold: the interval above -0.5")


def test_differences_are_by_seed():
    assert differences([3.0, None, 1.0], [1.0, 2.0, 5.0]) == (2.0, None, -4.0)


def test_a_rate_in_the_state_is_the_rate_of_the_optimizer():
    """AdamW at 1 times 0.01 is AdamW at 0.01, weight decay included."""
    params = {"w": jnp.linspace(-1, 1, 8).reshape(2, 4)}
    gradient = {"w": jnp.linspace(3, -2, 8).reshape(2, 4)}

    def after(tx):
        state = tx.init(params)
        for _ in range(3):
            with jax.numpy_dtype_promotion("standard"):
                updates, state = tx.update(gradient, state, params)
        return updates["w"]

    whole = optax.adamw(0.01, weight_decay=0.1)
    scaled = with_rate(0.01, optax.adamw(1.0, weight_decay=0.1))
    np.testing.assert_allclose(after(scaled), after(whole), rtol=1e-5)


def test_an_optimizer_that_no_rate_scales_is_refused():
    params = {"w": jnp.zeros((9, 2)), "b": jnp.zeros(2)}

    def bounded(rate):
        return optax.chain(optax.sgd(rate), optax.clip(1e-2))

    with jax.numpy_dtype_promotion("standard"):
        require_proportional(optax.contrib.adopt, params)
        require_proportional(lambda rate: optax.adamw(rate, weight_decay=0.1), params)
        with pytest.raises(ValueError, match="not proportional to its learning rate"):
            require_proportional(bounded, params)


@pytest.mark.parametrize("rate", [0.0, -1.0, float("inf"), float("nan")])
def test_rates_that_are_none_are_refused(rate):
    with pytest.raises(ValueError, match="expected a number above 0"):
        with_rate(rate, optax.sgd(1.0))


def test_snapshots_are_at_shares_of_the_run_and_at_its_end():
    config = training_regimes.get_config("tiny")
    assert snapshot_steps(config) == (10, 20, 40, 80, 120, 160, 200)
    config.num_steps = 3
    assert snapshot_steps(config) == (1, 2, 3)
    config.snapshot_shares = (0.5, 1.5)
    with pytest.raises(ValueError, match="expected above 0, at most 1"):
        snapshot_steps(config)


@pytest.mark.parametrize("variant", ["tiny", "smoke", "paper"])
@pytest.mark.parametrize("name", STUDIES)
def test_every_variant_builds(name, variant):
    config = STUDIES[name].get_config(variant)
    check_settings(config)
    optimizer = config.optimizer
    build(
        OptimizerSpec(
            name=optimizer.transform,
            learning_rate=1.0,
            clip_norm=optimizer.clip_norm,
            kwargs=optimizer.options.to_dict(),
        ),
        {},
    )
    assert all(0 < arm.learning_rate < 1 for arm in config.arms.values())
    if variant == "tiny":
        assert len(config.seeds) >= 3
    if name == "subspace_locking":
        assert round(config.basis_share * config.num_steps) in snapshot_steps(config)


@pytest.mark.parametrize("name", STUDIES)
def test_papers_settings_are_those_of_the_recipe(name):
    """P2's OPD batch, samples and steps, and its kind of reward, for every arm."""
    config = STUDIES[name].get_config("paper")
    recipe = p2.get_config("opd")
    for field in ("prompts_per_step", "samples_per_prompt", "num_steps"):
        assert config[field] == recipe[field]
    assert config.prompts_per_step * config.samples_per_prompt == 64
    assert config.reward.name == p2.get_config("rlvr").reward.name == "math"
    # Gradients of single tokens, [N, m, n], would not fit.
    assert config.get("moment_matrices", ()) == ()


@pytest.mark.parametrize("study", [training_regimes, subspace_locking])
def test_arms_note_where_the_papers_sft_and_rlvr_differ(study):
    arms = study.get_config("paper").arms
    assert arms.sft.published.to_dict() == {
        "prompts": "dolci-think-sft",
        "sequences_per_step": 256,
        "num_steps": 5375,
        "schedule": "cosine",
        "final_learning_rate": 1e-6,
        "warmup_steps": 537,
        "b2": 0.95,
    }
    assert arms.rlvr.published.to_dict() == {
        "sequences_per_step": 512,
        "num_steps": 1023,
        "eps": 1e-15,
    }
    assert "published" not in arms.opd
    assert "published" not in study.get_config("tiny").arms.sft


@pytest.mark.parametrize("name", STUDIES)
def test_unknown_variants_are_refused(name):
    with pytest.raises(ValueError, match="variant 'large'; known: tiny, smoke, "):
        STUDIES[name].get_config("large")


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("samples_per_prompt", 1, "GRPO compares the completions"),
        ("mini_batches", 3, "cannot be split into 3"),
        ("num_steps", 0, "num_steps is 0"),
        ("seeds", (1, 1), "each once"),
        ("ratio_clip", (2.0, 0.2), "expected low from 0 to 1"),
        ("snapshot_shares", (0.0,), "snapshot_shares"),
        ("accuracy", False, "claims need answers"),
        ("temperature", 0.0, "temperature is 0"),
        ("micro_batches", 3, "equal parts"),
        ("overlong", "cut", "overlong is 'cut'"),
    ],
)
def test_settings_out_of_range_are_refused(field, value, message):
    config = training_regimes.get_config("smoke")
    config[field] = value
    with pytest.raises(ValueError, match=message):
        check_settings(config)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("kind", "distil", "arm opd: kind 'distil'; known: distill"),
        ("start", "teacher", "arm opd: start 'teacher'; known: anchor, base"),
        ("stored", "up", "arm opd: stored 'up'; known: float32, nearest, stochastic"),
        ("learning_rate", 0.0, "arm opd: learning_rate is 0.0; expected a number"),
        ("learning_rate", float("nan"), "arm opd: learning_rate is nan"),
    ],
)
def test_arms_out_of_range_are_refused(field, value, message):
    config = training_regimes.get_config("smoke")
    config.arms.opd[field] = value
    with pytest.raises(ValueError, match=message):
        check_settings(config)


def test_a_base_that_is_no_folder_is_refused(tmp_path):
    config = training_regimes.get_config("smoke")
    assert base_folder(config) == TINY_WORLD / "base"
    config.base = str(tmp_path / "bsae")
    with pytest.raises(ValueError, match="bsae"):
        base_folder(config)


@pytest.mark.parametrize("name", STUDIES)
def test_a_study_is_redone_from_its_folder(name, tmp_path, monkeypatch):
    """Up to its first run: with the configuration and under the name it had."""
    study, begun = redo.load_experiment(name), []
    monkeypatch.setattr(
        study, "_run", lambda config, *_: begun.append(config.to_dict())
    )
    first, again = tmp_path / "first", tmp_path / "again"
    with workdirs.locked(first):
        config = STUDIES[name].get_config("smoke")
        study.run(workdirs.claim(first, config, resume=False), first)
    redo.redo(first, again)
    for folder in (first, again):
        assert provenance.read(folder)["experiment"] == name
    assert json.dumps(begun[0]) == json.dumps(begun[1])


def measured(*accuracies, first_step=0, norm=0.1):
    """An arm of two seeds, evaluated every 3 steps, with an update of some norm."""
    rows = [
        {
            "kind": "eval",
            "step": 3 * i,
            "test_accuracy": accuracy,
            "validation_reverse_kl": 1.0,
        }
        for i, accuracy in enumerate(accuracies)
    ]
    rows += [{"kind": "train", "update": 0, "momentum_gradient_cosine": 0.5}]
    runs = [Outcome(seed, 1e-4, Path(), 1.0, None, 1.0, 0.0, rows) for seed in (0, 1)]
    summary = {"global": {"relative_frobenius": norm}}
    kinds = {"stored": [summary] * 2, "master": [summary] * 2}
    return Measured(runs, kinds, [], (), first_step)


def test_without_matrices_there_is_no_section_and_no_claim_on_moments():
    assert moments_section("Noise", {}, "OPD") == {}
    controls = dict.fromkeys(
        ("opd", "top_25", "off_policy", "rlvr", "sft"), measured(0.2, 0.3)
    )
    found = [claim.source for claim in control_claims(controls, {})]
    assert found == ["P2, Figure 9", "arXiv 2602.07729"]
    forms = dict.fromkeys(
        ("sampled_token", "reverse_kl", "top_reverse_bucket"), measured(0.2, 0.3)
    )
    (claim,) = form_claims(forms, {})
    assert claim.claim == "The sampled token does as well as top_reverse_bucket"


@pytest.mark.parametrize(
    ("top_gain", "holds"), [(0.31, True), (0.35, False), (0.215, None), (0.2, None)]
)
def test_the_sampled_token_may_lose_two_points_of_what_top_k_gains(top_gain, holds):
    """It gains 10 points here; of top-k's 11 it does as well, of 15 it does not."""
    arms = {
        "sampled_token": measured(0.2, 0.3),
        "reverse_kl": measured(0.2, 0.3),
        "top_reverse_bucket": measured(0.2, top_gain),
    }
    (claim,) = form_claims(arms, {})
    assert claim.holds is holds


def test_self_distillation_is_compared_with_the_arm_of_its_loss():
    arms = {
        "sampled_token": measured(0.2, 0.3),
        "reverse_kl": measured(0.2, 0.3),
        "jsd": measured(0.2, 0.3, norm=0.2),
        "opsd": measured(0.2, 0.3),
    }
    found = {claim.claim: claim for claim in form_claims(arms, {})}
    (moved,) = (
        c
        for name, c in found.items()
        if "with the same loss" in name.lower() and "moves" in name
    )
    assert moved.samples == pytest.approx((-0.1, -0.1))
    assert moved.holds is True


def test_the_mechanism_is_tested_where_it_could_fail():
    names = ("opd", "top_25", "off_policy", "mix_50", "mix_05", "rlvr", "sft")
    moments = {name: {"m": [{"alignment": 0.5, "tokens": 9.0}] * 2} for name in names}
    arms = dict.fromkeys(names, measured(0.2, 0.3))
    claims = [
        claim.claim.split()[5]
        for claim in control_claims(arms, moments)
        if "gradient directions" in claim.claim
    ]
    assert claims == ["top_25", "off_policy", "mix_50"]
    (table,) = moments_section("Moments", moments, "OPD")["Moments"]
    assert [column.title for column in table.columns][2] == "tokens"
    assert {row[2].mean for row in table.rows} == {9.0}


def test_noise_of_zero_is_undefined():
    moments = {
        "sampled_token": {"m": [{"noise_to_signal": x} for x in (100.0, 0.0, 10.0)]},
        "reverse_kl": {"m": [{"noise_to_signal": x} for x in (10.0, 10.0, None)]},
    }
    arms = dict.fromkeys(moments, measured(0.2, 0.3))
    (claim,) = form_claims(arms, moments)
    assert claim.samples == (1.0, None, None)
    assert claim.holds is None


def test_noise_at_equal_cost_is_noise_times_cost():
    moments = {
        "sampled_token": {"m": [{"noise_to_signal": x} for x in (100.0, 300.0)]},
        "reverse_kl": {"m": [{"noise_to_signal": x} for x in (10.0, None)]},
    }
    costs = {"sampled_token": 3e6, "reverse_kl": 4e6}
    first, second = cost_table(moments, costs, "reverse_kl").rows
    assert first[:3] == ["sampled_token", 3.0, 0.75]
    assert (first[3].mean, first[4].mean) == (200.0, 150.0)
    assert (second[2], second[3].mean, second[4].mean) == (1.0, 10.0, 10.0)


@pytest.mark.parametrize(("width", "rank"), [(32, 1), (128, 2), (256, 4), (4096, 64)])
def test_the_papers_mask_rank_follows_the_width(width, rank):
    names = [c.name for metric in study_metrics(width) for c in metric.columns]
    assert f"principal_coverage_r{rank}_0.30" in names
    assert study_metrics(width) is study_metrics(width)


def test_restarts_are_shown_from_the_step_they_start_at():
    arms = {"opd": measured(0.2, 0.3), "opd_free": measured(0.3, 0.4, first_step=40)}
    assert arms["opd"].steps().tolist() == [0, 3]
    assert arms["opd_free"].steps().tolist() == [40, 43]
    said = "the step they start at: opd_free from 40."
    for block in (arms_table(arms), accuracy_plot(arms, plots.assign_styles([*arms]))):
        assert block.caption.endswith(said)
    plain = {"opd": arms["opd"]}
    assert "start at:" not in arms_table(plain).caption


def test_sft_is_compared_with_opd_at_both_rates():
    """P2's SFT has ten times OPD's rate and another start: the control has neither."""
    paths = [{"subspace_similarity_16": 0.5, "stable_rank": 4.0}]
    arm = measured(0.2, 0.3)._replace(trajectories=[paths] * 2, progress=(1.0,))
    plain = dict.fromkeys(("opd", "sft", "sft_anchor"), arm)
    arms = {
        f"{n}_{how}": arm for n in plain for how in subspace_locking_study.CONSTRAINTS
    }
    found = subspace_locking_study.claims(plain, arms, 0.2)
    by_source = {}
    for claim in found:
        by_source.setdefault(claim.source, []).append(claim.claim)
    assert [len(by_source[s]) for s in ("P2, Figure 5", "P2, Figure 4")] == [1, 1]
    controlled = by_source["ours: same start and rate"]
    assert len(controlled) == 3
    assert all("SFT from OPD's start at its rate" in claim for claim in controlled)
    config = subspace_locking.get_config("tiny")
    assert config.arms.sft.learning_rate == 10 * config.arms.opd.learning_rate
    assert config.arms.sft_anchor.learning_rate == config.arms.opd.learning_rate
    assert config.arms.sft_anchor.start == config.arms.opd.start == "anchor"


def test_a_basis_of_no_use_keeps_the_accuracy_but_not_the_gain():
    """Of a gain of 2.5 points, 1.5 lost are within the 2 that may go."""

    def ends(*gains):
        runs = [measured(0.3, 0.3 + gain).runs[seed] for seed, gain in enumerate(gains)]
        return measured(0.3, 0.3)._replace(runs=runs)

    arms = {
        "opd_free": ends(0.025, 0.025),
        "opd_own": ends(0.01, 0.01),
        "opd_random": ends(0.025, 0.0),
        "sft_anchor_free": ends(0.02, 0.0),
        "sft_anchor_own": ends(0.01, 0.0),
        "sft_anchor_random": ends(0.01, 0.0),
    }
    locking = subspace_locking_study
    assert locking.shares(arms, "opd", "own") == pytest.approx((0.4, 0.4))
    assert locking.shares(arms, "sft_anchor", "own") == (pytest.approx(0.5), None)
    plain = {name: arms[f"{name}_free"] for name in ("opd",)}
    found = {c.claim: c for c in locking.claims(plain, arms, 0.2)}
    assert found["OPD keeps its accuracy inside its early directions"].holds is True
    (gain,) = (c for c in found.values() if c.source == locking.LATER)
    assert gain.samples == pytest.approx((0.01 - 0.8 * 0.025,) * 2)
    assert gain.holds is False
    assert "share recovered 40% ± 0%" in gain.statistic
    assert locking.recovery(arms | {"opd_own": arms["opd_free"]}, "opd", "OPD").holds
    # What had no gain to recover decides nothing; of SFT the contrary is claimed.
    undecided = locking.recovery(arms, "sft_anchor", "SFT")
    assert undecided.holds is None
    assert undecided.side == "below"


def test_a_tracker_is_sent_each_run_under_the_name_of_its_folder(tmp_path, monkeypatch):
    """Rows and resumes are those of `tracked`, which the ablation uses too."""
    calls = []
    package = types.SimpleNamespace(
        init=lambda **fields: calls.append(fields),
        log=lambda values, step: calls.append(values),
        finish=lambda: calls.append("finish"),
    )
    monkeypatch.setitem(sys.modules, "trackio", package)
    config = training_regimes.get_config("smoke")
    config.tracker = "trackio"
    workdir = tmp_path / "regimes"
    rows = [{"kind": "train", "update": 1, "loss": 0.5}]

    def run_loop(directory, state, advance, evaluate, schedule, on_step):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (directory / "metrics.jsonl").write_text(text)
        on_step(1, {})
        return state

    monkeypatch.setattr(study_module, "run_loop", run_loop)
    with begin(config, workdir, "training_regimes") as (study, origins):
        run = Run("opd", "distill", 1e-4, 0)
        study.train(run, study_module.Start(origins["anchor"]))
    first, logged, last = calls
    assert first["project"] == "regimes"
    assert first["name"].startswith("opd-seed_0-")
    assert first["config"]["tracker"] == "trackio"
    assert logged == {"train/loss": 0.5}
    assert last == "finish"


def test_a_basis_and_rounding_exclude_each_other(tmp_path):
    config = training_regimes.get_config("smoke")
    with begin(config, tmp_path, "training_regimes") as (study, origins):
        anchor = origins["anchor"]
        basis = random_basis(jax.random.key(0), anchor, 2, study.roles)
        run = Run("opd", "distill", 1e-4, 0, stored="stochastic")
        with pytest.raises(ValueError, match="a basis and stochastic rounding exclude"):
            study.train(run, study_module.Start(anchor, basis=basis))


@pytest.mark.parametrize("name", STUDIES)
def test_a_tracker_that_is_not_there_and_a_mesh_that_does_not_fit_are_refused(
    name, tmp_path, monkeypatch
):
    monkeypatch.setitem(sys.modules, "trackio", None)
    study = redo.load_experiment(name)
    for field, value, message in (
        ("tracker", "trackio", "'trackio' is not installed"),
        ("mesh", "data=2", "mesh 'data=2' has 2 places for 8 devices"),
    ):
        config = STUDIES[name].get_config("smoke")
        config[field] = value
        with pytest.raises(ValueError, match=message):
            study.run(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()
