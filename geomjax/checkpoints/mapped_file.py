"""A read-only memory map whose pages are given back when they have been used."""

import math
import mmap
import os
from pathlib import Path

import numpy as np

from geomjax.checkpoints.errors import CheckpointError


class MappedFile:
    """A file mapped read-only into memory, viewed as arrays without a copy.

    The pages of such a map are file-backed: they never count as anonymous memory, and
    the kernel may drop them at any time. `release` drops them at once, which also
    keeps the resident set flat while a large checkpoint is walked through. An array
    remains valid after its pages are released; touching it reads them again.

    The file must not be truncated by another program while it is mapped: the operating
    system then ends the process at the next touch.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)
        try:
            with open(self.path, "rb") as file:
                self.size = os.fstat(file.fileno()).st_size
                if self.size == 0:
                    raise CheckpointError(self.path, ["the file is empty"])
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except FileNotFoundError:
            raise CheckpointError(self.path, ["no such file"]) from None
        except OSError as error:
            raise CheckpointError(
                self.path, [f"cannot be opened: {error.strerror}"]
            ) from error
        # The file may have shrunk between the two calls: the map is what is read.
        self.size = len(self._map)

    def bytes(self, offset: int, nbytes: int) -> bytes:
        """A copy of `nbytes` bytes at `offset`, both checked against the file."""
        self._check(offset, nbytes)
        return self._map[offset : offset + nbytes]

    def array(
        self,
        offset: int,
        shape: tuple[int, ...],
        dtype: np.dtype,
        strides: tuple[int, ...] | None = None,
    ) -> np.ndarray:
        """A read-only view of the bytes at `offset` as an array.

        Args:
            offset: first byte, from the start of the file.
            shape: shape of the array.
            dtype: its dtype; the bytes are little-endian.
            strides: non-negative steps in elements; those of C order by default.

        Returns:
            A view, or a copy where `offset` is not aligned for `dtype` (no program
            that writes checkpoints leaves weights so, but the formats permit it).

        Raises:
            CheckpointError: the array would run past the file.
        """
        self._check(offset, span_bytes(shape, dtype, strides))
        steps = None if strides is None else [dtype.itemsize * s for s in strides]
        view = np.ndarray(shape, dtype, buffer=self._map, offset=offset, strides=steps)
        if view.flags.aligned:
            return view
        copy = view.copy()
        copy.flags.writeable = False
        return copy

    def prefetch(self, offset: int, nbytes: int) -> None:
        """Asks the kernel to read these bytes ahead; returns at once."""
        self._advise("MADV_WILLNEED", offset, nbytes)

    def release(self, offset: int, nbytes: int) -> None:
        """Drops the pages that hold these bytes from the process's memory."""
        self._advise("MADV_DONTNEED", offset, nbytes)

    def _check(self, offset: int, nbytes: int) -> None:
        if offset < 0 or nbytes < 0 or offset + nbytes > self.size:
            raise CheckpointError(
                self.path,
                [
                    f"bytes {offset} to {offset + nbytes} were asked for, but the "
                    f"file has {self.size}"
                ],
            )

    def _advise(self, advice: str, offset: int, nbytes: int) -> None:
        self._check(offset, nbytes)
        # Absent on platforms without madvise, where both are only hints anyway.
        option = getattr(mmap, advice, None)
        if option is not None and nbytes:
            start = offset - offset % mmap.PAGESIZE
            self._map.madvise(option, start, offset + nbytes - start)


def span_bytes(
    shape: tuple[int, ...], dtype: np.dtype, strides: tuple[int, ...] | None
) -> int:
    """Bytes from an array's first element to the end of its last one."""
    if 0 in shape:
        return 0
    if strides is None:
        return math.prod(shape) * dtype.itemsize
    last = sum((dim - 1) * step for dim, step in zip(shape, strides, strict=True))
    return (last + 1) * dtype.itemsize
