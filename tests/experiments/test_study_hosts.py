"""Studies on two processes of four devices, beside one of eight."""

import json

import host_processes
import numpy as np
import pytest

from geomjax.checkpoints import SafetensorsSource

CONFIG = """
from configs import subspace_locking

def get_config():
    config = subspace_locking.get_config("smoke")
    config.num_steps, config.evaluate_every, config.save_every = 4, 2, 2
    config.snapshot_shares, config.basis_share = (0.5,), 0.5
    config.samples_per_prompt = 2
    config.evaluation_batch = 32
    config.validation_fraction = config.test_fraction = 0.004
    config.reward.name = "geomjax.rewards.exact:exact"  # Of texts, in process 0.
    return config
"""


def _command(folder, workdir):
    config = folder / "config.py"
    if not config.exists():
        config.write_text(CONFIG)
    return [
        "-m",
        "experiments.subspace_locking",
        f"--config={config}",
        "--config.mesh=data=2,fsdp=2,tensor=2",
        f"--workdir={workdir}",
    ]


def _tensors(folder):
    source = SafetensorsSource(folder)
    return {name: source.read(name) for name in source.keys()}


def _runs(workdir):
    return {
        path.parent.parent.name: [
            json.loads(line) for line in path.read_text().splitlines()
        ]
        for path in sorted(workdir.glob("arms/*/seed_0/metrics.jsonl"))
    }


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_two_processes_run_the_study_of_one(tmp_path):
    """Restarts from a snapshot, inside a basis that one process makes for both."""
    one, two = tmp_path / "one", tmp_path / "two"
    host_processes.run(_command(tmp_path, one), 1, devices=8)
    first, second = host_processes.run(_command(tmp_path, two), 2)
    assert "report: " in first.output
    assert "report: " not in second.output  # Process 0 speaks for both.
    assert "run/s" not in second.output

    ours, theirs = _runs(one), _runs(two)
    assert set(ours) == set(theirs) == {"opd", "opd_free", "opd_own", "opd_random"}
    for arm, rows in ours.items():
        for a, b in zip(rows, theirs[arm], strict=True):
            assert a.keys() == b.keys()
            for name, value in a.items():
                # Sums over processes are in another order than those over devices.
                expected = value
                if isinstance(value, float):
                    expected = pytest.approx(value, rel=1e-4, abs=1e-6)
                assert b[name] == expected, (arm, name)
        final = f"arms/{arm}/seed_0/final"
        found = _tensors(two / final)
        for name, expected in _tensors(one / final).items():
            differs = np.linalg.norm(found[name] - expected)
            assert differs <= 1e-5 * np.linalg.norm(expected), (arm, name)
    files = [
        {
            path.relative_to(run).as_posix()
            for path in run.rglob("*")
            if "tensorboard/" not in path.as_posix()  # Their names hold times.
        }
        for run in (one, two)
    ]
    assert files[0] == files[1]

    # The run's folder alone, redone by two processes, gives the same bits. That two end
    # together and go on is tested of the ablation, whose loop it is.
    again = tmp_path / "again"
    redo = ["-m", "experiments.redo", f"--run={two}", f"--workdir={again}"]
    host_processes.run(redo, 2)
    assert _runs(again) == theirs
    for arm in theirs:
        final = f"arms/{arm}/seed_0/final/model.safetensors"
        assert (again / final).read_bytes() == (two / final).read_bytes()
