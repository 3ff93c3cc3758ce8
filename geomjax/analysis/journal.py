"""The results of a run, durable record by record.

One line of JSON for each measured tensor, appended and flushed to disk before the next
stack is begun. A line that a crash cut short is dropped when the file is opened
again, so the file never holds half a result.
"""

import fcntl
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from geomjax import hosts

Record = dict[str, Any]


class Journal:
    """An append-only file of records, held by one process at a time.

    Args:
        path: the file, made if it is not there; its folder must exist.
        inputs: what the results depend on. It is the first line of a new journal, and
            must equal the first line of an old one.

    Raises:
        ValueError: the journal is of other inputs, is no journal, or is in use.
        OSError: the folder cannot be written to.
    """

    records: list[Record]

    def __init__(self, path: str | os.PathLike[str], inputs: Record):
        self.path = Path(path)
        # Without a buffer, so that nothing is written after an error was reported.
        self._file = open(self.path, "a+b", buffering=0)  # noqa: SIM115
        try:
            self._lock()
            self.records = self._recover(json.loads(json.dumps(inputs)))
        except BaseException:
            self._file.close()
            raise

    def append(self, records: Iterable[Record]) -> None:
        """Writes records; they are on disk when this returns."""
        lines = [json.dumps(r, allow_nan=False) + "\n" for r in records]
        data = memoryview("".join(lines).encode())
        whole = os.fstat(self._file.fileno()).st_size
        try:
            while data:
                data = data[os.write(self._file.fileno(), data) :]
            os.fsync(self._file.fileno())
        except OSError as error:
            os.ftruncate(self._file.fileno(), whole)
            raise OSError(
                error.errno,
                f"{os.strerror(error.errno or 0)}; what was measured before is kept, "
                "and the same command goes on from there",
                str(self.path),
            ) from error

    def close(self) -> None:
        """Gives the file back."""
        self._file.close()

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(
                f"{self.path}: another process is writing here; wait for it, or choose "
                "another workdir"
            ) from error

    def _recover(self, inputs: Record) -> list[Record]:
        self._file.seek(0)
        content = self._file.read()
        whole = content[: content.rfind(b"\n") + 1]
        if len(whole) < len(content):
            self._file.truncate(len(whole))
        if not whole:
            self.append([inputs])
            sync_folder(self.path.parent)
            return []
        try:
            first, *records = [json.loads(line) for line in whole.splitlines()]
        except ValueError as error:
            raise ValueError(
                f"{self.path} is damaged and cannot be resumed; remove it to start "
                "again"
            ) from error
        if first != inputs:
            changed = sorted(
                key
                for key in {*first, *inputs}
                if key not in first or key not in inputs or first[key] != inputs[key]
            )
            raise ValueError(
                f"{self.path} holds results of other inputs (different: "
                f"{', '.join(changed)}); choose another workdir, or remove that file"
            )
        return records


FILE = "journal.jsonl"


def own_path(workdir: Path) -> Path:
    """The journal that this process writes: process 0's is the run's."""
    number = hosts.index() if hosts.count() > 1 else 0
    return workdir / (f"journal.{number}.jsonl" if number else FILE)


def merge(workdir: Path, inputs: Record) -> list[Record]:
    """Moves the records of all processes into the run's journal.

    Called by process 0 while no other has its journal open. What a killed run of more
    processes has left is found too.

    Args:
        workdir: the run's folder.
        inputs: what the results depend on.

    Returns:
        All records.

    Raises:
        ValueError: a journal is of other inputs, is none, or is in use.
    """
    with Journal(workdir / FILE, inputs) as journal:
        records = journal.records
        for path in sorted(workdir.glob("journal.[0-9]*.jsonl")):
            with Journal(path, inputs) as other:
                known = {record["row"]["name"] for record in records}
                new = [r for r in other.records if r["row"]["name"] not in known]
            journal.append(new)
            records += new
            path.unlink()
    return records


def recorded_inputs(path: str | os.PathLike[str]) -> Record | None:
    """The inputs that a journal was begun with; None if there is no such journal."""
    try:
        with open(path, "rb") as file:
            line = file.readline()
    except FileNotFoundError:
        return None
    if not line.endswith(b"\n"):
        return None
    try:
        inputs = json.loads(line)
    except ValueError:
        return None
    return inputs if isinstance(inputs, dict) else None


def write_atomically(path: Path, text: str) -> None:
    """Replaces a file by its new content: readers see all of it or none of it."""
    temporary = path.with_name(path.name + ".part")
    with open(temporary, "w", newline="") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    sync_folder(path.parent)


def sync_folder(path: Path) -> None:
    """Makes the names in a folder durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
