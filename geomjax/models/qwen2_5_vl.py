"""Qwen2.5-VL: a decoder that reads images where its prompt has placeholders.

`Qwen25VL` holds the two networks. `Qwen25VL.with_images` gives a `LanguageModel` of
prompts with their images, which objectives and rollouts use like any other: tokens and
places go in, hidden states come out. Images belong to places of a prompt (counted
without padding), so the same `Images` serve the prompt padded on the left, its rollout,
and the training batch made of it.

Axes: B batch, T query time, P prompt places, S slots of patches, C values of a patch,
M tokens of images, D width, V vocabulary.
"""

import dataclasses
from collections.abc import Sequence
from functools import cached_property
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from geomjax.data.patches import ImagePatches
from geomjax.meshes import Placement
from geomjax.models.cache import Cache
from geomjax.models.decoder import Decoder
from geomjax.models.mrope import mrope_angles, sequence_positions
from geomjax.models.qwen2_5_vl_config import Qwen25VLConfig
from geomjax.models.rotation import rotary_angles
from geomjax.models.vision import VisionTower
from geomjax.models.vision_layout import arrange
from geomjax.typing import Params, PRNGKey


class Images(NamedTuple):
    """The images of a batch of prompts, one prompt a row; a pytree of arrays.

    Every array has the batch first, so that rows can be taken, repeated and split over
    devices as those of the tokens are.

    Attributes:
      patches: `[B, S, C]` float32, zero in empty slots.
      image_ids: `[B, S]` int32, 0 for an empty slot.
      coordinates: `[B, S, 2]` int32, row and column of each patch in its image.
      features: `[B, P]` int32, which of the row's M features stands at each place of
        the prompt; -1 for text.
      positions: `[B, P, 3]` int32, time, row and column of each place. Beyond the end
        of a shorter prompt they go on as those of text.
      deltas: `[B]` int32, what the position of a place after P adds to it; 0 or less.
    """

    patches: Float[Array, "B S C"]
    image_ids: Int[Array, "B S"]
    coordinates: Int[Array, "B S 2"]
    features: Int[Array, "B P"]
    positions: Int[Array, "B P 3"]
    deltas: Int[Array, " B"]


def place_images(
    config: Qwen25VLConfig,
    prompts: Sequence[Int[np.ndarray, "_"]],
    images: Sequence[Sequence[ImagePatches]],
    length: int | None = None,
) -> Images:
    """Ties the images of each prompt to its placeholders, on the host.

    Args:
      config: The model's configuration.
      prompts: Token ids without padding, placeholders repeated for each token of their
        images (`geomjax.data.placeholders.expand_placeholders`).
      images: The images of each prompt, in order; none is allowed.
      length: P, at least that of the longest prompt, which is the default. Batches that
        share a compiled program should be given one.

    Returns:
      NumPy arrays. S is the next size of `vision_layout.bucket`, so that few shapes are
      compiled.

    Raises:
      ValueError: Lists every prompt whose placeholders are not those of its images, or
        every image that does not fit the vision tower.
    """
    if len(prompts) != len(images):
        raise ValueError(
            f"images for {len(images)} prompts, but there are {len(prompts)} prompts"
        )
    vision = config.vision
    rows, cells = arrange(images, vision.window, vision.patch_values)
    longest = max((len(prompt) for prompt in prompts), default=0)
    length = longest if length is None else length
    if length < longest:
        raise ValueError(
            f"length is {length}, but the longest prompt has {longest} tokens"
        )
    features = np.full((len(prompts), length), -1, np.int32)
    positions = np.zeros((len(prompts), length, 3), np.int32)
    deltas = np.zeros(len(prompts), np.int32)
    problems = []
    for b, prompt in enumerate(prompts):
        try:
            places = sequence_positions(
                prompt,
                [image.grid for image in images[b]],
                image_token=config.image_token,
                merge_size=vision.merge_size,
            )
        except ValueError as error:
            problems.append(f"prompt {b}: {error}")
            continue
        deltas[b] = places.max(initial=-1) + 1 - len(prompt)
        positions[b] = (np.arange(length) + deltas[b])[:, None]
        positions[b, : len(prompt)] = places.T
        at = np.flatnonzero(prompt == config.image_token)
        if len(at):
            features[b, at] = np.concatenate(cells[b])
    if problems:
        raise ValueError("prompts and images do not match:\n" + "\n".join(problems))
    arrays: tuple[Any, ...] = (*rows, features, positions, deltas)
    return Images(*arrays)


