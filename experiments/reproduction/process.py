"""Studies as processes of their own, output in logs and progress relayed."""

import os
import re
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, NamedTuple

_LINE_END = re.compile(rb"[\r\n]")
_TAIL_BYTES = 1 << 12


class Command(NamedTuple):
    """What to run.

    Attributes:
      name: What it is called.
      arguments: After the interpreter.
      log: What it writes is appended here.
    """

    name: str
    arguments: list[str]
    log: Path


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


def run_processes(
    commands: Iterable[Command],
    on_line: Callable[[str, str], None],
    on_end: Callable[[str, Ended], None],
    on_stop: Callable[[str, Ended], None],
    *,
    jobs: int = 1,
) -> None:
    """Runs this Python with other arguments, some at once, until all have ended.

    A run of its own shares no memory, no compiled programs and no failure with another.
    Of several at once each has cores of its own, where the system can give them: on the
    same cores they would hinder each other. However this function is left, all that it
    began has ended: told to, a study saves.

    Args:
      commands: What to run, in this order.
      on_line: Called with a name and each line, those of progress bars among them.
      on_end: Called with a name and how it ended; may raise, to end the others too.
      on_stop: Called with those that were told to end.
      jobs: How many run at once.
    """
    waiting, shares = iter(commands), _shares(jobs)
    with selectors.DefaultSelector() as selector:
        try:
            for share in shares:
                _begin_next(waiting, share, selector)
            while selector.get_map():
                for key, _ in selector.select():
                    process = key.data
                    if line := process.read():
                        on_line(process.command.name, line)
                    elif line is None:
                        selector.unregister(key.fileobj)
                        on_end(process.command.name, process.wait())
                        _begin_next(waiting, process.cores, selector)
        finally:
            left = [key.data for key in selector.get_map().values()]
            for process in left:
                process.popen.send_signal(signal.SIGTERM)
            for process in left:
                while process.read() is not None:
                    pass
                on_stop(process.command.name, process.wait())


def _shares(jobs: int) -> list[set[int]]:
    """The cores of each job; none named where there are too few, or no say in it."""
    if not hasattr(os, "sched_getaffinity"):
        return [set() for _ in range(jobs)]
    cores = sorted(os.sched_getaffinity(0))
    return [set(cores[i::jobs] if jobs <= len(cores) else ()) for i in range(jobs)]


class _Process:
    """A process that has begun."""

    def __init__(self, command: Command, cores: set[int]):
        self.command, self.cores = command, cores
        self._started, self._tail = time.monotonic(), b""
        self._log = command.log.open("ab")
        self.popen = subprocess.Popen(
            [sys.executable, *command.arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        if cores:
            os.sched_setaffinity(self.popen.pid, cores)

    @property
    def output(self) -> IO[bytes]:
        """What it writes, errors too."""
        assert self.popen.stdout is not None
        return self.popen.stdout

    def read(self) -> str | None:
        """Logs what it has written; its last line, None once it writes no more."""
        chunk = os.read(self.output.fileno(), 1 << 16)
        if not chunk:
            return None
        self._log.write(chunk)
        self._log.flush()
        self._tail = (self._tail + chunk)[-_TAIL_BYTES:]
        return _last_line(self._tail)

    def wait(self) -> Ended:
        """Waits for the end of one that writes no more, and takes its times."""
        self.output.close()
        self._log.close()
        _, status, used = os.wait4(self.popen.pid, 0)
        self.popen.returncode = os.waitstatus_to_exitcode(status)
        return Ended(
            self.popen.returncode,
            _last_line(self._tail),
            time.monotonic() - self._started,
            used.ru_utime + used.ru_stime,
        )


def _begin_next(
    waiting: Iterator[Command], cores: set[int], selector: selectors.BaseSelector
) -> None:
    command = next(waiting, None)
    if command is not None:
        process = _Process(command, cores)
        selector.register(process.output, selectors.EVENT_READ, process)


def _last_line(tail: bytes) -> str:
    lines = [line.strip() for line in _LINE_END.split(tail)]
    kept = [line for line in lines if line]
    return kept[-1].decode(errors="replace") if kept else ""
