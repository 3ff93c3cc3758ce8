"""What a run reports: one JSON object a line, and TensorBoard events beside them."""

import contextlib
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.summary import scalar

from geomjax import hosts

FILE = "metrics.jsonl"
TIMING = "timing.jsonl"
EVENTS = "tensorboard"


def read_rows(directory: Path) -> list[dict[str, Any]]:
    """The rows of a run's metrics file; a last line that was cut off is left out."""
    return read_rows_from(directory, 0)[0]


def read_rows_from(directory: Path, offset: int) -> tuple[list[dict[str, Any]], int]:
    """The rows after `offset` bytes of a run's metrics file, and the next row's offset.

    A run that is resumed writes a new file, whose bytes are the same up to its end.
    """
    path = directory / FILE
    if not path.exists():
        return [], offset
    with path.open("rb") as file:
        file.seek(offset)
        *lines, cut_off = file.read().split(b"\n")
        return [json.loads(line) for line in lines], file.tell() - len(cut_off)


class MetricsLog:
    """Appends rows to `metrics.jsonl` and scalars to TensorBoard event files.

    Rows hold no times, so that the file of a run that was killed and resumed is the
    same, byte for byte, as that of one that was not. Times go to `timing.jsonl`, where
    steps that were repeated have a row for each time. Process 0 writes for all.
    """

    def __init__(self, directory: Path, *, resume_step: int | None):
        """Opens the log, dropping rows of steps after the one resumed from.

        Args:
          directory: The run's folder.
          resume_step: Training steps done in the restored state, or None at the start
            of a run, when nothing is kept.
        """
        self._updates = 0
        self._evaluated: set[int] = set()
        self._open = hosts.is_main()
        if not self._open:
            return
        directory.mkdir(parents=True, exist_ok=True)
        keep = -1 if resume_step is None else resume_step
        kept = [row for row in read_rows(directory) if row["step"] <= keep]
        path = directory / FILE
        temporary = directory / f".{FILE}.tmp"
        with temporary.open("w") as file:
            file.writelines(map(_line, kept))
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        self._file = path.open("a")
        self._timing = (directory / TIMING).open("a")
        self._updates = max((row.get("update", 0) for row in kept), default=0)
        self._evaluated |= {row["step"] for row in kept if row["kind"] == "eval"}
        purge_from = 0 if resume_step is None else self._updates + 1
        self._events = _open_events(directory / EVENTS, purge_from)

    def write(self, kind: str, step: int, values: Mapping[str, float | int]) -> None:
        """Adds a row, which other readers of the file then find.

        Args:
          kind: "train" or "eval".
          step: Training steps done.
          values: Scalars; `update`, where given, is the optimizer update's number. The
            last one given is the abscissa in TensorBoard.

        Raises:
          OSError: The disk is full.
        """
        if not self._open:
            return
        self._file.write(_line({"kind": kind, "step": step, **values}))
        self._file.flush()
        self._updates = int(values.get("update", self._updates))
        self._show(kind, {n: v for n, v in values.items() if n != "update"})
        if kind == "eval":
            self._events.flush()

    def write_timing(self, step: int, values: Mapping[str, float]) -> None:
        """Adds a row of times and speeds, of which no result depends on any."""
        if self._open:
            self._timing.write(_line({"step": step, **values}))
            self._show("timing", values)

    def evaluated(self, step: int) -> bool:
        """Whether the rows kept at the start had an evaluation of a step."""
        return step in self._evaluated

    def sync(self) -> None:
        """Returns when all rows are on disk."""
        if self._open:
            self._timing.flush()
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Syncs and closes the files."""
        if self._open:
            with self._file, self._timing, contextlib.closing(self._events):
                self.sync()

    def _show(self, kind: str, values: Mapping[str, float | int]) -> None:
        for name, value in values.items():
            event = Event(
                step=self._updates,
                summary=scalar(f"{kind}/{name}", value),
                wall_time=time.time(),
            )
            self._events.write_event(event)


def _open_events(directory: Path, purge_from: int) -> EventsWriter:
    """A new event file, before which TensorBoard forgets later abscissas.

    Its writer is used without tensorboardX's thread and queue, on which a run would
    wait forever once the disk is full.
    """
    directory.mkdir(exist_ok=True)
    count = len(list(directory.iterdir()))
    events = EventsWriter(str(directory / "events"), f".{count:04d}")
    start = SessionLog(status=SessionLog.START)
    events.write_event(Event(step=purge_from, session_log=start, wall_time=time.time()))
    return events


def _line(row: Mapping[str, Any]) -> str:
    return json.dumps(row) + "\n"
