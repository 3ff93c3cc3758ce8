"""Several processes on this machine as one run, of 4 CPU devices each by default."""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import NamedTuple

import ablation_process

from experiments.common.cli import PREEMPTED_STATUS


class Ended(NamedTuple):
    """How one process ended."""

    status: int
    output: str


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return found.getsockname()[1]


def start(
    command: Sequence[str],
    count: int,
    *,
    devices: int = 4,
    said: Sequence[int] | None = None,
) -> list[subprocess.Popen]:
    """Starts `python COMMAND` as so many processes; one stands for itself.

    Each is told that they are `count`, or as many as `said` holds for it.
    """
    coordinator = f"localhost:{free_port()}"
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "PYTHONPATH": str(ablation_process.ROOT),
    }
    processes = []
    for i in range(count):
        own = [
            f"--coordinator={coordinator}",
            f"--num_processes={said[i] if said else count}",
            f"--process_id={i}",
        ]
        output = tempfile.TemporaryFile("w+")
        process = subprocess.Popen(
            [sys.executable, *command, *(own if count > 1 or said else [])],
            cwd=ablation_process.ROOT,
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        process.log = output
        processes.append(process)
    return processes


def end(processes: list[subprocess.Popen], timeout_s: float = 600) -> list[Ended]:
    """Waits for all of them, and kills what is left."""
    try:
        for process in processes:
            process.wait(timeout=timeout_s)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    ended = []
    for process in processes:
        with process.log as log:
            log.seek(0)
            ended.append(Ended(process.returncode, log.read()))
    return ended


def stop_together(processes: list[subprocess.Popen]) -> None:
    """Tells the second alone to end; all must, saved and in time.

    Slices and Slurm jobs are given 30 s.
    """
    processes[1].send_signal(signal.SIGTERM)
    told = time.monotonic()
    ended = end(processes, timeout_s=60)
    assert time.monotonic() - told < 25
    for process in ended:
        assert process.status == PREEMPTED_STATUS, process.output
        assert "preempted: told to end; start the same again" in process.output
        assert "Traceback" not in process.output


def run(command: Sequence[str], count: int, *, devices: int = 4) -> list[Ended]:
    """Runs them to their ends, which must be good."""
    ended = end(start(command, count, devices=devices))
    assert [process.status for process in ended] == [0] * count, ended
    return ended
