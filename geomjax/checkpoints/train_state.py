"""Checkpoints of a training run: Orbax, asynchronous, and checked before use.

Orbax writes each checkpoint under a temporary name and renames it when it is whole.
Three gaps are closed here: a file that was damaged afterwards is found by its size and
checksum before Orbax reads it; a state whose shapes or dtypes differ is refused rather
than cast; and so is one that another configuration has made. On several processes each
writes and reads its own part, and all restore the same step.
"""

import json
import logging
import os
import re
import threading
import zlib
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp

from geomjax import hosts
from geomjax.checkpoints.errors import CheckpointWriteError

KEPT = 2
"""Checkpoints kept: the newest, and one to fall back on."""

CHECKSUMS = "checksums.json"
"""In every checkpoint: size and CRC-32 of each of its files."""

_STAMP = "_CHECKPOINT_METADATA"
"""Orbax writes the time of the renaming into this one afterwards."""

_OS_ERROR_CODE = re.compile(r"os_error_code='(\d+)'")
_CHUNK = 1 << 22
_THREADS = 8


class Restored(NamedTuple):
    """What a checkpoint holds.

    Attributes:
      state: The state, laid out as was asked.
      extra: The JSON data saved with it.
    """

    state: Any
    extra: Any


class TrainCheckpoints:
    """The checkpoints of one run, in a folder of its own.

    Attributes:
      directory: Where they are.
      skipped: Steps whose checkpoint was damaged and passed over by the last
        `restore`, newest first.
    """

    def __init__(self, directory: Path, *, config_hash: str = "", keep: int = KEPT):
        """Opens the folder, or makes it.

        Args:
          directory: The folder, the same in every process.
          config_hash: Names the configuration: a checkpoint that was saved under
            another one is not restored.
          keep: Checkpoints kept; 2 or more leave one to fall back on.
        """
        if hosts.count() != jax.process_count():
            raise ValueError(
                f"this training is of one process, but {jax.process_count()} were "
                "started; start it as one, without --num_processes"
            )
        self.directory = directory.absolute()
        self.skipped: list[int] = []
        self._damaged: list[int] = []
        self._config_hash = config_hash
        self._states = self.directory / "states"
        self._states.mkdir(parents=True, exist_ok=True)
        self._saving = 0
        # Orbax logs every save, of which a run makes hundreds, and several tracebacks
        # for one that fails, whose error it raises as well.
        logging.getLogger("absl").addFilter(_not_of_orbax)
        self._manager = _Manager(
            self._states,
            # Named, as a process that has not saved yet finds no metadata without it.
            item_handlers={
                "state": ocp.StandardCheckpointHandler(),
                "record": ocp.JsonCheckpointHandler(),
            },
            options=ocp.CheckpointManagerOptions(
                max_to_keep=keep,
                async_options=ocp.options.AsyncOptions(
                    post_finalization_callback=self._write_checksums
                ),
            ),
        )

    def save(self, step: int, state: Any, extra: Any = None) -> None:
        """Begins to save a state; the step before it is finished first.

        Args:
          step: The training steps done.
          state: A pytree of arrays; it may be donated when this returns.
          extra: JSON data to be saved with it, the same in every process.

        Raises:
          ValueError: A later step is saved already.
          OSError: The disk is full or not writable; earlier checkpoints are whole.
        """
        self.wait()
        # Orbax saves no step before one that it has, and none twice.
        while self._damaged:
            self._manager.delete(self._damaged.pop())
        self._saving = step
        record = {"config_hash": self._config_hash, "extra": extra}
        with _os_errors(self.directory):
            begun = self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(state),
                    record=ocp.args.JsonSave(record),
                ),
            )
        if not begun:
            raise ValueError(
                f"step {step}: {self.directory} has step {self._manager.latest_step()} "
                "already; restore it, or choose an empty folder"
            )

    def wait(self) -> None:
        """Returns when everything that was saved is on disk.

        Raises:
          OSError: The last save failed.
        """
        with _os_errors(self.directory):
            self._manager.await_own_part()
            self._manager.wait_until_finished()
            self._manager.check_for_errors()

    def restore(self, like: Any) -> Restored | None:
        """The newest whole state, or None where there is none.

        Damaged checkpoints that are newer are kept until the next save.

        Args:
          like: A state, or `jax.ShapeDtypeStruct`s, with the shapes, dtypes and
            shardings to restore to; they may be on another mesh than what was saved.

        Raises:
          ValueError: The checkpoint's tree, shapes or dtypes are not those of `like`,
            or it is of another configuration.
        """
        self.skipped, self._damaged = [], []
        steps = hosts.on_main(lambda: sorted(self._manager.all_steps(), reverse=True))
        for step in steps:
            if not self._whole(step):
                self.skipped.append(step)
                self._damaged.append(step)
                continue
            self._check_config(step)
            self._check(step, like)
            abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
            found = self._manager.restore(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardRestore(abstract),
                    record=ocp.args.JsonRestore(),
                ),
            )
            return Restored(found.state, found.record["extra"])
        return None

    def close(self) -> None:
        """Finishes what was begun and releases Orbax's threads."""
        try:
            self.wait()
        finally:
            if not self._manager.left_others:
                self._manager.close()

    def _write_checksums(self) -> None:
        """Adds the checksums to a checkpoint that is written and not yet renamed."""
        name = str(self._saving)
        # Where a folder cannot be renamed, as in a bucket, Orbax marks it instead.
        folders = [*self._states.glob(f"{name}.*"), self._states / name]
        folder = next(path for path in folders if path.is_dir())
        files = sorted(
            path for path in folder.rglob("*") if path.is_file() and path.name != _STAMP
        )
        with ThreadPoolExecutor(_THREADS) as pool:
            found = dict(
                zip(
                    (path.relative_to(folder).as_posix() for path in files),
                    pool.map(_checksum, files),
                    strict=True,
                )
            )
        with (folder / CHECKSUMS).open("w") as file:
            json.dump(found, file)
            file.flush()
            os.fsync(file.fileno())

    def _whole(self, step: int) -> bool:
        """Whether the files of a step are as they were written.

        Each process reads its share of them, after which all know.
        """
        folder = self._states / str(step)

        def listed() -> dict[str, list[int]] | None:
            try:
                json.loads((folder / _STAMP).read_text())
                found = json.loads((folder / CHECKSUMS).read_text())
            except (FileNotFoundError, ValueError):
                return None
            return found if isinstance(found, dict) and _stay_inside(found) else None

        wanted = hosts.on_main(listed)
        if wanted is None:
            return False
        names = sorted(wanted)[hosts.index() :: hosts.count()]
        with ThreadPoolExecutor(_THREADS) as pool:
            found = pool.map(lambda name: _checksum_if_there(folder / name), names)
            good = all(
                crc == wanted[name] for name, crc in zip(names, found, strict=True)
            )
        return all(hosts.gather(good))

    def _check_config(self, step: int) -> None:
        args = ocp.args.Composite(record=ocp.args.JsonRestore())
        found = self._manager.restore(step, args=args).record["config_hash"]
        if found != self._config_hash:
            raise ValueError(
                f"checkpoint {step} in {self.directory} was saved under another "
                f"configuration (hash {found or 'none'}, now {self._config_hash}); "
                "choose another folder, or run with the configuration it was begun with"
            )

    def _check(self, step: int, like: Any) -> None:
        found = self._manager.item_metadata(step)["state"]

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


