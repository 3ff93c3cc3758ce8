"""Types shared by every part of the package."""

from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np
from jaxtyping import Array, Float, Int

Params = dict[str, Any]
"""A nested dict of arrays in checkpoint orientation, blocks stacked as `[L, ...]`."""

Path = tuple[str, ...]
"""Keys from the root of a `Params` to one leaf."""


class TensorSpec(NamedTuple):
    """Shape and storage dtype of a tensor that has not been read."""

    shape: tuple[int, ...]
    dtype: np.dtype


class TensorSource(Protocol):
    """Named tensors that are read one at a time, in checkpoint orientation."""

    def keys(self) -> Iterator[str]:
        """Iterates over the tensor names."""

    def spec(self, key: str) -> TensorSpec:
        """Shape and dtype of `key`, without reading its data."""

    def read(self, key: str) -> np.ndarray:
        """The tensor `key`, in its storage dtype (bfloat16 through ml_dtypes)."""


class Apply(Protocol):
    """A decoder's forward pass, from tokens to the last hidden states.

    `positions` are the token's places in its own sequence; `segment_ids` are 0 for
    padding, and a token attends to earlier positions of its own segment alone. With a
    cache the new keys and values are appended to it, and it is returned.
    """

    def __call__(
        self,
        params: Params,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"],
        cache: Any = None,
    ) -> tuple[Float[Array, "B T D"], Any]:
        """Returns hidden states after the final norm, and the new cache."""


class LanguageModel(Protocol):
    """What objectives, rollouts and training need to know of a model."""

    apply: Apply

    @property
    def vocab_size(self) -> int:
        """Rows of the unembedding matrix that belong to the tokenizer."""

    def unembedding(self, params: Params) -> Float[Array, "V D"]:
        """The matrix that maps hidden states to logits, cut to `vocab_size` rows."""


PRNGKey = jax.Array
