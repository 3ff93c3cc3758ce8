"""The processes of the lot: at once, on cores of their own, logged, timed, ended."""

import json
import os
import subprocess

import pytest

from experiments.reproduction import process
from experiments.reproduction.process import Command, run_processes
from geomjax.train.errors import Preempted


def python(name, code, tmp_path):
    return Command(name, ["-c", code], tmp_path / f"{name}.txt")


def ends(commands, on_line=lambda name, line: None, jobs=1):
    ended = {}
    run_processes(commands, on_line, ended.__setitem__, pytest.fail, jobs=jobs)
    return ended


def test_a_process_is_logged_relayed_and_timed(tmp_path):
    code = (
        "import sys, time\n"
        "end = time.process_time() + 0.3\n"
        "while time.process_time() < end: pass\n"
        r"sys.stderr.write('\rrun 1\rrun 2'); print('\nlast'); sys.exit(3)"
    )
    lines = []
    command = python("it", code, tmp_path)
    ended = ends([command], lambda *line: lines.append(line))["it"]
    assert ended.status == 3
    assert ("it", ended.message) == lines[-1] == ("it", "last")
    assert "run 2" in command.log.read_text()
    assert ended.cpu_s >= 0.3
    assert ended.wall_s > 0


def test_times_are_of_one_process_alone(tmp_path):
    busy = "import time\nwhile time.process_time() < 1: pass"
    ended = ends([python("busy", busy, tmp_path), python("idle", "", tmp_path)], jobs=2)
    assert ended["busy"].cpu_s >= 1 > ended["idle"].cpu_s


def test_as_many_run_at_once_as_there_are_jobs(tmp_path):
    """Two that wait for each other end; the third begins when one of them has."""
    wait = (
        "import pathlib, sys, time\n"
        "here, there = map(pathlib.Path, ({!r}, {!r}))\n"
        "here.touch()\n"
        "while not there.exists(): time.sleep(0.01)\n"
        "sys.exit(pathlib.Path({!r}).exists())"
    )
    first, second, third = (str(tmp_path / name) for name in "abc")
    commands = [
        python("a", wait.format(first, second, third), tmp_path),
        python("b", wait.format(second, first, third), tmp_path),
        python("c", f"open({third!r}, 'w')", tmp_path),
    ]
    ended = ends(commands, jobs=2)
    assert [ended[name].status for name in "abc"] == [0, 0, 0]


@pytest.mark.skipif(
    not hasattr(os, "sched_getaffinity") or len(os.sched_getaffinity(0)) < 2,
    reason="one core, or a system that does not say which",
)
def test_jobs_have_cores_of_their_own(tmp_path):
    code = "import os; print(sorted(os.sched_getaffinity(0)))"
    commands = [python(name, code, tmp_path) for name in "ab"]
    first, second = (
        set(json.loads(ended.message)) for ended in ends(commands, jobs=2).values()
    )
    assert not first & second
    assert first | second == os.sched_getaffinity(0)
    (alone,) = ends(commands[:1]).values()
    assert set(json.loads(alone.message)) == os.sched_getaffinity(0)


def test_processes_end_with_the_one_that_is_told_to_end(tmp_path, monkeypatch):
    """A study saves when it is told to end, and has its own status then."""
    begun = []

    class Watched(subprocess.Popen):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            begun.append(self)

    monkeypatch.setattr(process.subprocess, "Popen", Watched)
    code = (
        "import os, signal, sys, time\n"
        "def stop(*_): os.write(1, b'saved'); sys.exit(75)\n"
        "signal.signal(signal.SIGTERM, stop); print('ready', flush=True)\n"
        "time.sleep(60)"
    )
    ready, stopped = set(), {}

    def on_line(name, line):
        ready.add(name)
        if ready == {"a", "b"}:
            raise Preempted("told to end")

    commands = [python(name, code, tmp_path) for name in "abc"]
    with pytest.raises(Preempted):
        run_processes(commands, on_line, pytest.fail, stopped.__setitem__, jobs=2)
    assert [child.returncode for child in begun] == [75, 75]
    assert {name: ended.status for name, ended in stopped.items()} == {"a": 75, "b": 75}
    assert commands[1].log.read_text().endswith("saved")
