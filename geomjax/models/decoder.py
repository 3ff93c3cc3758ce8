"""The decoder of every family: blocks over a residual stream, with and without cache.

Flax NNX defines the modules; parameters are plain nested dicts outside. Weights are
kept as checkpoints store them, `[out, in]`, and blocks are stacked, `[L, out, in]`.
Axes: B batch, T query time, S cache time, D model, N query heads, K key/value heads,
H head size, F feed-forward, V vocabulary, L layers.
"""

import dataclasses
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from geomjax.meshes import ONE_DEVICE, Placement
from geomjax.models.attention import Attention, dot_product_attention
from geomjax.models.blocks import Block
from geomjax.models.cache import (
    Cache,
    LayerCache,
    append_token,
    attend_cached,
    cache_layout,
    write_cache,
)
from geomjax.models.config import DecoderConfig
from geomjax.models.hf import roles
from geomjax.models.layers import Numerics, cut, rms_norm, scale
from geomjax.models.masks import Visible, visible_by_layer
from geomjax.models.rope import RopeScaling
from geomjax.models.rotation import Angles, rotary_angles
from geomjax.models.shapes import check_shapes
from geomjax.optim.roles import path_of
from geomjax.typing import Params, PRNGKey

UNROLLED_LAYERS = 8
"""Deepest stack that a forward pass unrolls.

On a CPU the backward pass of a scan copies every residual into and out of its stack: at
2 layers of width 128 it takes twice the time of the unrolled one. In deep models one
compiled block is worth more.
"""


def _unstack(layers: Params, count: int) -> list[Params]:
    """One tree a layer; by a split, whose gradient is one concatenation a leaf."""
    leaves, tree = jax.tree.flatten(layers)
    columns = [[x[0] for x in jax.lax.split(leaf, (1,) * count)] for leaf in leaves]
    return [jax.tree.unflatten(tree, row) for row in zip(*columns, strict=True)]


