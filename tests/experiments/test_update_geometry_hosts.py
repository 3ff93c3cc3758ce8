"""`update_geometry` on two processes of four devices: the tables of one process."""

import json
import shutil
import time

import host_processes
import numpy as np
import pytest
from safetensors.numpy import save_file

LAYERS, WIDTH = 4, 8
TABLES = ("tensors.csv", "summary.json", "matching.json", "parts.csv", "curves.json")


def _pair(folder, layers=LAYERS, width=WIDTH):
    """Layers of one shape, wide ones, and a norm."""
    rng = np.random.default_rng(0)
    shapes = {"model.norm.weight": (width,)}
    for i in range(layers):
        shapes[f"model.layers.{i}.self_attn.q_proj.weight"] = (width, width)
        shapes[f"model.layers.{i}.mlp.down_proj.weight"] = (width, 2 * width)
    source = {n: rng.standard_normal(s).astype(np.float32) for n, s in shapes.items()}
    tuned = {
        n: w + 1e-2 * rng.standard_normal(w.shape).astype(np.float32)
        for n, w in source.items()
    }
    for name, tensors in (("source", source), ("tuned", tuned)):
        (folder / name).mkdir()
        save_file(tensors, folder / name / "model.safetensors")


def _command(folder, workdir):
    return [
        "-m",
        "experiments.update_geometry",
        f"--source={folder / 'source'}",
        f"--tuned={folder / 'tuned'}",
        f"--workdir={workdir}",
        "--null_seeds=0",
        "--memory_budget=0.0001",
        "--hill_rank=3",
        "--angle_rank=3",
    ]


def _tables(workdir):
    return {
        name: (workdir / name).read_bytes()
        for name in TABLES
        if (workdir / name).exists()
    }


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_processes_write_the_tables_of_one_and_resume_each_other(tmp_path):
    _pair(tmp_path)
    one, two = tmp_path / "one", tmp_path / "two"
    host_processes.run(_command(tmp_path, one), 1)
    expected = _tables(one)
    assert {"tensors.csv", "summary.json", "curves.json"} <= expected.keys()
    _, second = host_processes.run(_command(tmp_path, two), 2)
    assert _tables(two) == expected
    assert "relative norm" not in second.output  # Process 0 speaks for both.
    assert not list(two.glob("journal.[0-9]*"))
    lines = (two / "journal.jsonl").read_text().splitlines()
    names = [json.loads(line)["row"]["name"] for line in lines[1:]]
    assert sorted(names) == sorted(set(names))
    # As if killed: two processes' journals, one of them cut off; then one goes on.
    for name in [*TABLES, "run.json"]:
        (two / name).unlink(missing_ok=True)
    half = len(lines) // 2
    (two / "journal.jsonl").write_text("\n".join(lines[:half]) + "\n")
    rest = [lines[0], *lines[half:-1]]
    (two / "journal.1.jsonl").write_text("\n".join(rest) + "\n" + lines[-1][:20])
    resumed = tmp_path / "resumed"
    shutil.copytree(two, resumed)
    host_processes.run(_command(tmp_path, two), 1)
    host_processes.run(_command(tmp_path, resumed), 2)
    assert _tables(two) == _tables(resumed) == expected


@pytest.mark.slow
def test_two_processes_stop_together_where_one_is_told_to(tmp_path):
    layers = 32
    _pair(tmp_path, layers, width=640)
    tensors = 2 * layers + 1
    workdir = tmp_path / "run"
    journals = [workdir / "journal.jsonl", workdir / "journal.1.jsonl"]
    processes = host_processes.start(_command(tmp_path, workdir), 2)
    while not all(journal.exists() for journal in journals) or any(
        journal.read_bytes().count(b"\n") < 2 for journal in journals
    ):
        assert all(process.poll() is None for process in processes)
        time.sleep(0.01)
    host_processes.stop_together(processes)
    kept = [len(journal.read_bytes().splitlines()) - 1 for journal in journals]
    assert all(0 < rows < tensors // 2 for rows in kept)
    assert not (workdir / "tensors.csv").exists()
    before = journals[0].read_bytes() + journals[1].read_bytes().partition(b"\n")[2]
    host_processes.run(_command(tmp_path, workdir), 1)
    after = journals[0].read_bytes()
    assert after.startswith(before)  # What was measured is not measured again.
    assert after.count(b"\n") == 1 + tensors
    assert (workdir / "tensors.csv").read_bytes().count(b"\n") == 1 + tensors


@pytest.mark.slow
def test_a_process_that_dies_ends_the_others_within_a_minute(tmp_path):
    _pair(tmp_path)
    workdir = tmp_path / "run"
    processes = host_processes.start(_command(tmp_path, workdir), 2)
    while not (workdir / "journal.1.jsonl").exists():
        assert all(process.poll() is None for process in processes)
        time.sleep(0.01)
    processes[1].kill()
    killed = time.monotonic()
    ended = host_processes.end(processes, timeout_s=120)
    assert time.monotonic() - killed < 60
    assert ended[0].status != 0
    assert "another task died" in ended[0].output
    # What was measured is kept, and a single process ends it.
    host_processes.run(_command(tmp_path, workdir), 1)
    assert (workdir / "tensors.csv").exists()
