"""`experiments.evaluate` on two processes: the generations and figures of one."""

import json
import shutil
import threading
import time

import host_processes
import pytest
from evaluate_runs import evaluated
from vl_folders import save_geometry3k, save_vl

from experiments.common.world import TINY_WORLD
from experiments.evaluation import generations
from experiments.evaluation.generations import (
    Generation,
    Task,
    collect,
    generate,
    missing_blocks,
)
from geomjax import hosts
from geomjax.evaluation.summary import Sample
from geomjax.rewards.contract import Judgement


def _command(
    workdir, *more, checkpoint=TINY_WORLD / "anchor", suite="tiny-world", limit=72
):
    return [
        "-m",
        "experiments.evaluate",
        f"--checkpoint={checkpoint}",
        f"--suite={suite}",
        f"--workdir={workdir}",
        "--temperature=1.0",
        "--samples=4",
        f"--limit={limit}",
        "--rows=8",
        "--max_new_tokens=6",
        "--reward_workers=1",
        "--resamples=100",
        *more,
    ]


def _figures(workdir):
    record = json.loads((workdir / "results.json").read_text())
    return record["suites"], record["config"]


def test_processes_that_read_different_inputs_refuse(monkeypatch, tmp_path):
    """As another process would see it that has another checkpoint, or suite."""
    other = {"tiny-world": "0" * 32}

    def gather(mine):
        return [mine, mine | other if other.keys() <= mine.keys() else mine]

    monkeypatch.setattr(hosts, "gather", gather)
    with pytest.raises(ValueError, match="different inputs: tiny-world; give each"):
        evaluated(tmp_path / "suite")
    other = {"checkpoint": {"config.json": "0"}}
    with pytest.raises(ValueError, match=r"different inputs: checkpoint\.config\.json"):
        evaluated(tmp_path / "checkpoint")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_processes_generate_the_bytes_of_one_and_resume_each_other(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    host_processes.run(_command(one), 1)
    written = "checkpoint/tiny-world.jsonl"
    expected = (one / written).read_bytes()
    lines = expected.splitlines(keepends=True)
    assert len(lines) == 72 * 4  # Blocks of 16 problems, the last of 8.
    first, second = host_processes.run(_command(two), 2)
    assert (two / written).read_bytes() == expected
    assert _figures(two) == _figures(one)
    assert "report: " in first.output
    assert "report: " not in second.output
    assert not list(two.glob("checkpoint/*.part*"))
    # As if killed: process 0 in its second block, process 1 after its second one.
    killed = tmp_path / "killed"
    shutil.copytree(two, killed)
    (killed / "results.json").unlink()
    (killed / written).write_bytes(b"".join(lines[:70]) + lines[70][:9])
    part = b"".join([*lines[64:128], *lines[192:256], *lines[256:260]])
    (killed / f"{written}.part1").write_bytes(part)
    host_processes.run(_command(killed), 1)
    assert (killed / written).read_bytes() == expected
    assert _figures(killed) == _figures(one)
    assert not list(killed.glob("checkpoint/*.part*"))


@pytest.mark.slow
def test_two_processes_with_a_mesh_each_evaluate_images_as_one_device(tmp_path):
    model = save_vl(tmp_path / "model", 0, kv_heads=2)
    # Blocks of 16 problems: two, one for each process.
    data = save_geometry3k(tmp_path / "test.parquet", 24)
    given = {"checkpoint": model, "suite": f"geo3k={data}", "limit": 0}
    one, two = tmp_path / "one", tmp_path / "two"
    host_processes.run(_command(one, **given), 1, devices=1)
    command = _command(two, "--mesh=fsdp=2,tensor=2", **given)
    host_processes.run(command, 2, devices=4)
    written = "checkpoint/geo3k.jsonl"
    assert (two / written).read_bytes() == (one / written).read_bytes()
    assert _figures(two)[0] == _figures(one)[0]


@pytest.mark.slow
def test_two_processes_stop_together_where_one_is_told_to(tmp_path):
    workdir = tmp_path / "run"
    # A block is one problem of 64 samples, and there are hundreds.
    command = _command(workdir, "--samples=64", limit=0)
    processes = host_processes.start(command, 2)
    parts = [workdir / f"checkpoint/tiny-world.jsonl{end}" for end in ("", ".part1")]
    while not all(part.exists() and part.stat().st_size for part in parts):
        assert all(process.poll() is None for process in processes)
        time.sleep(0.01)
    host_processes.stop_together(processes)
    assert not (workdir / "results.json").exists()
    problems = (workdir / "checkpoint/tiny-world.problems.jsonl").read_bytes()
    task = Task([None] * problems.count(b"\n"), [], 64, 1, 0)
    missing = missing_blocks(parts[0], task)
    assert {0, 1}.isdisjoint(missing)  # Each process's first.
    assert len(missing) > len(task.blocks) / 2


def test_blocks_that_are_seen_late_are_awaited_and_then_missed(monkeypatch, tmp_path):
    path, task = tmp_path / "suite.jsonl", Task([None] * 2, [], 1, 1, 0)
    judged = Sample(Judgement(1.0, "right", "judged", "4"), 1, True)
    first, second = (Generation(i, 0, "4", judged) for i in range(2))
    path.write_text(first.line())
    part = path.with_name(f"{path.name}.part1")
    writer = threading.Timer(0.1, part.write_text, [second.line()])
    writer.start()
    assert collect(path, task) == [first, second]
    writer.join()
    path.write_text(first.line())
    monkeypatch.setattr(hosts, "VISIBLE_S", 0.1)
    with pytest.raises(OSError, match="1 blocks of another process do not appear"):
        collect(path, task)


def test_processes_take_blocks_in_turn(monkeypatch, tmp_path):
    made = []
    monkeypatch.setattr(hosts, "count", lambda: 2)
    monkeypatch.setattr(hosts, "index", lambda: 1)

    def block(task, problems, *_):
        made.append(problems)
        return []

    monkeypatch.setattr(generations, "_block", block)
    task = Task([None] * 9, [], 1, 2, 0)
    run = (tmp_path / "suite.jsonl", task, list(task.blocks))
    generate(*run, 0, None, None, None, lambda block: None)
    assert made == [range(2, 4), range(6, 8)]
    # Where the turn begins with this process, it takes the first block.
    made.clear()
    generate(*run, 1, None, None, None, lambda block: None)
    assert made == [range(0, 2), range(4, 6), range(8, 9)]
