"""The ablation on two processes of four devices, beside one of eight."""

import json

import host_processes
import numpy as np
import pytest
from ablation_process import CONFIG, MODULE

from geomjax.checkpoints import SafetensorsSource

MESH = "data=2,fsdp=2,tensor=2"
ADAMW = "arms/adamw/lr_0.0001/seed_0"


def _command(folder, workdir, *arguments):
    config = folder / "config.py"
    if not config.exists():
        config.write_text(CONFIG)
    return [
        "-m",
        MODULE,
        f"--config={config}",
        f"--config.mesh={MESH}",
        f"--workdir={workdir}",
        *arguments,
    ]


def _rows(workdir):
    text = (workdir / "metrics.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def _masters(workdir, arm):
    source = SafetensorsSource(workdir / "arms" / arm / "masters")
    return {name: source.read(name) for name in source.keys()}


def _assert_same_results(one, two):
    """Sums over processes are in another order than those over devices."""
    for ours, theirs in zip(_rows(one), _rows(two), strict=True):
        assert ours.keys() == theirs.keys()
        for name, value in ours.items():
            if isinstance(value, float):
                assert theirs[name] == pytest.approx(value, rel=1e-4, abs=1e-6), name
            else:
                assert theirs[name] == value, name
    for arm in ("adamw", "adamw_opd_mask"):
        found = _masters(two, arm)
        for name, expected in _masters(one, arm).items():
            differs = np.linalg.norm(found[name] - expected)
            assert differs <= 1e-5 * np.linalg.norm(expected), (arm, name)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_processes_run_the_ablation_of_one(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    host_processes.run(_command(tmp_path, one), 1, devices=8)
    first, second = host_processes.run(_command(tmp_path, two), 2)
    assert "report: " in first.output
    assert "report: " not in second.output  # Process 0 speaks for both.
    assert "step/s" not in second.output
    _assert_same_results(one, two)
    files = [
        sorted(path.relative_to(run).as_posix() for path in run.rglob("*"))
        for run in (one, two)
    ]
    events = [[name for name in names if "tensorboard/" in name] for names in files]
    assert len(events[0]) == len(events[1])  # Their names hold times.
    kept = [set(names) - set(e) for names, e in zip(files, events, strict=True)]
    assert kept[0] == kept[1]
