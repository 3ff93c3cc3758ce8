"""Reading the rank files of an FSDP run, as verl writes them, without PyTorch.

Each rank saves its own part of every parameter, in `model_world_size_N_rank_R.pt`. A
parameter is a DTensor: a local tensor, the rank's coordinates in a mesh of devices, and
for each axis of the mesh whether the parameter is cut along it (`Shard`) or copied
(`Replicate`).
"""

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import numpy as np

from geomjax.checkpoints.dtensor import LayoutError, LocalTensor, local_tensor
from geomjax.checkpoints.dtypes import left_out_reason
from geomjax.checkpoints.errors import CheckpointError
from geomjax.checkpoints.hf_config import ties_word_embeddings
from geomjax.checkpoints.mapped_source import MappedTensor
from geomjax.checkpoints.torch_archive import TorchArchive
from geomjax.checkpoints.torch_bin import state_dict
from geomjax.typing import TensorSpec

RANK_FILE = re.compile(r"model_world_size_(\d{1,6})_rank_(\d{1,6})\.pt")


class FsdpSource:
    """The parameters of an FSDP checkpoint, put together from its rank files.

    The files are mapped; a parameter is assembled when it is read, into memory of its
    own, unless one rank holds all of it. Nothing in the pickles is imported or called.

    Attributes:
        path: the folder that was opened.
        left_out: names in the checkpoint that are not among `keys`, with the reason.
        tie_word_embeddings: what the run's config.json says, if it does.
    """

    path: Path
    left_out: Mapping[str, str]
    tie_word_embeddings: bool | None

    def __init__(self, path: str | os.PathLike[str]):
        """Opens the rank files in the folder `path`.

        Raises:
            CheckpointError: files of ranks that are missing or belong to another world
                size, names or shapes that differ between ranks, placements that are
                neither whole nor plain slices, or files that are damaged.
        """
        self.path = Path(path)
        # verl puts the config beside the ranks' files, in a folder of its own.
        self.tie_word_embeddings = ties_word_embeddings(self.path / "huggingface")
        if self.tie_word_embeddings is None:
            self.tie_word_embeddings = ties_word_embeddings(self.path)
        ranks = [_rank_tensors(file) for file in _rank_files(self.path)]
        problems: list[str] = []
        left_out: dict[str, str] = {}
        self._tensors: dict[str, _Part] = {}
        for name in dict.fromkeys(name for tensors in ranks for name in tensors):
            holders = [tensors.get(name) for tensors in ranks]
            try:
                self._tensors[name] = _assemble(holders)
            except _LeftOutError as reason:
                left_out[name] = str(reason)
            except LayoutError as error:
                problems.append(f"{name!r}: {error}")
        if problems:
            raise CheckpointError(self.path, problems)
        if not self._tensors:
            reasons = [f"{name!r}: {reason}" for name, reason in left_out.items()]
            raise CheckpointError(self.path, ["no tensor can be read", *reasons])
        self.left_out = MappingProxyType(left_out)

    def keys(self) -> Iterator[str]:
        """Iterates over the names of the floating-point parameters."""
        return iter(self._tensors)

    def spec(self, key: str) -> TensorSpec:
        """Shape and storage dtype of the whole parameter `key`."""
        part = self._locate(key)
        return TensorSpec(part.shape, part.dtype)

    def read(self, key: str) -> np.ndarray:
        """The whole parameter `key`, in its storage dtype."""
        part = self._locate(key)
        if part.tensor is not None:
            return part.tensor.read()
        whole = np.empty(part.shape, part.dtype)
        _fill(whole, part)
        self.release(key)
        return whole

    def prefetch(self, key: str) -> None:
        """Asks the kernel to read the slices of `key` in the background."""
        for tensor in _leaves(self._locate(key)):
            tensor.prefetch()

    def release(self, key: str) -> None:
        """Drops the mapped pages of `key`; arrays that were read stay valid."""
        for tensor in _leaves(self._locate(key)):
            tensor.release()

    def _locate(self, key: str) -> "_Part":
        try:
            return self._tensors[key]
        except KeyError:
            reason = self.left_out[key] if key in self.left_out else "no such tensor"
            raise KeyError(f"{self.path}: {key!r}: {reason}") from None


class _LeftOutError(Exception):
    """A parameter that is not read, with the reason."""


class _Part(NamedTuple):
    """A tensor in a file, or parts one after another along an axis."""

    shape: tuple[int, ...]
    dtype: np.dtype
    tensor: MappedTensor | None
    axis: int = 0
    parts: "tuple[_Part, ...]" = ()


