"""A study as a process of its own, its output in a log and its progress relayed."""

import os
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

_LINE_END = re.compile(rb"[\r\n]")
_TAIL_BYTES = 1 << 12


class Ended(NamedTuple):
    """How a process ended.

    Attributes:
      status: Its exit status; negative for a signal.
      message: The last line that it wrote.
      wall_s: Seconds that it took.
      cpu_s: Seconds of processor time, of all its threads and children.
    """

    status: int
    message: str
    wall_s: float
    cpu_s: float


def run_process(
    arguments: Sequence[str], log: Path, on_line: Callable[[str], None]
) -> Ended:
    """Runs this Python with other arguments until it ends.

    A run of its own shares no memory, no compiled programs and no failure with the
    next. However this function is left, the process has ended: told to, it saves.

    Args:
      arguments: After the interpreter.
      log: What it writes is appended here.
      on_line: Called with each line, those of progress bars among them.
    """
    started, spent = time.monotonic(), _children_s()
    process = subprocess.Popen(
        [sys.executable, *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    assert process.stdout is not None
    tail = b""
    try:
        with log.open("ab") as file:
            while chunk := os.read(process.stdout.fileno(), 1 << 16):
                file.write(chunk)
                file.flush()
                tail = (tail + chunk)[-_TAIL_BYTES:]
                if line := _last_line(tail):
                    on_line(line)
        status = process.wait()
    except BaseException:
        process.send_signal(signal.SIGTERM)
        process.wait()
        raise
    finally:
        process.stdout.close()
    return Ended(
        status, _last_line(tail), time.monotonic() - started, _children_s() - spent
    )


def _last_line(tail: bytes) -> str:
    lines = [line.strip() for line in _LINE_END.split(tail)]
    kept = [line for line in lines if line]
    return kept[-1].decode(errors="replace") if kept else ""


def _children_s() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime
