"""Reading the arrays of an Orbax checkpoint, one at a time."""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from geomjax.checkpoints.dtypes import is_weight, left_out_reason
from geomjax.checkpoints.errors import CheckpointError
from geomjax.typing import TensorSpec

METADATA_FILE = "_METADATA"
_UNFINISHED = ".orbax-checkpoint-tmp"


class OrbaxSource:
    """The floating-point arrays of a pytree that Orbax saved.

    An array is named by its path in the tree, joined with dots. Of a training state,
    a tree with `params` at its top, only those are read, and `params` is not part of
    their names. Arrays are read whole, onto the host, whatever their sharding was.

    Attributes:
        path: the folder that holds the tree.
        left_out: names in the checkpoint that are not among `keys`, with the reason.
        tie_word_embeddings: None; such a checkpoint does not say.
    """

    path: Path
    left_out: Mapping[str, str]
    tie_word_embeddings: bool | None

    def __init__(self, path: str | os.PathLike[str]):
        """Opens `path`.

        Args:
            path: the folder of a saved tree, or the folder of one step of a checkpoint
                manager with one tree in it.

        Raises:
            CheckpointError: no finished checkpoint of one tree, or a damaged one.
        """
        self.path = _tree_folder(Path(path))
        self.tie_word_embeddings = None
        self._handler = ocp.PyTreeCheckpointHandler()
        try:
            self._tree = self._handler.metadata(epath.Path(self.path)).tree
        except (ValueError, KeyError, TypeError, OSError) as error:
            raise _damaged(self.path, error) from error
        leaves = jax.tree_util.tree_leaves_with_path(self._tree)
        is_state = isinstance(self._tree, dict) and "params" in self._tree
        self._specs: dict[str, TensorSpec] = {}
        self._places: dict[str, int] = {}
        left_out: dict[str, str] = {}
        for place, (keys, leaf) in enumerate(leaves):
            name = jax.tree_util.keystr(keys, simple=True, separator=".")
            if is_state and not name.startswith("params."):
                left_out[name] = "not among the params of the training state"
                continue
            name = name.removeprefix("params.") if is_state else name
            shape, dtype = getattr(leaf, "shape", None), getattr(leaf, "dtype", None)
            if shape is None or not is_weight(np.dtype(dtype) if dtype else None):
                left_out[name] = left_out_reason(dtype)
                continue
            if name in self._places:
                raise CheckpointError(
                    self.path, [f"{name!r}: the name of two arrays of the tree"]
                )
            self._specs[name] = TensorSpec(tuple(shape), np.dtype(dtype))
            self._places[name] = place
        self.left_out = MappingProxyType(left_out)

    def keys(self) -> Iterator[str]:
        """Iterates over the names of the floating-point arrays, in tree order."""
        return iter(self._specs)

    def spec(self, key: str) -> TensorSpec:
        """Shape and dtype of `key` as saved, without reading it."""
        try:
            return self._specs[key]
        except KeyError:
            reason = self.left_out[key] if key in self.left_out else "no such array"
            raise KeyError(f"{self.path}: {key!r}: {reason}") from None

    def read(self, key: str) -> np.ndarray:
        """The whole array `key`, on the host and in its own dtype.

        Raises:
            CheckpointError: its data is missing or damaged.
        """
        spec = self.spec(key)
        try:
            array = self._restore(self._places[key])
        except (ValueError, KeyError, OSError) as error:
            raise _damaged(self.path, error, key) from error
        # Orbax would cast and pad in silence; here the array is what was described.
        if (array.shape, array.dtype) != (spec.shape, spec.dtype):
            raise CheckpointError(
                self.path,
                [
                    f"{key!r}: read {array.dtype} of shape {array.shape}; the metadata "
                    f"says {spec.dtype} of shape {spec.shape}"
                ],
            )
        return array

    def prefetch(self, key: str) -> None:
        """Does nothing: Orbax reads when asked."""

    def release(self, key: str) -> None:
        """Does nothing: what was read belongs to the caller."""

    def _restore(self, place: int) -> np.ndarray:
        """Reads one leaf of the tree, by its place among the leaves."""
        leaves, structure = jax.tree_util.tree_flatten(self._tree)
        wanted: list[Any] = [ocp.PLACEHOLDER] * len(leaves)
        wanted[place] = 0
        as_numpy = [ocp.RestoreArgs(restore_type=np.ndarray)] * len(leaves)
        restored = self._handler.restore(
            epath.Path(self.path),
            args=ocp.args.PyTreeRestore(
                item=jax.tree_util.tree_unflatten(structure, wanted),
                restore_args=jax.tree_util.tree_unflatten(structure, as_numpy),
            ),
        )
        return jax.tree_util.tree_leaves(restored)[place]


def is_orbax(folder: Path) -> bool:
    """Whether `folder` looks like an Orbax tree, or a step that holds one."""
    return bool(_candidates(folder)) or any(_steps(folder))


def _candidates(folder: Path) -> list[Path]:
    """The trees in a folder: itself, or items of one step."""
    if (folder / METADATA_FILE).is_file():
        return [folder]
    return sorted(path.parent for path in folder.glob(f"*/{METADATA_FILE}"))


def _steps(folder: Path) -> list[int]:
    """Steps of a checkpoint manager's folder that hold a tree."""
    return sorted(
        int(path.name)
        for path in folder.iterdir()
        if path.name.isdecimal() and path.is_dir() and _candidates(path)
    )


def _tree_folder(path: Path) -> Path:
    """The one tree that `path` holds."""
    if not path.is_dir():
        raise CheckpointError(path, ["no such folder"])
    if _UNFINISHED in path.name:
        raise CheckpointError(path, ["a checkpoint that was never finished"])
    found = [p for p in _candidates(path) if _UNFINISHED not in p.name]
    if len(found) == 1 and not (found[0] != path and found[0].name.isdecimal()):
        return found[0].absolute()
    if steps := _steps(path) or [int(p.name) for p in found if p.name.isdecimal()]:
        advice = f"holds the steps {steps}; give the folder of one of them"
    elif found:
        names = [p.name for p in found]
        advice = f"holds the trees {names}; give the folder of one of them"
    else:
        advice = f"holds no Orbax checkpoint: no {METADATA_FILE} there or one below"
    raise CheckpointError(path, [advice])


def _damaged(path: Path, error: Exception, key: str | None = None) -> CheckpointError:
    reason = (str(error).splitlines() or [type(error).__name__])[0][:300]
    name = "" if key is None else f"{key!r}: "
    return CheckpointError(path, [f"{name}damaged or incomplete: {reason}"])
