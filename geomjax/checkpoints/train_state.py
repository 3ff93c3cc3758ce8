"""Checkpoints of a training run: Orbax, asynchronous, and checked before use.

Orbax writes each checkpoint under a temporary name and renames it when it is whole. Two
gaps are closed here: a file that was truncated afterwards is found by its size before
Orbax reads it, and a state whose shapes or dtypes differ is refused rather than cast.
"""

import json
import logging
import os
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

KEPT = 2
"""Checkpoints kept: the newest, and one to fall back on."""


class TrainCheckpoints:
    """The checkpoints of one run, in a folder of its own.

    Attributes:
      directory: Where they are.
      skipped: Steps whose checkpoint was damaged and passed over by `restore`.
    """

    def __init__(self, directory: Path):
        self.directory = directory.absolute()
        self.skipped: list[int] = []
        self._sizes = self.directory / "sizes"
        self._sizes.mkdir(parents=True, exist_ok=True)
        self._unlisted: int | None = None
        # Orbax reports each save through absl at INFO; a run makes hundreds.
        logging.getLogger("absl").setLevel(logging.WARNING)
        self._manager = ocp.CheckpointManager(
            self.directory / "states",
            options=ocp.CheckpointManagerOptions(max_to_keep=KEPT),
        )

    def save(self, step: int, state: Any) -> None:
        """Begins to save a state; the step before it is finished first.

        Args:
          step: The training steps done.
          state: A pytree of arrays; it may be donated when this returns.

        Raises:
          OSError: The disk is full or not writable; earlier checkpoints are whole.
        """
        self.wait()
        self._manager.save(step, args=ocp.args.StandardSave(state))
        self._unlisted = step

    def wait(self) -> None:
        """Returns when everything that was saved is on disk and listed.

        Raises:
          OSError: The last save failed.
        """
        self._manager.wait_until_finished()
        self._manager.check_for_errors()
        if self._unlisted is None:
            return
        step, self._unlisted = self._unlisted, None
        temporary = self._sizes / f".{step}.tmp"
        temporary.write_text(json.dumps(self._measure(step)))
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(self._sizes / f"{step}.json")

    def restore(self, like: Any) -> Any | None:
        """The newest whole state, or None where there is none.

        Args:
          like: A state with the shapes, dtypes and shardings to restore to.

        Raises:
          ValueError: The checkpoint's tree, shapes or dtypes are not those of `like`.
        """
        for step in sorted(self._manager.all_steps(), reverse=True):
            if not self._whole(step):
                self.skipped.append(step)
                continue
            self._check(step, like)
            abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
            return self._manager.restore(step, args=ocp.args.StandardRestore(abstract))
        return None

    def close(self) -> None:
        """Finishes what was begun and releases Orbax's threads."""
        self.wait()
        self._manager.close()

    def _measure(self, step: int) -> dict[str, int]:
        root = self.directory / "states" / str(step)
        return {
            str(path.relative_to(root)): path.stat().st_size
            for path in sorted(root.rglob("*"))
            if path.is_file()
        }

    def _whole(self, step: int) -> bool:
        """Whether the files of a step are there in their sizes.

        A step that was killed between its commit and its listing counts as damaged: the
        one before it leads to the same bits.
        """
        try:
            listed = json.loads((self._sizes / f"{step}.json").read_text())
        except (FileNotFoundError, json.JSONDecodeError):
            return False
        return listed == self._measure(step)

    def _check(self, step: int, like: Any) -> None:
        found = self._manager.item_metadata(step)

        def table(tree: Any) -> dict[str, tuple]:
            flat, _ = jax.tree_util.tree_flatten_with_path(tree)
            return {
                jax.tree_util.keystr(path, simple=True, separator="."): (
                    tuple(leaf.shape),
                    str(leaf.dtype),
                )
                for path, leaf in flat
            }

        want, got = table(like), table(getattr(found, "tree", found))
        if want != got:
            wrong = [
                f"{name}: expected {want.get(name)}, found {got.get(name)}"
                for name in sorted(want.keys() | got.keys())
                if want.get(name) != got.get(name)
            ]
            raise ValueError(
                f"checkpoint {step} in {self.directory} is of another run:\n"
                + "\n".join(wrong)
            )
