"""Constrained runs at their smallest, from start to report."""

import shutil

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from configs.subspace_locking import get_config
from experiments import subspace_locking
from experiments.common.outcome import read_outcome
from experiments.studies import study as study_module
from experiments.studies.begin import begin
from geomjax.models import hf
from geomjax.optim import load_basis

pytestmark = pytest.mark.slow
REGIMES = ("opd", "rlvr", "sft_anchor")
CONSTRAINED = [f"{name}_{how}" for name in REGIMES for how in ("own", "random")]


def settings():
    """The smoke run with RLVR and SFT, which it leaves out."""
    config, whole = get_config("smoke"), get_config("tiny")
    for name in ("rlvr", "sft_anchor"):
        config.arms[name] = whole.arms[name]
    return config


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("locking") / "run"
    return workdir, subspace_locking.run(settings(), workdir)


@pytest.fixture(scope="module")
def study(finished):
    with begin(settings(), finished[0], subspace_locking.NAME) as begun:
        yield begun.study


def weights(study, folder):
    tensors = load_file(folder / "model.safetensors")
    return hf.from_hf(tensors, study.world.student.model.config)


@pytest.mark.parametrize("arm", CONSTRAINED)
def test_a_constrained_run_never_leaves_its_subspace(finished, study, arm):
    """At its snapshots and its end, to 1e-6 of the weights, in float64."""
    workdir, record = finished
    assert max(record["outside_subspace"][arm]) < 1e-6
    params = study.world.student.params
    for seed in settings().seeds:
        folder = workdir / "arms" / arm / f"seed_{seed}"
        plain = workdir / "arms" / arm.rsplit("_", 1)[0] / f"seed_{seed}"
        start = weights(study, plain / "snapshots" / "step_000002")
        basis = load_basis(folder / "basis", params, study.roles)
        for name in ("step_000004", "step_000006"):
            after = weights(study, folder / "snapshots" / name)

            def leak(v, a, b):
                if v is None:
                    return None
                v, a, b = (np.asarray(x, np.float64) for x in (v, a, b))
                d = b - a
                rest = d - d @ v @ np.swapaxes(v, -1, -2)
                axes = (-2, -1)
                assert v.shape[-1] == 16
                assert (np.linalg.norm(d, axis=axes) > 0).all()
                ratio = np.linalg.norm(rest, axis=axes) / np.linalg.norm(a, axis=axes)
                return ratio.max()

            leaks = jax.tree.map(leak, basis, start, after, is_leaf=lambda v: v is None)
            assert 0 < max(jax.tree.leaves(leaks)) < 1e-6


def test_a_free_run_would_leave_it(finished, study):
    """The check above can fail: the free restart is far outside."""
    workdir, _ = finished
    start = weights(study, workdir / "arms/opd/seed_0/snapshots/step_000002")
    basis = load_basis(
        workdir / "arms/opd_own/seed_0/basis", study.world.student.params, study.roles
    )
    folder = workdir / "arms" / "opd_free" / "seed_0"
    end = read_outcome(folder, settings().arms.opd.learning_rate, 0)
    assert end is not None
    assert subspace_locking.largest_outside(study, start, end, basis) > 1e-5


def test_nothing_is_compiled_twice(finished):
    counts = finished[1]["compilations"]
    assert set(counts.values()) == {1}
    kinds = ("distill", "reward", "imitate")
    assert {f"learn {kind}, constrained" for kind in kinds} <= set(counts)


def test_the_record_and_the_report(finished):
    workdir, record = finished
    assert set(record["arms"]) == {
        *REGIMES,
        *(f"{name}_{how}" for name in REGIMES for how in ("free", "own", "random")),
    }
    assert record["basis_step"] == 2
    assert record["arms"]["opd"]["first_step"] == 0
    assert record["arms"]["opd_own"]["first_step"] == 2
    # Three of each regime, and two that compare SFT's trajectory with OPD's.
    assert len(record["claims"]) == 11
    later = [c for c in record["claims"] if c["source"] == subspace_locking.LATER]
    assert [len(c["samples"]) for c in later] == [1] * len(REGIMES)
    assert record["arms"]["opd"]["trajectories"][0][0][
        "subspace_similarity_16_chance"
    ] == pytest.approx(np.mean([16 / n for n in (128, 128, 128, 128)]))
    text = (workdir / "report.md").read_text()
    assert "ours; P2 has no such run" in text
    assert "Training inside 16 directions" in text
    assert "recovered, own" in text


def test_results_of_finished_runs_are_taken_again_without_training(
    finished, tmp_path, monkeypatch
):
    """As the same command does where results and report were removed."""
    workdir = tmp_path / "run"
    shutil.copytree(finished[0], workdir)
    for name in ("results.json", "report.md", "report.html"):
        (workdir / name).unlink()
    monkeypatch.setattr(study_module, "run_loop", lambda *_: pytest.fail("trains"))
    again = subspace_locking.run(settings(), workdir)
    for part in ("claims", "outside_subspace", "train_s"):
        assert again[part] == finished[1][part]
    assert (workdir / "report.html").exists()


def test_ranks_above_a_matrix_are_refused(finished, tmp_path):
    config = settings()
    config.rank = 65  # k_proj and v_proj are [64, 128].
    with pytest.raises(ValueError, match=r"k_proj.weight: a matrix \[64, 128\] has"):
        subspace_locking.run(config, copied(finished[0], tmp_path))


def copied(workdir, tmp_path):
    """The plain runs, so that nothing is trained before the basis is made."""
    target = tmp_path / "run"
    for name in REGIMES:
        shutil.copytree(workdir / "arms" / name, target / "arms" / name)
    return target


def test_a_basis_step_that_is_no_snapshot_is_refused(tmp_path):
    config = settings()
    config.basis_share = 0.5
    with pytest.raises(ValueError, match="must be one of the snapshots before the end"):
        subspace_locking.run(config, tmp_path / "run")