@dataclasses.dataclass(frozen=True)
class Decoder:
    """A decoder as pure functions of its parameters; implements `LanguageModel`.

    Attributes:
      config: Shape and constants.
      vocab_size: Rows of the unembedding in use: the tokenizer's size, so that the
        padding rows of a stored embedding enter no softmax.
      dtype: Compute dtype; parameters are cast to it at each use.
      precision: Matmul precision. HIGHEST keeps float32 products in float32 on
        backends that would otherwise round their inputs.
      attention: The attention function, injected.
      remat: Whether the backward pass recomputes each block instead of storing its
        activations.
      placement: Where parameters, activations and cache lie.
    """

    config: DecoderConfig
    vocab_size: int
    dtype: Any = jnp.float32
    precision: jax.lax.Precision = jax.lax.Precision.HIGHEST
    attention: Attention = dot_product_attention
    remat: bool = False
    placement: Placement = ONE_DEVICE

    def __post_init__(self) -> None:
        if not 0 < self.vocab_size <= self.config.vocab_size:
            raise ValueError(
                f"the tokenizer has {self.vocab_size} tokens but the embedding has "
                f"{self.config.vocab_size} rows; a model needs a row for each token"
            )

    @cached_property
    def _block(self) -> tuple[nnx.GraphDef, Params]:
        """Graph and shapes of one block, made without allocating an array."""
        numerics = Numerics(self.dtype, self.precision, self.placement)
        block = nnx.eval_shape(lambda: Block(self.config, numerics))
        graph, state = nnx.split(block)
        return graph, nnx.to_pure_dict(state)

    @cached_property
    def shapes(self) -> Params:
        """The parameters as `jax.ShapeDtypeStruct`, float32."""
        config = self.config
        embedding = (config.vocab_size, config.hidden_size)

        def array(*shape: int) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(shape, jnp.float32)

        shapes = {
            "embed_tokens": {"weight": array(*embedding)},
            "layers": jax.tree.map(
                lambda leaf: array(config.num_layers, *leaf.shape), self._block[1]
            ),
            "norm": {"weight": array(config.hidden_size)},
        }
        if not config.tie_word_embeddings:
            shapes["lm_head"] = {"weight": array(*embedding)}
        return shapes

    def init(self, key: PRNGKey) -> Params:
        """Random float32 parameters: N(0, 1/in) matrices, N(0, 1/D) embeddings.

        Norms are ones and biases zeros. A standard deviation of 1/sqrt(fan-in) is our
        choice: at small widths the customary 0.02 does not train.
        """
        leaves, tree = jax.tree.flatten_with_path(self.shapes)
        keys = jax.random.split(key, len(leaves))

        def leaf(key, path, shape):
            if path[-2].key.endswith("norm"):
                return jnp.ones(shape.shape, jnp.float32)
            if path[-1].key == "bias":
                return jnp.zeros(shape.shape, jnp.float32)
            scale = shape.shape[-1] ** -0.5
            return scale * jax.random.normal(key, shape.shape, jnp.float32)

        made = [leaf(k, path, x) for k, (path, x) in zip(keys, leaves, strict=True)]
        return jax.tree.unflatten(tree, made)

    def unembedding(self, params: Params) -> Float[Array, "V D"]:
        """The output head, cut to the tokenizer's rows.

        On a mesh it has all its rows: to cut what is split would move it.
        """
        tied = self.config.tie_word_embeddings
        head = params["embed_tokens" if tied else "lm_head"]["weight"]
        return head[: self.vocab_size] if self.placement.mesh is None else head

    def split_layers(self, params: Params) -> Params:
        """The parameters with `layers` as a tuple of one unstacked dict a layer.

        On a mesh they are laid out for decoding first, whole or tensor-parallel, so
        that no weight is gathered on every token.

        Matrices are turned to `[in, out]` here, for `prefill` and `decode` alone: with
        the few rows of a decoding step, XLA's CPU backend multiplies by them a fifth
        faster than by `[out, in]`.
        """
        params = self._for_decoding(params)
        layers = tuple(
            self._turn(jax.tree.map(lambda leaf: leaf[i], params["layers"]))  # noqa: B023
            for i in range(self.config.num_layers)
        )
        return params | {"layers": layers}

    def embed(self, params: Params, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """Embeddings of tokens as the first block reads them, in the compute dtype."""
        embedded = params["embed_tokens"]["weight"].astype(self.dtype)[tokens]
        return scale(embedded, self.config.embedding_scale)

    @property
    def frequencies(self) -> Float[Array, " h"]:
        """Rotary frequencies, float32, in radians a token."""
        config = self.config
        exact = self._scaling.frequencies(config.rope_theta, config.rotary_dim)
        return jnp.asarray(exact.astype(np.float32))

    def apply(
        self,
        params: Params,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"],
        last: int | None = None,
    ) -> Float[Array, "B t D"]:
        """Hidden states after the final norm, in the compute dtype.

        The blocks run as one scan over the stacked parameters, unrolled in shallow
        models; there the last block computes what the slots asked for need. Parameters
        that are not trained may be split once, by `split_layers`: the same numbers then
        take no copy of each layer's weights out of the stack, which at 8 layers of
        width 512 and 1,024 tokens is 9 % of the time on a CPU.

        Args:
          params: Parameters as `shapes` describes them, or as `split_layers` makes
            them.
          tokens: Token ids.
          positions: Place of each token in its own sequence, from 0.
          segment_ids: 0 for padding; a token sees its own segment alone.
          last: How many slots at the end are wanted; None for all.

        Returns:
          Hidden states; those of padding mean nothing.

        Raises:
          ValueError: A parameter is missing, unknown or of another shape, or the
            sequences are longer than the rotary frequencies are exact for.
        """
        self._check(params)
        # Split by width, as the table is, each device looks up its part of every token.
        x = self.placement.constrain(self.embed(params, tokens), "rows", None, "embed")
        angles = self._angles(positions)
        return self.apply_embedded(params, x, angles, positions, segment_ids, last)

    def apply_embedded(
        self,
        params: Params,
        x: Float[Array, "B T D"],
        angles: Angles,
        positions: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"],
        last: int | None = None,
    ) -> Float[Array, "B t D"]:
        """As `apply`, from embeddings and rotary angles made elsewhere.

        Args:
          params: As for `apply`.
          x: What the first block reads; `embed` makes it from tokens.
          angles: Cosines and sines of the rotation of each slot.
          positions: Decide which slots a slot sees.
          segment_ids: As for `apply`.
          last: As for `apply`.

        Returns:
          As `apply`.
        """
        self._check(params)
        self._check_length(x.shape[1])
        graph, _ = self._block
        seen = visible_by_layer(self.config, positions, segment_ids)

        def attend_with(visible):
            return lambda q, k, v: (self._attend(q, k, v, visible), None)

        if isinstance(params["layers"], tuple):
            x, _ = self._unroll(params, x, angles, map(attend_with, seen), last)
            return self._final_norm(params, x)

        def block(x, layer, visible, last):
            attend = attend_with(visible)
            x = nnx.merge(graph, layer)(x, angles, attend, last)[0]
            return self._stream(x)

        x = self._stream(x)
        shallow = self.config.num_layers <= UNROLLED_LAYERS
        if self.remat:
            # A loop of its own keeps XLA from merging the two computations.
            block = jax.checkpoint(block, prevent_cse=shallow, static_argnums=3)
        if shallow:
            *layers, final = _unstack(params["layers"], self.config.num_layers)
            for layer, visible in zip(layers, seen, strict=False):
                x = block(x, layer, visible, None)
            x = block(x, final, seen[-1], last)
        else:
            x = cut(self._scan(block, x, params["layers"], seen), last)
        return self._final_norm(params, x)

    def prefill(
        self,
        params: Params,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"],
        cache_length: int,
        last: int | None = None,
    ) -> tuple[Float[Array, "B t D"], Cache]:
        """As `apply`, and keeps the keys and values in a cache of `cache_length` slots.

        Prefill and decoding run the blocks unrolled: a scan would copy each layer's
        weights out of the stack on every token. `params["layers"]` is therefore a
        tuple with one dict a layer, made once by `split_layers`.

        Raises:
          ValueError: A parameter is missing, unknown or of another shape, the prompt
            does not fit the cache, or the cache is longer than the rotary frequencies
            are exact for.
        """
        check_shapes(params, self._split_shapes)
        x, angles = self.embed(params, tokens), self._angles(positions)
        return self.prefill_embedded(
            params, x, angles, positions, segment_ids, cache_length, last
        )

    def prefill_embedded(
        self,
        params: Params,
        x: Float[Array, "B T D"],
        angles: Angles,
        positions: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"],
        cache_length: int,
        last: int | None = None,
    ) -> tuple[Float[Array, "B t D"], Cache]:
        """As `prefill`, from embeddings and angles as `apply_embedded` takes them."""
        check_shapes(params, self._split_shapes)
        length = x.shape[1]
        if cache_length < length:
            raise ValueError(f"{length} tokens do not fit {cache_length} cache slots")
        self._check_length(cache_length)

        def attend_with(visible):
            def attend(query, key, value):
                kept = cache_layout(key, value, cache_length)
                return self._attend(query, key, value, visible), self._cached(kept)

            return attend

        seen = visible_by_layer(self.config, positions, segment_ids)
        attends = [attend_with(visible) for visible in seen]
        x, kept = self._unroll(params, x, angles, attends, last)
        free = ((0, 0), (0, cache_length - length))
        cache = Cache(
            layers=kept,
            positions=jnp.pad(positions, free),
            segment_ids=jnp.pad(segment_ids, free),
            length=jnp.int32(length),
            angles=self._angles(jnp.arange(cache_length)[None]),
        )
        return self._final_norm(params, x), cache

    def decode(
        self,
        params: Params,
        token: Int[Array, " B"],
        position: Int[Array, " B"],
        segment_id: Int[Array, " B"],
        cache: Cache,
    ) -> tuple[Float[Array, "B D"], Cache]:
        """Appends one token a row to the cache and returns its hidden state.

        Args:
          params: As for `prefill`.
          token: The token of each row.
          position: Its place in its own sequence.
          segment_id: Its segment; 0 for a row that has ended.
          cache: With at least one free slot.

        Returns:
          Hidden states after the final norm, and the cache with the token appended.
        """
        check_shapes(params, self._split_shapes)
        x = self.embed(params, token[:, None])
        angles = cache.angles_at(position)
        cache = append_token(cache, position, segment_id)
        seen = visible_by_layer(
            self.config,
            position[:, None],
            segment_id[:, None],
            (cache.positions, cache.segment_ids),
        )

        def attend_to(layer, visible):
            def attend(query, key, value):
                kept = write_cache(layer, key, value, cache.length - 1)
                kept = self._cached(kept)
                return attend_cached(query, kept, visible.mask, self.precision), kept

            return attend

        attends = list(map(attend_to, cache.layers, seen))
        x, kept = self._unroll(params, x, angles, attends)
        return self._final_norm(params, x)[:, 0], cache._replace(layers=kept)

    @property
    def _scaling(self) -> RopeScaling:
        return self.config.rope_scaling or RopeScaling()

    def _angles(self, positions):
        factor = self._scaling.attention_factor
        return rotary_angles(positions, self.frequencies, factor)

    def _check(self, params: Params) -> None:
        split = isinstance(params.get("layers"), tuple)
        check_shapes(params, self._split_shapes if split else self.shapes)

    def _check_length(self, length: int) -> None:
        longest = self._scaling.exact_length
        if longest is not None and length > longest:
            raise ValueError(
                f"sequences of {length} tokens: beyond {longest} the rotary "
                f"frequencies of {type(self._scaling).__name__} depend on each "
                "sequence's length, which is not computed; take shorter sequences"
            )

    def _stream(self, x):
        """The residual stream: each device has whole tokens of its own sequences."""
        return self.placement.constrain(x, "batch", None, None)

    def _cached(self, layer):
        return LayerCache(
            *(
                self.placement.constrain(x, "batch", "kv_heads", None, None)
                for x in layer
            )
        )

    def _for_decoding(self, params):
        table = roles(self.config)

        def place(keys, leaf):
            axes = table[path_of(keys)].logical_axes
            return self.placement.decoding.constrain(leaf, *axes)

        return jax.tree_util.tree_map_with_path(place, params)

    def _attend(self, query, key, value, visible):
        visible = visible.last(query.shape[1])
        place = self.placement.constrain
        query = place(query, "batch", None, "heads", None)
        key, value = (place(x, "batch", None, "kv_heads", None) for x in (key, value))
        return self.attention(query, key, value, visible, self.precision)

    def _scan(self, block, x, layers, seen):
        """The blocks one after another, as a loop over the stacked parameters."""
        kinds = list({id(visible): visible for visible in seen}.values())
        if len(kinds) == 1:
            body = lambda x, layer: (block(x, layer, kinds[0], None), None)  # noqa: E731
            return jax.lax.scan(body, x, layers)[0]
        stacked = jnp.stack([kind.mask for kind in kinds])
        which = jnp.asarray([[m is k for k in kinds].index(True) for m in seen])

        def one(x, layer):
            params, kind = layer
            return block(x, params, Visible(stacked[kind]), None), None

        return jax.lax.scan(one, x, (layers, which))[0]

    def _turn(self, layer):
        """One layer with its matrices `[out, in]` as `[in, out]`, and back again."""
        table = roles(self.config)

        def turn(keys, leaf):
            matrix = table[("layers", *path_of(keys))].kind == "matrix"
            return jnp.swapaxes(leaf, -1, -2) if matrix else leaf

        return jax.tree_util.tree_map_with_path(turn, layer)

    def _unroll(self, params, x, angles, attends, last=None):
        graph, _ = self._block
        caches: list[LayerCache] = []
        for layer, attend in zip(params["layers"], attends, strict=True):
            block = nnx.merge(graph, self._turn(layer))
            final = len(caches) + 1 == self.config.num_layers
            x, kept = block(self._stream(x), angles, attend, last if final else None)
            caches.append(kept)
        return x, tuple(caches)

    def _final_norm(self, params, x):
        x = rms_norm(x, params["norm"]["weight"], self.config.rms_norm_eps)
        divisor = self.config.logit_divisor
        return x if divisor == 1 else x / jnp.asarray(divisor, x.dtype)

    @property
    def _split_shapes(self) -> Params:
        block = jax.eval_shape(self._turn, self._block[1])
        return self.shapes | {"layers": (block,) * self.config.num_layers}
