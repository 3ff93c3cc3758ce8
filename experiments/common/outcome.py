"""One finished run of an arm, as its folder holds it."""

import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from geomjax import hosts
from geomjax.checkpoints import SafetensorsSource, write_safetensors
from geomjax.models import hf
from geomjax.models.config import ModelConfig
from geomjax.train.log import read_rows
from geomjax.typing import Params

LATE = 5
"""Evaluations at the end of a run whose mean is its late value (P1, Section 5)."""

INTERVALS = (
    "Intervals are over seeds alone: one anchor, one teacher and one test split are "
    "given, and what others would give is not in them."
)
"""What reports say below their claims."""

FINAL = "final"
FINISHED = "finished.json"
CHECKPOINTS = "checkpoints"
SNAPSHOTS = "snapshots"


def late(curve: np.ndarray) -> np.ndarray:
    """Mean over the last `LATE` evaluations, the untrained start not among them.

    Args:
      curve: Evaluations along the last axis, from step 0.
    """
    return curve[..., 1:][..., -LATE:].mean(axis=-1)


class Outcome(NamedTuple):
    """One finished run.

    Attributes:
      seed: Its seed.
      learning_rate: Its rate.
      directory: Its folder.
      trained: Share of the model's coordinates that it trained.
      mask_threshold: Smallest score that its mask selects, None where it has none.
      seconds: Time that its training took, in the process that finished it.
      input_wait_s: Part of it in which steps waited for their prompts.
      rows: The rows of its metrics file.
    """

    seed: int
    learning_rate: float
    directory: Path
    trained: float
    mask_threshold: float | None
    seconds: float
    input_wait_s: float
    rows: list[dict[str, Any]]

    def curve(self, name: str, kind: str = "eval") -> np.ndarray:
        """A metric along the run, `[T]`."""
        return np.array([row[name] for row in self.rows if row["kind"] == kind])

    def steps(self) -> np.ndarray:
        """Training steps of the evaluations, `[T]`."""
        return np.array([row["step"] for row in self.rows if row["kind"] == "eval"])

    def params(self, config: ModelConfig) -> Params:
        """Its final parameters, float32, read from its folder."""
        hosts.await_file(self.directory / FINISHED)
        source = SafetensorsSource(self.directory / FINAL)
        return hf.from_hf({name: source.read(name) for name in source.keys()}, config)

    def drop_params(self) -> None:
        """Deletes its final parameters; everything else stays."""
        hosts.on_main(lambda: shutil.rmtree(self.directory / FINAL, ignore_errors=True))


def finish(
    directory: Path,
    params: Params,
    config: ModelConfig,
    *,
    trained: float,
    mask_threshold: float | None,
    seconds: float,
    input_wait_s: float,
) -> None:
    """Records that a run has ended; its training state is then no longer needed.

    Process 0 writes, and needs `params`, which may lie over the devices of all.
    """
    params = hosts.fetch(params)
    record = {
        "trained": trained,
        "mask_threshold": mask_threshold,
        "seconds": round(seconds, 3),
        "input_wait_s": round(input_wait_s, 6),
    }

    def write() -> None:
        write_safetensors(directory / FINAL, hf.to_hf(params, config))
        temporary = directory / f".{FINISHED}.tmp"
        temporary.write_text(json.dumps(record) + "\n")
        temporary.replace(directory / FINISHED)

    hosts.on_main(write)


def read_outcome(directory: Path, learning_rate: float, seed: int) -> Outcome | None:
    """The run of a folder if it has ended, or None; as process 0 finds it."""
    found = hosts.on_main(lambda: _read(directory))
    if found is None:
        return None
    record, rows = found
    return Outcome(seed, learning_rate, directory, **record, rows=rows)


def _read(directory: Path) -> list[Any] | None:
    """What a run recorded at its end, and the rows of its metrics."""
    path = directory / FINISHED
    if not path.exists():
        return None
    # Parameters, both moments and all of it twice: five times what is kept.
    shutil.rmtree(directory / CHECKPOINTS, ignore_errors=True)
    return [json.loads(path.read_text()), read_rows(directory)]
