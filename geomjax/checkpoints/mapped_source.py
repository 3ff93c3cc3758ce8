"""Tensors of memory-mapped files as a `CheckpointSource`."""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import numpy as np

from geomjax.checkpoints.dtypes import left_out_reason
from geomjax.checkpoints.hf_config import ties_word_embeddings
from geomjax.checkpoints.mapped_file import MappedFile, span_bytes
from geomjax.typing import TensorSpec


class MappedTensor(NamedTuple):
    """A tensor in a mapped file.

    Attributes:
        file: the file.
        offset: first byte of its first element, from the start of the file.
        shape: its shape.
        dtype: its dtype, or the format's name for one that is not read.
        strides: steps in elements, where they are not those of C order; else None.
    """

    file: MappedFile
    offset: int
    shape: tuple[int, ...]
    dtype: np.dtype | str
    strides: tuple[int, ...] | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the file from the first element to the end of the last one."""
        return span_bytes(self.shape, np.dtype(self.dtype), self.strides)

    def read(self) -> np.ndarray:
        """The tensor as a read-only view of the file."""
        dtype = np.dtype(self.dtype)
        return self.file.array(self.offset, self.shape, dtype, self.strides)

    def prefetch(self) -> None:
        """Asks the kernel to read it in the background."""
        self.file.prefetch(self.offset, self.nbytes)

    def release(self) -> None:
        """Drops its pages from memory."""
        self.file.release(self.offset, self.nbytes)


class MappedSource:
    """The floating-point tensors of memory-mapped files, read without a copy.

    A tensor's data is touched only when the array that `read` returned is. Each tensor
    keeps its own dtype.

    Attributes:
        path: the folder or file that was opened.
        left_out: names that are in the checkpoint but not among `keys`, each with the
            reason: float8, integer and other tensors that are not floating weights.
        tie_word_embeddings: what the config.json beside the tensors says, if it does.
    """

    path: Path
    left_out: Mapping[str, str]
    tie_word_embeddings: bool | None

    def __init__(
        self,
        path: str | os.PathLike[str],
        tensors: Mapping[str, MappedTensor],
        left_out: Mapping[str, str] | None = None,
    ):
        """Takes the tensors that a reader found in the files of `path`.

        Args:
            path: what the reader opened.
            tensors: name to place; those of a dtype that is not read are left out.
            left_out: further names that the reader left out, with the reason.
        """
        self.path = Path(path)
        folder = self.path if self.path.is_dir() else self.path.parent
        self.tie_word_embeddings = ties_word_embeddings(folder)
        self._tensors = {
            name: tensor
            for name, tensor in tensors.items()
            if isinstance(tensor.dtype, np.dtype)
        }
        others = {
            name: left_out_reason(tensor.dtype)
            for name, tensor in tensors.items()
            if name not in self._tensors
        }
        self.left_out = MappingProxyType(others | dict(left_out or {}))

    def keys(self) -> Iterator[str]:
        """Iterates over the names of the floating-point tensors, in file order."""
        return iter(self._tensors)

    def spec(self, key: str) -> TensorSpec:
        """Shape and storage dtype of `key`, without reading its data."""
        tensor = self._locate(key)
        return TensorSpec(tensor.shape, np.dtype(tensor.dtype))

    def read(self, key: str) -> np.ndarray:
        """The tensor `key` as a read-only view of the file, in its storage dtype."""
        return self._locate(key).read()

    def prefetch(self, key: str) -> None:
        """Asks the kernel to read `key` from disk in the background."""
        self._locate(key).prefetch()

    def release(self, key: str) -> None:
        """Drops the pages of `key`; arrays of it stay valid and would be read again."""
        self._locate(key).release()

    def _locate(self, key: str) -> MappedTensor:
        try:
            return self._tensors[key]
        except KeyError:
            reason = self.left_out[key] if key in self.left_out else "no such tensor"
            raise KeyError(f"{self.path}: {key!r}: {reason}") from None
