"""Images of a dataset on disk, so that the memory holds those of a batch alone."""

import hashlib
import os
import tempfile
import weakref
from typing import NamedTuple


class _File:
    """A temporary file without a name, closed when nobody holds it."""

    def __init__(self) -> None:
        self.folder = tempfile.gettempdir()
        self.descriptor, path = tempfile.mkstemp(
            prefix="geomjax-images-", dir=self.folder
        )
        os.unlink(path)
        weakref.finalize(self, os.close, self.descriptor)


class StoredImage(NamedTuple):
    """An image that is read when it is asked for.

    Attributes:
        file: the file that holds it.
        offset: where it begins there, in bytes.
        size: its size in bytes.
        digest: a hash of its bytes.
    """

    file: _File
    offset: int
    size: int
    digest: str

    def read(self) -> bytes:
        """The bytes of the image file; may be called in several threads."""
        return os.pread(self.file.descriptor, self.size, self.offset)


class ImageStore:
    """A temporary file of images, which goes when nobody holds one of them."""

    def __init__(self) -> None:
        self._file: _File | None = None
        self._end = 0

    def keep(self, data: bytes) -> StoredImage:
        """Writes an image down.

        Raises:
            OSError: if it cannot be written; names the folder.
        """
        if self._file is None:
            self._file = _File()
        left = memoryview(data)
        try:
            while left:
                left = left[os.write(self._file.descriptor, left) :]
        except OSError as error:
            raise OSError(
                error.errno,
                f"{error.strerror}, where images are kept while they are in use; "
                "TMPDIR names another folder",
                self._file.folder,
            ) from error
        digest = hashlib.blake2b(data).hexdigest()
        stored = StoredImage(self._file, self._end, len(data), digest)
        self._end += len(data)
        return stored
