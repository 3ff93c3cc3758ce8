"""Experiment trackers besides TensorBoard: Weights & Biases, Trackio.

TensorBoard events and `metrics.jsonl` are written always; a tracker is sent the rows of
that file as they appear. It is imported only if it is asked for.
"""

import importlib
import json
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from geomjax import hosts
from geomjax.train.log import read_rows_from

TRACKERS = ("wandb", "trackio")
"""Packages with `init`, `log` and `finish`, by the names under which they install."""

FILE = "tracker.json"
"""In a run's folder: which rows were sent, and the name under which they appear."""

OnStep = Callable[[int, dict[str, float]], None]


def load_tracker(name: str) -> Any:
    """The package of a tracker, None for none.

    Args:
      name: One of `TRACKERS`, or empty.

    Raises:
      ValueError: An unknown name, or the package is not installed.
    """
    if not name:
        return None
    if name not in TRACKERS:
        raise ValueError(f"tracker {name!r}; known: {', '.join(TRACKERS)}, or empty")
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ValueError(
            f"tracker {name!r} is not installed ({error}): pip install {name}, or "
            "leave the tracker empty; TensorBoard events are written in any case"
        ) from error


@contextmanager
def tracked(
    name: str, directory: Path, *, project: str, run: str, config: Mapping[str, Any]
) -> Iterator[Callable[[OnStep], OnStep]]:
    """Sends a run's metrics to a tracker while the block runs.

    Of several processes the first one sends. A run that was killed goes on under its
    name: as its rows are the same when they are made again, those that were sent are
    not sent twice.

    Args:
      name: The tracker; empty for none.
      directory: Folder of the run, which gets `metrics.jsonl`.
      project: Under which the tracker files the run.
      run: What it calls the run.
      config: The run's configuration.

    Yields:
      Wraps the loop's `on_step` so that new rows are sent after each step.

    Raises:
      ValueError: As `load_tracker`.
    """
    package = load_tracker(name)
    if package is None or not hosts.is_main():
        yield lambda on_step: on_step
        return
    directory.mkdir(parents=True, exist_ok=True)
    feed = _Feed(package, name, directory, run)
    package.init(
        project=project,
        name=feed.state["run"],
        config=dict(config),
        resume="allow",
        **({"id": feed.state["run"]} if name == "wandb" else {}),
    )

    def wrap(on_step: OnStep) -> OnStep:
        def sending(step: int, values: dict[str, float]) -> None:
            on_step(step, values)
            feed.send()

        return sending

    try:
        yield wrap
        feed.send()
    finally:
        package.finish()


class _Feed:
    """The rows of one run on their way to a tracker."""

    def __init__(self, package: Any, name: str, directory: Path, run: str):
        self._package, self._directory = package, directory
        path = directory / FILE
        if path.exists():
            self.state = json.loads(path.read_text())
        if not path.exists() or self.state["tracker"] != name:
            # Names are taken: by the same experiment in another folder.
            unique = f"{run}-{uuid.uuid4().hex[:8]}"
            self.state = {"tracker": name, "run": unique, "rows": 0}
        self._offset = self._rows = self._updates = 0

    def send(self) -> None:
        """Sends what the file has gained, but for what an earlier process sent."""
        rows, self._offset = read_rows_from(self._directory, self._offset)
        for row in rows:
            self._rows += 1
            # As in TensorBoard, evaluations stand at the last update before them.
            self._updates = int(row.get("update", self._updates))
            if self._rows > self.state["rows"]:
                kind = row["kind"]
                values = {
                    f"{kind}/{name}": value
                    for name, value in row.items()
                    if name not in ("kind", "update")
                }
                self._package.log(values, step=self._updates)
        self.state["rows"] = max(self.state["rows"], self._rows)
        temporary = self._directory / f".{FILE}.tmp"
        temporary.write_text(json.dumps(self.state) + "\n")
        temporary.replace(self._directory / FILE)
