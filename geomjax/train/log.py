"""What a run reports: one JSON object a line, and TensorBoard events beside them."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tensorboardX import SummaryWriter

FILE = "metrics.jsonl"


def read_rows(directory: Path) -> list[dict[str, Any]]:
    """The rows of a run's metrics file; a last line that was cut off is left out."""
    path = directory / FILE
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")[:-1]
    return [json.loads(line) for line in lines]


class MetricsLog:
    """Appends rows to `metrics.jsonl` and scalars to TensorBoard event files.

    Rows hold no times, so that the file of a run that was killed and resumed is the
    same, byte for byte, as that of one that was not.
    """

    def __init__(self, directory: Path, *, resume_step: int | None):
        """Opens the log, dropping rows of steps after the one resumed from.

        Args:
          directory: The run's folder.
          resume_step: Training steps done in the restored state, or None at the start
            of a run, when nothing is kept.
        """
        directory.mkdir(parents=True, exist_ok=True)
        keep = -1 if resume_step is None else resume_step
        kept = [row for row in read_rows(directory) if row["step"] <= keep]
        path = directory / FILE
        temporary = directory / f".{FILE}.tmp"
        temporary.write_text("".join(_line(row) for row in kept))
        temporary.replace(path)
        self._file = path.open("a")
        self._events = SummaryWriter(
            str(directory / "tensorboard"), purge_step=keep + 1, flush_secs=30
        )

    def write(self, kind: str, step: int, values: Mapping[str, float | int]) -> None:
        """Adds a row.

        Args:
          kind: "train" or "eval".
          step: Training steps done.
          values: Scalars; `update`, where given, is the optimizer update's number and
            the abscissa in TensorBoard.
        """
        self._file.write(_line({"kind": kind, "step": step, **values}))
        abscissa = int(values.get("update", step))
        for name, value in values.items():
            if name != "update":
                self._events.add_scalar(f"{kind}/{name}", value, abscissa)

    def sync(self) -> None:
        """Returns when all rows are on disk."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Syncs and closes the files."""
        self.sync()
        self._file.close()
        self._events.close()


def _line(row: Mapping[str, Any]) -> str:
    return json.dumps(row) + "\n"
