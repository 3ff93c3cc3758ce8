"""Wall time and memory of a process, sampled from outside."""

import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

_SAMPLE_S = 0.02


class Cost(NamedTuple):
    """What a process took.

    Attributes:
        seconds: wall time, its start included.
        resident: most memory it held, in bytes, pages of mapped files included; 0 where
            the system keeps no account of it.
        anonymous: most of it without those.
    """

    seconds: float
    resident: int
    anonymous: int

    def describe(self) -> str:
        """The numbers for a reader."""
        return (
            f"{self.seconds:.1f} s, peak {self.resident / 2**30:.2f} GiB "
            f"({self.anonymous / 2**30:.2f} GiB anonymous)"
        )


def watch(command: Sequence[str], *, until: Path | None) -> tuple[Cost, Cost]:
    """Runs a command to its end.

    Args:
        command: the program and its arguments.
        until: a file that the process writes on its way.

    Returns:
        What the whole process took, and what it took until the file was there (the
        whole, where it was not).

    Raises:
        ValueError: it failed.
    """
    start = time.perf_counter()
    resident = anonymous = 0
    halfway: Cost | None = None
    # A file: nobody would empty a pipe while the process is watched.
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=errors)
        try:
            while process.poll() is None:
                found = memory(process.pid)
                resident, anonymous = max(resident, found[0]), max(anonymous, found[1])
                if until is not None and halfway is None and until.exists():
                    halfway = Cost(time.perf_counter() - start, resident, anonymous)
                time.sleep(_SAMPLE_S)
        finally:
            process.kill()
        seconds = time.perf_counter() - start
        errors.seek(0)
        message = errors.read().decode(errors="replace")
    if process.returncode:
        raise ValueError(
            f"status {process.returncode} from {' '.join(command)}\n{message[-2000:]}"
        )
    whole = Cost(seconds, resident, anonymous)
    return whole, halfway or whole


def memory(pid: int) -> tuple[int, int]:
    """Resident peak and anonymous memory of a process, in bytes; 0 where unknown."""
    try:
        text = Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return 0, 0
    fields = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
    return _bytes(fields, "VmHWM"), _bytes(fields, "RssAnon")


def _bytes(fields: dict[str, str], name: str) -> int:
    return int(fields[name].split()[0]) * 1024 if name in fields else 0