def _rank_files(folder: Path) -> list[Path]:
    """The files of all ranks, in order."""
    found: dict[int, dict[int, Path]] = {}
    for path in sorted(folder.iterdir()):
        if named := RANK_FILE.fullmatch(path.name):
            world, rank = map(int, named.groups())
            found.setdefault(world, {})[rank] = path
    if len(found) != 1:
        sizes = ", ".join(map(str, sorted(found))) or "none"
        raise CheckpointError(
            folder,
            [
                "expected the files model_world_size_N_rank_R.pt of one world size; "
                f"found sizes: {sizes}"
            ],
        )
    ((world, files),) = found.items()
    missing = [rank for rank in range(world) if rank not in files]
    spare = [rank for rank in files if rank >= world]
    if missing or spare:
        raise CheckpointError(
            folder,
            [f"rank {r} of {world} has no file" for r in missing[:20]]
            + [f"there is a rank {r}, but only {world} ranks" for r in spare],
        )
    return [files[rank] for rank in range(world)]


def _rank_tensors(path: Path) -> dict[str, LocalTensor]:
    """What one rank's file holds, by parameter."""
    archive = TorchArchive(path)
    rank = int(RANK_FILE.fullmatch(path.name)[2])  # type: ignore[index]
    tensors: dict[str, LocalTensor] = {}
    problems: list[str] = []
    for name, value in state_dict(archive).items():
        try:
            tensors[name] = local_tensor(archive, value, rank)
        except CheckpointError as error:
            problems += [f"{name!r}: {problem}" for problem in error.problems]
        except LayoutError as error:
            problems.append(f"{name!r}: {error}")
    if problems:
        raise CheckpointError(path, problems)
    return tensors


def _assemble(holders: list[LocalTensor | None]) -> _Part:
    """The whole parameter, from what each rank holds of it."""
    absent = [rank for rank, local in enumerate(holders) if local is None]
    if absent:
        raise LayoutError(f"absent from the files of ranks {absent[:20]}")
    held = [local for local in holders if local is not None]
    tensors = [local.tensor for local in held if local.tensor is not None]
    if not tensors:
        raise _LeftOutError(held[0].kind)
    dtypes = {tensor.dtype for tensor in tensors}
    placements, shape = held[0].placements, held[0].shape
    if any(local.placements != placements for local in held):
        raise LayoutError("its placements differ between ranks")
    if len(tensors) < len(held) or len(dtypes) > 1:
        raise LayoutError(f"dtypes differ between ranks: {sorted(map(str, dtypes))}")
    if not isinstance(tensors[0].dtype, np.dtype):
        raise _LeftOutError(left_out_reason(tensors[0].dtype))
    if placements is None:
        if len(held) > 1:
            raise _LeftOutError(
                "a plain tensor in the files of several ranks: whether they hold "
                "copies or slices is not recorded"
            )
        return _leaf(tensors[0])
    if any(local.shape != shape for local in held):
        raise LayoutError("its whole shape differs between ranks")
    places = dict(zip((local.coordinates for local in held), tensors, strict=True))
    if len(places) < len(held):
        raise LayoutError("two ranks have the same place in the device mesh")
    whole = _gather(places, placements)
    if whole.shape != shape:
        raise LayoutError(
            f"its slices make up shape {whole.shape}; {shape} was expected"
        )
    return whole


def _gather(
    places: dict[tuple[int, ...], MappedTensor], placements: tuple[int | None, ...]
) -> _Part:
    """Puts slices together, one mesh axis after another from the last."""
    if not placements:
        (tensor,) = places.values()
        return _leaf(tensor)
    groups: dict[int, dict[tuple[int, ...], MappedTensor]] = {}
    for coordinates, tensor in places.items():
        groups.setdefault(coordinates[0], {})[coordinates[1:]] = tensor
    if sorted(groups) != list(range(len(groups))):
        raise LayoutError(f"only the places {sorted(groups)} of a mesh axis are there")
    axis = placements[0]
    parts = [_gather(groups[i], placements[1:]) for i in range(len(groups))]
    if axis is None:
        return parts[0]
    others = {part.shape[:axis] + part.shape[axis + 1 :] for part in parts}
    if len(others) > 1 or any(axis >= len(part.shape) for part in parts):
        raise LayoutError(
            f"slices of shapes {[part.shape for part in parts][:8]} along axis {axis} "
            "do not fit together"
        )
    if len(parts) == 1:
        return parts[0]
    shape = list(parts[0].shape)
    shape[axis] = sum(part.shape[axis] for part in parts)
    return _Part(tuple(shape), parts[0].dtype, None, axis, tuple(parts))


def _leaf(tensor: MappedTensor) -> _Part:
    return _Part(tensor.shape, np.dtype(tensor.dtype), tensor)


def _leaves(part: _Part) -> Iterator[MappedTensor]:
    if part.tensor is not None:
        yield part.tensor
    for inner in part.parts:
        yield from _leaves(inner)


def _fill(target: np.ndarray, part: _Part) -> None:
    """Copies a part into its place in the whole."""
    if part.tensor is not None:
        target[...] = part.tensor.read()
    start = 0
    for inner in part.parts:
        stop = start + inner.shape[part.axis]
        place = (slice(None),) * part.axis + (slice(start, stop),)
        _fill(target[place], inner)
        start = stop
