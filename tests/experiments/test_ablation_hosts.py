"""The ablation on two processes of four devices, beside one of eight."""

import json
import signal
import time

import host_processes
import numpy as np
import pytest
from ablation_process import CONFIG, MODULE

from geomjax.checkpoints import SafetensorsSource

MESH = "data=2,fsdp=2,tensor=2"


def _command(folder, workdir):
    config = folder / "config.py"
    if not config.exists():
        config.write_text(CONFIG)
    return [
        "-m",
        MODULE,
        f"--config={config}",
        f"--config.mesh={MESH}",
        f"--workdir={workdir}",
        "--config.num_steps=6",
        "--config.evaluate_every=6",
    ]


def _start_until(command, workdir, arm, rows):
    """Starts two processes, and returns when an arm has logged so many rows."""
    processes = host_processes.start(command, 2)
    found = 0
    while found < rows:
        assert all(p.poll() is None for p in processes), host_processes.end(processes)
        time.sleep(0.02)
        for path in workdir.glob(f"arms/{arm}/*/*/metrics.jsonl"):
            found = path.read_bytes().count(b"\n")
    return processes


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
@pytest.mark.timeout(3000)
def test_two_processes_run_the_ablation_of_one_whatever_befalls_them(tmp_path):
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

    # One is told to end: both save the same step and say so with their status.
    killed = tmp_path / "killed"
    command = _command(tmp_path, killed)
    processes = _start_until(command, killed, "adamw", 3)
    processes[1].send_signal(signal.SIGTERM)
    ended = host_processes.end(processes)
    assert [process.status for process in ended] == [75, 75], ended
    said = [process.output.splitlines()[-1] for process in ended]
    assert said[0] == said[1]
    assert "is saved at step" in said[0]
    # One dies in a step of the next arm: the other ends with an error.
    processes = _start_until(command, killed, "adamw_opd_mask", 3)
    processes[0].kill()
    moment = time.monotonic()
    _, other = host_processes.end(processes)
    assert time.monotonic() - moment < 60
    assert other.status not in (0, 75)
    # What was finished is read back, what was not goes on, and no bit differs.
    host_processes.run(command, 2)
    assert (killed / "metrics.jsonl").read_bytes() == (
        two / "metrics.jsonl"
    ).read_bytes()
    for arm in ("adamw", "adamw_opd_mask"):
        found = _masters(killed, arm)
        for name, expected in _masters(two, arm).items():
            np.testing.assert_array_equal(found[name], expected)
