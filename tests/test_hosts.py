"""How processes find each other, and what they are told if they do not."""

import os
import socket
import subprocess
import sys
import textwrap
import threading

import pytest

from geomjax import hosts

PROGRAM = textwrap.dedent(
    """
    import os, signal, sys, time
    from geomjax import hosts

    def end(number, frame):
        raise hosts.Preempted("here")

    port, count, index, timeout, mode = sys.argv[1:]
    signal.signal(signal.SIGTERM, end)
    try:
        hosts.initialize(
            f"localhost:{port}", int(count), int(index), timeout_s=float(timeout)
        )
    except (ValueError, OSError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        hosts.leave(3)
    if mode == "agree":
        assert hosts.count() == 2 and hosts.is_main() == (index == "0")
        assert hosts.gather({"index": int(index)}) == [{"index": 0}, {"index": 1}]
        calls = []
        assert hosts.on_main(lambda: calls.append(1) or [1, None]) == [1, None]
        assert len(calls) == (index == "0")
        for error in (ValueError("bad"), FileNotFoundError(2, "gone", "a/b")):
            def fail():
                raise error
            try:
                hosts.on_main(fail)
            except type(error) as found:
                assert str(found) == str(error)
            else:
                raise AssertionError
        with hosts.alone():
            assert hosts.count() == 1 and hosts.gather(3) == [3]
        hosts.barrier()
        print("agreed")
    if mode == "told":
        hosts.independently(lambda: time.sleep(int(index)))
        # Process 1 has done its part when process 0 is told.
        def work():
            if index == "0":
                os.kill(os.getpid(), signal.SIGTERM)
                for _ in range(600):
                    time.sleep(0.1)
        start = time.monotonic()
        try:
            hosts.independently(work)
        except hosts.Preempted as stop:
            print(stop, time.monotonic() - start < 30)
        hosts.barrier()
    """
)


@pytest.fixture
def port():
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return found.getsockname()[1]


def _run(*arguments):
    """Each `arguments` as a process; their statuses and errors."""
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, *map(str, each)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"JAX_PLATFORMS": "cpu"},
        )
        for each in arguments
    ]
    try:
        ended = [process.communicate(timeout=120) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [
        (p.returncode, out, errors)
        for p, (out, errors) in zip(processes, ended, strict=True)
    ]


def test_processes_agree_and_fail_together(port):
    ended = _run((port, 2, 0, 100, "agree"), (port, 2, 1, 100, "agree"))
    assert [status for status, _, _ in ended] == [0, 0], ended
    assert [output for _, output, _ in ended] == ["agreed\n"] * 2


def test_processes_that_work_by_themselves_are_told_to_end_together(port):
    ended = _run((port, 2, 0, 100, "told"), (port, 2, 1, 100, "told"))
    assert [status for status, _, _ in ended] == [0, 0], ended
    said = "told to end; start the same again to go on True\n"
    assert [output for _, output, _ in ended] == [said] * 2


def test_unequal_counts_are_named_by_all(port):
    ended = _run((port, 2, 0, 100, ""), (port, 3, 1, 100, ""))
    for status, _, errors in ended:
        assert status == 3
        assert "different num_processes: [2, 3]" in errors


def test_a_coordinator_that_is_not_there_is_named(port):
    ((status, _, errors),) = _run((port, 2, 1, 1, ""))
    assert status == 3
    assert f"OSError: the coordinator localhost:{port} cannot be reached" in errors


def test_processes_that_do_not_come_are_missed(port):
    ((status, _, errors),) = _run((port, 2, 0, 2, ""))
    assert status == 3
    assert "TimeoutError: process 0 of 2 waited 2 s" in errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("host:1", 2, None), "give all three"),
        ((None, None, 0), "give all three"),
        (("host:1", 2, 2), "process_id 2 is not one of the 2 processes"),
        (("host", 2, 1), "expected host:port"),
    ],
)
def test_wrong_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        hosts.initialize(*arguments, timeout_s=1.0)


def test_one_process_is_alone_and_asks_nobody():
    hosts.initialize()
    assert (hosts.count(), hosts.index(), hosts.is_main()) == (1, 0, True)
    assert hosts.gather("x") == ["x"]
    assert hosts.on_main(lambda: "y") == "y"
    assert not hosts.preempted()
    hosts.barrier()
    done = []
    hosts.independently(lambda: done.append(1))
    assert done == [1]


def test_a_file_that_a_host_sees_late_is_awaited(monkeypatch, tmp_path):
    late = tmp_path / "late"
    monkeypatch.setattr(hosts, "count", lambda: 2)
    writer = threading.Timer(0.1, late.touch)
    writer.start()
    hosts.await_file(late)
    assert late.exists()
    writer.join()
    # One that never comes is left to whoever opens it.
    monkeypatch.setattr(hosts, "VISIBLE_S", 0.1)
    hosts.await_file(tmp_path / "never")


def test_slurm_is_found_in_the_environment(monkeypatch):
    job = {
        "SLURM_JOB_ID": "7",
        "SLURM_STEP_NODELIST": "node[3-4]",
        "SLURM_NTASKS": "2",
        "SLURM_PROCID": "1",
        "SLURM_LOCALID": "0",
    }
    for name, value in job.items():
        monkeypatch.setenv(name, value)
    asked = []
    monkeypatch.setattr(hosts, "_reach", lambda address, end: asked.append(address))
    monkeypatch.setattr(hosts, "_connect", lambda *given: asked.append(given[1:3]))
    monkeypatch.setattr(hosts, "_counts", lambda number: [number] * 2)
    hosts.initialize()
    assert asked[0].startswith("node3:")
    assert asked[1] == (2, 1)
    monkeypatch.setenv("SLURM_NTASKS", "1")  # A job of one process is no run of many.
    monkeypatch.setenv("SLURM_PROCID", "0")
    hosts.initialize()
    assert len(asked) == 2