@dataclasses.dataclass(frozen=True)
class Qwen25VL:
    """The two networks; by itself a `LanguageModel` of prompts without images.

    Attributes:
      config: The configuration.
      decoder: The language model, of `config.text`.
      vision: The vision tower, of `config.vision`.
    """

    config: Qwen25VLConfig
    decoder: Decoder
    vision: VisionTower

    @cached_property
    def shapes(self) -> Params:
        """The decoder's parameters, and those of the tower under `visual`."""
        return self.decoder.shapes | {"visual": self.vision.shapes}

    def init(self, key: PRNGKey) -> Params:
        """Random float32 parameters, as `Decoder.init` and `VisionTower.init`."""
        text, vision = jax.random.split(key)
        return self.decoder.init(text) | {"visual": self.vision.init(vision)}

    def with_images(self, images: Images) -> "PromptedQwen25VL":
        """A `LanguageModel` of these prompts; made inside the function that is jitted.

        Inside, so that the images are arguments of the compiled program rather than
        constants in it.
        """
        return PromptedQwen25VL(self, images)

    def later_offsets(self, images: Images) -> Int[Array | np.ndarray, " B"]:
        """What the images of each row add to the places of tokens after its prompt."""
        return images.deltas

    @property
    def dtype(self) -> Any:
        """Compute dtype."""
        return self.decoder.dtype

    @property
    def precision(self) -> jax.lax.Precision:
        """Precision of every matrix product."""
        return self.decoder.precision

    @property
    def placement(self) -> Placement:
        """Where the decoder's arrays lie."""
        return self.decoder.placement

    @property
    def vocab_size(self) -> int:
        """Rows of the unembedding in use."""
        return self.decoder.vocab_size

    def unembedding(self, params: Params) -> Float[Array, "V D"]:
        """The output head, cut to the tokenizer's rows."""
        return self.decoder.unembedding(_text(params))

    def split_layers(self, params: Params) -> Params:
        """The decoder's blocks unstacked; the tower, which runs once, as it is."""
        split = self.decoder.split_layers(_text(params))
        return split | {"visual": params["visual"]}

    def apply(
        self,
        params: Params,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"],
        last: int | None = None,
    ) -> Float[Array, "B t D"]:
        """Hidden states of text, as `Decoder.apply`."""
        return self.decoder.apply(_text(params), tokens, positions, segment_ids, last)

    def prefill(
        self,
        params: Params,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"],
        cache_length: int,
        last: int | None = None,
    ) -> tuple[Float[Array, "B t D"], Cache]:
        """As `apply`, with a cache, as `Decoder.prefill`."""
        return self.decoder.prefill(
            _text(params), tokens, positions, segment_ids, cache_length, last
        )

    def decode(
        self,
        params: Params,
        token: Int[Array, " B"],
        position: Int[Array, " B"],
        segment_id: Int[Array, " B"],
        cache: Cache,
    ) -> tuple[Float[Array, "B D"], Cache]:
        """Appends one token of text a row, as `Decoder.decode`."""
        return self.decoder.decode(_text(params), token, position, segment_id, cache)


