"""Studies on a mesh of 8 devices, beside the same on one."""

import importlib
import json

import numpy as np
import pytest

from experiments.common import workdir as workdirs
from experiments.common.world import TINY_WORLD
from experiments.reproduction.plan import select
from geomjax.checkpoints.safetensors import SafetensorsSource

MESH = "data=2,fsdp=2,tensor=2"


def tensors(folder):
    source = SafetensorsSource(folder)
    return {name: source.read(name).astype(np.float32) for name in source.keys()}


def run(name, workdir, arms, mesh, **fields):
    """The smoke run of a study with some of the study's arms and one seed."""
    (entry,) = select([name])
    config, whole = entry.config(smoke=True), entry.config(smoke=False)
    config.seeds, config.mesh = (0,), mesh
    config.update(fields)
    for arm in set(config.arms) - set(arms):
        del config.arms[arm]
    for arm in set(arms) - set(config.arms):
        config.arms[arm] = whole.arms[arm]
    module = importlib.import_module(f"experiments.{entry.module}")
    with workdirs.locked(workdir):
        record = module.run(workdirs.claim(workdir, config, resume=False), workdir)
    assert json.loads((workdir / "results.json").read_text()) == json.loads(
        json.dumps(record)
    )
    return record


def assert_same_runs(workdir, plain, arms):
    """Parameters to a hundredth of how far they moved, and the curves of the losses.

    On another layout sums have another order, and Adam divides by what may be small.
    """
    anchor = tensors(TINY_WORLD / "anchor")
    for arm in arms:
        folder = f"arms/{arm}/seed_0"
        expected, found = (tensors(w / folder / "final") for w in (plain, workdir))
        moved = {n: np.linalg.norm(w - anchor[n]) for n, w in expected.items()}
        assert sum(moved.values()) > 0, arm
        for name, weight in expected.items():
            differs = np.linalg.norm(found[name] - weight)
            assert differs <= 1e-2 * moved[name], (arm, name, differs, moved[name])
        for theirs, ours in zip(
            *(rows(w / folder) for w in (plain, workdir)), strict=True
        ):
            assert ours.keys() == theirs.keys()
            for key in ("loss", "reward", "test_accuracy", "completion_tokens"):
                if key in theirs:
                    assert ours[key] == pytest.approx(theirs[key], rel=1e-3, abs=1e-4)


def rows(folder):
    text = (folder / "metrics.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def test_a_study_with_probes_on_a_mesh_is_that_of_one_device(smoke, tmp_path):
    workdir = tmp_path / "run"
    record = run("dynamics", workdir, ["opd"], MESH)
    assert set(record["compilations"].values()) == {1}
    plain, _ = smoke.run("dynamics")
    assert_same_runs(workdir, plain, ["opd"])
    for theirs, ours in zip(
        *(rows(w / "arms/opd/seed_0") for w in (plain, workdir)), strict=True
    ):
        for key, value in theirs.items():
            if key.startswith("update/"):
                assert ours[key] == pytest.approx(value, rel=0.05), key


STUDIES = {
    # Of one program, on answers of the data set and on completions of the teacher.
    "training_regimes": (["sft_anchor", "offline"], [], {}),
    "loss_forms": (
        ["sampled_token", "reverse_kl", "top_reverse_bucket", "opsd"],
        [],
        {},
    ),
    "subnetwork": (
        ["opd", "rlvr"],
        ["own_0.175", "random_0.175"],
        {"masks": ("own", "random"), "curve_masks": ()},
    ),
}
"""Arms that are trained, further runs that are compared, and further settings."""


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("name", STUDIES)
def test_a_study_on_a_mesh_ends_where_one_device_does(name, tmp_path):
    arms, further, fields = STUDIES[name]
    one, mesh = tmp_path / "one", tmp_path / "mesh"
    expected = run(name, one, arms, "", **fields)
    record = run(name, mesh, arms, MESH, **fields)
    assert_same_runs(mesh, one, arms + further)
    assert set(record["compilations"].values()) == {1}
    # Gradients of single tokens are taken on one device, mesh or not.
    for arm, matrices in record.get("moments", {}).items():
        for matrix, seeds in matrices.items():
            assert seeds[0] == expected["moments"][arm][matrix][0], (arm, matrix)
