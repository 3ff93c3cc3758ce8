"""A checkpoint's tensors under the names of published checkpoints."""

from collections.abc import Iterator, Mapping

import numpy as np

from geomjax.checkpoints.sources import CheckpointSource
from geomjax.typing import TensorSpec


def published_name(name: str, prefixes: Mapping[str, str]) -> str:
    """A tensor's name with the first prefix that it has replaced.

    >>> published_name("model.language_model.norm.weight", {"model.language_": ""})
    'model.norm.weight'
    >>> published_name("lm_head.weight", {"model.language_": ""})
    'lm_head.weight'
    """
    for prefix, replacement in prefixes.items():
        if name.startswith(prefix):
            return replacement + name.removeprefix(prefix)
    return name


class RenamedSource:
    """A `CheckpointSource` whose names have their prefixes replaced.

    Args:
      source: The tensors as they are stored.
      prefixes: Prefix of a stored name -> what published names have instead.

    Attributes:
      repeated: A line for each tensor that is stored under two names.
    """

    left_out: Mapping[str, str]
    tie_word_embeddings: bool | None

    def __init__(self, source: CheckpointSource, prefixes: Mapping[str, str]):
        self._source = source
        self._stored: dict[str, str] = {}
        self.repeated: list[str] = []
        for stored in source.keys():
            name = published_name(stored, prefixes)
            if name in self._stored:
                self.repeated.append(
                    f"{name} is there twice, as {self._stored[name]} and as {stored}"
                )
            self._stored[name] = stored
        self.left_out = {
            published_name(name, prefixes): why for name, why in source.left_out.items()
        }
        self.tie_word_embeddings = source.tie_word_embeddings

    def keys(self) -> Iterator[str]:
        """The published names."""
        return iter(self._stored)

    def spec(self, key: str) -> TensorSpec:
        """Shape and dtype of a tensor, without its data."""
        return self._source.spec(self._stored[key])

    def read(self, key: str) -> np.ndarray:
        """A tensor, in its storage dtype."""
        return self._source.read(self._stored[key])

    def prefetch(self, key: str) -> None:
        """As the source's."""
        self._source.prefetch(self._stored[key])

    def release(self, key: str) -> None:
        """As the source's."""
        self._source.release(self._stored[key])
