"""Reading safetensors checkpoints, single or sharded, without copying them."""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType

import numpy as np

from geomjax.checkpoints.dtypes import left_out_reason
from geomjax.checkpoints.errors import CheckpointError
from geomjax.checkpoints.hf_config import ties_word_embeddings
from geomjax.checkpoints.index import read_index
from geomjax.checkpoints.mapped_file import MappedFile
from geomjax.checkpoints.safetensors_header import (
    FLOATING_DTYPES,
    Entry,
    read_header,
)
from geomjax.typing import TensorSpec

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"


class SafetensorsSource:
    """The floating-point tensors of a safetensors checkpoint, memory-mapped.

    Every header is checked when the source is made; a tensor's data is touched only
    when the array that `read` returned is. Each tensor keeps its own dtype.

    Attributes:
        path: the folder or file that was opened.
        left_out: names that are in the checkpoint but not among `keys`, each with the
            reason: float8, integer and other tensors that are not floating weights.
        tie_word_embeddings: what the config.json beside the tensors says, if it does.
    """

    path: Path
    left_out: Mapping[str, str]
    tie_word_embeddings: bool | None

    def __init__(self, path: str | os.PathLike[str]):
        """Opens `path`.

        Args:
            path: a safetensors file, or a folder that holds `model.safetensors` or
                `model.safetensors.index.json` and its shards. As in transformers,
                the single file is taken where both are there.

        Raises:
            CheckpointError: whatever is wrong with the files, listed at once.
        """
        self.path = Path(path)
        single, index = self.path / SINGLE_FILE, self.path / INDEX_FILE
        if not self.path.is_dir():
            located = _open_file(self.path)
        elif single.exists():
            located = _open_file(single)
        elif index.exists():
            located = _open_shards(index)
        else:
            raise CheckpointError(
                self.path, [f"holds neither {SINGLE_FILE} nor {INDEX_FILE}"]
            )
        folder = self.path if self.path.is_dir() else self.path.parent
        self.tie_word_embeddings = ties_word_embeddings(folder)
        self._located = {
            name: (file, entry)
            for name, (file, entry) in located.items()
            if entry.dtype in FLOATING_DTYPES
        }
        self.left_out = MappingProxyType(
            {
                name: left_out_reason(entry.dtype)
                for name, (_, entry) in located.items()
                if entry.dtype not in FLOATING_DTYPES
            }
        )

    def keys(self) -> Iterator[str]:
        """Iterates over the names of the floating-point tensors, in file order."""
        return iter(self._located)

    def spec(self, key: str) -> TensorSpec:
        """Shape and storage dtype of `key`, without reading its data."""
        _, entry = self._locate(key)
        return TensorSpec(entry.shape, FLOATING_DTYPES[entry.dtype])

    def read(self, key: str) -> np.ndarray:
        """The tensor `key` as a read-only view of the file, in its storage dtype."""
        file, entry = self._locate(key)
        return file.array(entry.begin, entry.shape, FLOATING_DTYPES[entry.dtype])

    def prefetch(self, key: str) -> None:
        """Asks the kernel to read `key` from disk in the background."""
        file, entry = self._locate(key)
        file.prefetch(entry.begin, entry.end - entry.begin)

    def release(self, key: str) -> None:
        """Drops the pages of `key`; arrays of it stay valid and would be read again."""
        file, entry = self._locate(key)
        file.release(entry.begin, entry.end - entry.begin)

    def _locate(self, key: str) -> tuple[MappedFile, Entry]:
        try:
            return self._located[key]
        except KeyError:
            reason = self.left_out[key] if key in self.left_out else "no such tensor"
            raise KeyError(f"{self.path}: {key!r}: {reason}") from None


_Located = dict[str, tuple[MappedFile, Entry]]


def _open_file(path: Path) -> _Located:
    file = MappedFile(path)
    return {name: (file, entry) for name, entry in read_header(file).items()}


def _open_shards(index: Path) -> _Located:
    """Opens every shard, and holds what they contain against the index."""
    expected = read_index(index)
    problems: list[str] = []
    located: _Located = {}
    for shard in dict.fromkeys(expected.values()):
        try:
            tensors = _open_file(shard)
        except CheckpointError as error:
            problems += [f"{shard.name}: {problem}" for problem in error.problems]
            # Its tensors are accounted for by the shard's own problem.
            expected = {n: place for n, place in expected.items() if place != shard}
            continue
        for name, place in tensors.items():
            if name in located:
                first = located[name][0].path.name
                problems.append(f"{name!r}: both in {first} and in {shard.name}")
            elif name not in expected:
                problems.append(f"{name!r}: in {shard.name}, but not in the index")
            elif expected[name] != shard:
                problems.append(
                    f"{name!r}: in {shard.name}, but the index places it in "
                    f"{expected[name].name}"
                )
            located.setdefault(name, place)
    problems += [
        f"{name!r}: the index places it in {shard.name}, which does not hold it"
        for name, shard in expected.items()
        if name not in located
    ]
    if problems:
        raise CheckpointError(index, problems)
    return {name: located[name] for name in expected}