@dataclasses.dataclass(frozen=True)
class PromptedQwen25VL:
    """Qwen2.5-VL with the images of a batch; implements `LanguageModel`.

    Each row of tokens is one prompt, possibly with a completion; `positions` are places
    in it, counted without padding. A placeholder that is sampled into a completion is
    a token like any other.

    Attributes:
      model: The networks.
      images: The images of the rows, in their order.
    """

    model: Qwen25VL
    images: Images

    @property
    def dtype(self) -> Any:
        """Compute dtype."""
        return self.model.dtype

    @property
    def precision(self) -> jax.lax.Precision:
        """Precision of every matrix product."""
        return self.model.precision

    @property
    def placement(self) -> Placement:
        """Where the decoder's arrays lie."""
        return self.model.placement

    @property
    def vocab_size(self) -> int:
        """Rows of the unembedding in use."""
        return self.model.vocab_size

    def unembedding(self, params: Params) -> Float[Array, "V D"]:
        """As `Qwen25VL.unembedding`."""
        return self.model.unembedding(params)

    def split_layers(self, params: Params) -> Params:
        """As `Qwen25VL.split_layers`."""
        return self.model.split_layers(params)

    def apply(
        self,
        params: Params,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"],
        last: int | None = None,
    ) -> Float[Array, "B t D"]:
        """Hidden states of whole sequences, as `Decoder.apply`."""
        x = self._embed(params, tokens, positions)
        angles = self._angles(self._rope_positions(positions))
        return self.model.decoder.apply_embedded(
            _text(params), x, angles, positions, segment_ids, last
        )

    def prefill(
        self,
        params: Params,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"],
        cache_length: int,
        last: int | None = None,
    ) -> tuple[Float[Array, "B t D"], Cache]:
        """As `apply`, with a cache, as `Decoder.prefill`."""
        x = self._embed(params, tokens, positions)
        rope = self._rope_positions(positions)
        hidden, cache = self.model.decoder.prefill_embedded(
            _text(params),
            x,
            self._angles(rope),
            positions,
            segment_ids,
            cache_length,
            last,
        )
        # From here on tokens are text, with one position instead of three; a prompt's
        # largest of three is below every later one, which is all that a mask asks.
        later = cache.positions[:, tokens.shape[1] :]
        seen = jnp.concatenate([rope.max(axis=-1), later], axis=1)
        return hidden, cache._replace(positions=seen)

    def decode(
        self,
        params: Params,
        token: Int[Array, " B"],
        position: Int[Array, " B"],
        segment_id: Int[Array, " B"],
        cache: Cache,
    ) -> tuple[Float[Array, "B D"], Cache]:
        """Appends one token of text a row, as `Decoder.decode`."""
        rotary = position + self.images.deltas
        return self.model.decoder.decode(
            _text(params), token, rotary, segment_id, cache
        )

    def _embed(self, params, tokens, positions):
        """Embeddings of the tokens, with features of images at their places."""
        images = self.images
        embedded = self.model.decoder.embed(_text(params), tokens)
        features = self.model.vision.apply(
            params["visual"], images.patches, images.image_ids, images.coordinates
        )
        which = _look_up(images.features, positions, outside=-1)
        chosen = jnp.take_along_axis(
            features, jnp.maximum(which, 0)[:, :, None], axis=1
        )
        image = jnp.broadcast_to((which >= 0)[:, :, None], embedded.shape)
        return jnp.where(image, chosen, embedded)

    def _rope_positions(self, positions):
        """Time, row and column `[B, T, 3]` of the tokens at these places."""
        images = self.images
        axes = [
            _look_up(images.positions[:, :, i], positions, outside=0) for i in range(3)
        ]
        text = (positions + images.deltas[:, None])[:, :, None]
        prompt = (positions < images.positions.shape[1])[:, :, None]
        known = jnp.stack(axes, axis=-1)
        shape = known.shape
        return jnp.where(
            jnp.broadcast_to(prompt, shape), known, jnp.broadcast_to(text, shape)
        )

    def _angles(self, rope_positions):
        batch, length, _ = rope_positions.shape
        by_axis = jnp.moveaxis(rope_positions, -1, 0).reshape(3 * batch, length)
        text = self.model.config.text
        factor = (
            1.0 if text.rope_scaling is None else text.rope_scaling.attention_factor
        )
        cos, sin = rotary_angles(by_axis, self.model.decoder.frequencies, factor)
        shape = (3, batch, *cos.shape[1:])
        return mrope_angles(
            (cos.reshape(shape), sin.reshape(shape)), self.model.config.mrope_sections
        )


def _text(params: Params) -> Params:
    return {name: part for name, part in params.items() if name != "visual"}


def _look_up(table, places, *, outside: int):
    """`table[b, places[b, t]]`, or `outside` for places beyond the table."""
    return jax.vmap(lambda row, at: row.at[at].get(mode="fill", fill_value=outside))(
        table, places
    )
