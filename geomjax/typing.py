"""Types shared by every part of the package."""

from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import numpy as np
from jaxtyping import Array, Float, Int

from geomjax.meshes import Placement

Params = dict[str, Any]
"""A nested dict of arrays in checkpoint orientation, blocks stacked as `[L, ...]`."""

Path = tuple[str, ...]
"""Keys from the root of a `Params` to one leaf."""


class TensorSpec(NamedTuple):
    """Shape and storage dtype of a tensor that has not been read."""

    shape: tuple[int, ...]
    dtype: np.dtype


@runtime_checkable
class TensorSource(Protocol):
    """Named tensors that are read one at a time, in checkpoint orientation."""

    def keys(self) -> Iterator[str]:
        """Iterates over the tensor names."""

    def spec(self, key: str) -> TensorSpec:
        """Shape and dtype of `key`, without reading its data."""

    def read(self, key: str) -> np.ndarray:
        """The tensor `key`, in its storage dtype (bfloat16 through ml_dtypes)."""


@runtime_checkable
class LanguageModel(Protocol):
    """What objectives, rollouts and training need to know of a model.

    `positions` are the tokens' places in their own sequences. `segment_ids` are 0 for
    padding, and a token attends to earlier positions of its own segment alone. Hidden
    states are those after the final norm.
    """

    @property
    def dtype(self) -> Any:
        """Compute dtype; parameters are cast to it."""

    @property
    def precision(self) -> jax.lax.Precision:
        """Precision of every matrix product."""

    @property
    def placement(self) -> Placement:
        """Where its arrays lie."""

    @property
    def vocab_size(self) -> int:
        """Number of token ids, which are the first rows of `unembedding`."""

    def unembedding(self, params: Params) -> Float[Array, "V D"]:
        """The matrix that maps hidden states to logits; longer on a mesh at most."""

    def apply(
        self,
        params: Params,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"],
        last: int | None = None,
    ) -> Float[Array, "B t D"]:
        """Hidden states of whole sequences, or of their last `last` slots alone."""

    def prefill(
        self,
        params: Params,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"],
        cache_length: int,
        last: int | None = None,
    ) -> tuple[Float[Array, "B t D"], Any]:
        """As `apply`, with a cache of `cache_length` slots that holds the tokens."""

    def decode(
        self,
        params: Params,
        token: Int[Array, " B"],
        position: Int[Array, " B"],
        segment_id: Int[Array, " B"],
        cache: Any,
    ) -> tuple[Float[Array, "B D"], Any]:
        """Appends one token a row to the cache; returns its hidden state."""

    def split_layers(self, params: Params) -> Params:
        """Parameters with the blocks unstacked, as `prefill` and `decode` take them."""


@runtime_checkable
class SeeingModel(LanguageModel, Protocol):
    """A model of text that becomes one of prompts with images once it has these."""

    def with_images(self, images: Any) -> LanguageModel:
        """The model of these prompts; `images` is a pytree with the rows first."""

    def later_offsets(self, images: Any) -> Int[Array | np.ndarray, " B"]:
        """What the images of each row add to the positions of tokens after its prompt.

        The model itself decodes these, as text at its place plus this; 0 or less.
        """


def prompted(model: LanguageModel, images: Any | None) -> LanguageModel:
    """The model of a batch: itself, or with the images of the batch.

    Raises:
      ValueError: There are images, and the model reads text alone.
    """
    if images is None:
        return model
    if not isinstance(model, SeeingModel):
        raise ValueError(f"prompts with images, but {type(model).__name__} sees none")
    return model.with_images(images)


PRNGKey = jax.Array