class _Manager(ocp.CheckpointManager):  # type: ignore[misc]
    """Orbax's manager, which leaves preemption to the loop and failures to the process.

    It would ask JAX's coordination service at every save under its own step number, and
    so confuse those who count the loop's. And a process that failed to write its part
    would wait twenty minutes for the others, which wait for it, before it says so.

    Attributes:
      settled: Set while this process writes nothing.
      failure: What kept it from writing its part.
    """

    def __init__(self, *arguments: Any, **options: Any):
        self.settled = threading.Event()
        self.settled.set()
        self.failure: BaseException | None = None
        for name in ("_finalize", "_wait_for_checkpointers"):
            if not hasattr(ocp.CheckpointManager, name):
                raise ImportError(
                    f"this orbax-checkpoint has no CheckpointManager.{name}"
                )
        super().__init__(*arguments, **options)

    @property
    def left_others(self) -> bool:
        """Whether others wait for a part of this process, which will not come."""
        return self.failure is not None and hosts.count() > 1

    def await_own_part(self) -> None:
        """Waits until this process has written its part; raises if it cannot.

        Of several processes it must then end, and so end the others.
        """
        self.settled.wait()
        if self.failure is not None and self.left_others:
            raise self.failure

    def reached_preemption(self, step: int) -> bool:
        """Never: the loop asks `hosts.preempted`."""
        return False

    def save(self, *arguments: Any, **options: Any) -> bool:
        """Begins to save, as Orbax does."""
        self.settled.clear()
        begun = False
        try:
            begun = super().save(*arguments, **options)
        except BaseException as error:
            self.failure = error
            raise
        finally:
            if not begun:
                self.settled.set()
        return begun

    def _wait_for_checkpointers(self) -> None:
        """Where Orbax's thread of a save learns that a part was not written."""
        try:
            super()._wait_for_checkpointers()
        except BaseException as error:
            self.failure = error
            raise
        finally:
            self.settled.set()

    def _finalize(self, *arguments: Any) -> None:
        """That thread's whole work."""
        try:
            super()._finalize(*arguments)
        finally:
            self.settled.set()


def _stay_inside(names: Iterable[str]) -> bool:
    """Whether there are names, and none leads out of the folder that lists them."""
    paths = [PurePosixPath(name) for name in names]
    return bool(paths) and not any(p.is_absolute() or ".." in p.parts for p in paths)


def _checksum(path: Path) -> list[int]:
    """Size and CRC-32 of a file."""
    size = crc = 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            size, crc = size + len(chunk), zlib.crc32(chunk, crc)
    return [size, crc]


def _checksum_if_there(path: Path) -> list[int] | None:
    """The same, None without a file."""
    hosts.await_file(path)
    try:
        return _checksum(path)
    except FileNotFoundError:
        return None


def _not_of_orbax(record: logging.LogRecord) -> bool:
    return "orbax" not in Path(record.pathname).parts


@contextmanager
def _os_errors(directory: Path) -> Iterator[None]:
    """Raises what kept a state from being written as the OSError that it is.

    TensorStore, which writes the arrays, makes a ValueError of a full disk.
    """
    try:
        yield
    except (OSError, ValueError) as error:
        if isinstance(error, OSError):
            number = error.errno
        else:
            code = _OS_ERROR_CODE.search(str(error))
            if code is None:
                raise
            number = int(code[1])
        raise CheckpointWriteError(
            number,
            f"{os.strerror(number or 0)}; the state was not saved, and checkpoints "
            "saved before are whole",
            str(directory),
        ) from error
