"""The vision tower of Qwen2.5-VL: image patches to the tokens of a language model.

Flax NNX defines the modules; parameters are plain nested dicts outside, in checkpoint
orientation and with stacked blocks, as in `decoder`. The arrangement of patches is that
of `vision_layout`. Axes: B rows, S slots, W windows, N heads, H head size, D width, F
feed-forward, C values of a patch, L blocks, M tokens (S / merge_size^2), O out.
"""

import dataclasses
from collections.abc import Callable
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from geomjax.models.attention import Attention, dot_product_attention
from geomjax.models.layers import Linear, Numerics, RMSNorm
from geomjax.models.masks import Visible
from geomjax.models.rotation import rotate
from geomjax.models.shapes import check_shapes
from geomjax.models.vision_config import VisionConfig
from geomjax.typing import Params, PRNGKey

NORM_EPS = 1e-6
"""Fixed by the architecture; config.json does not name it."""


class PatchEmbed(nnx.Module):
    """A convolution whose stride is its kernel: one product with each patch.

    The weight keeps the layout of the checkpoint, `[D, channels, frames, side, side]`,
    in which the values of a patch are ordered too.
    """

    def __init__(self, config: VisionConfig, numerics: Numerics):
        side, frames = config.patch_size, config.temporal_patch_size
        shape = (config.hidden_size, config.in_channels, frames, side, side)
        self.proj = nnx.Dict(weight=nnx.Param(jnp.zeros(shape)))
        self.numerics = numerics

    def __call__(self, patches: Float[Array, "B S C"]) -> Float[Array, "B S D"]:
        """Embeds the patches in the compute dtype."""
        weight = self.proj["weight"][...].astype(self.numerics.dtype)
        return jnp.einsum(
            "bsc,dc->bsd",
            patches.astype(self.numerics.dtype),
            weight.reshape(weight.shape[0], -1),
            precision=self.numerics.precision,
        )


class VisionAttention(nnx.Module):
    """Multi-head attention from one fused projection, with 2-D rotary positions."""

    def __init__(self, config: VisionConfig, numerics: Numerics):
        self.qkv = Linear(
            3 * config.hidden_size, config.hidden_size, numerics, bias=True
        )
        self.proj = Linear(config.hidden_size, config.hidden_size, numerics, bias=True)
        self.num_heads = config.num_heads

    def __call__(self, x, angles, attend):
        """Returns the output `[B, S, D]`; `attend` decides what a patch sees."""
        heads = (*x.shape[:-1], 3, self.num_heads, x.shape[-1] // self.num_heads)
        query, key, value = jnp.moveaxis(self.qkv(x).reshape(heads), 2, 0)
        out = attend(rotate(query, angles), rotate(key, angles), value)
        return self.proj(out.reshape(x.shape))


class VisionMLP(nnx.Module):
    """`down(silu(gate x) * up x)`, each with a bias."""

    def __init__(self, config: VisionConfig, numerics: Numerics):
        f, d = config.intermediate_size, config.hidden_size
        self.gate_proj = Linear(f, d, numerics, bias=True)
        self.up_proj = Linear(f, d, numerics, bias=True)
        self.down_proj = Linear(d, f, numerics, bias=True)

    def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
        """Applies the gated feed-forward layer."""
        return self.down_proj(jax.nn.silu(self.gate_proj(x)) * self.up_proj(x))


class VisionBlock(nnx.Module):
    """Pre-norm attention and feed-forward, each with a residual."""

    def __init__(self, config: VisionConfig, numerics: Numerics):
        self.norm1 = RMSNorm(config.hidden_size, NORM_EPS)
        self.attn = VisionAttention(config, numerics)
        self.norm2 = RMSNorm(config.hidden_size, NORM_EPS)
        self.mlp = VisionMLP(config, numerics)

    def __call__(self, x, angles, attend):
        """Returns the new residual stream `[B, S, D]`."""
        x = x + self.attn(self.norm1(x), angles, attend)
        return x + self.mlp(self.norm2(x))


class PatchMerger(nnx.Module):
    """Two layers that turn the patches of a cell into one token.

    The checkpoint calls the layers `mlp.0` and `mlp.2`.
    """

    def __init__(self, config: VisionConfig, numerics: Numerics):
        width = config.hidden_size * config.merge_size**2
        self.ln_q = RMSNorm(config.hidden_size, NORM_EPS)
        self.up_proj = Linear(width, width, numerics, bias=True)
        self.down_proj = Linear(config.out_size, width, numerics, bias=True)

    def __call__(self, x: Float[Array, "B S D"]) -> Float[Array, "B M O"]:
        """Merges each `merge_size^2` adjacent slots."""
        width = self.up_proj.weight.shape[-1]
        cells = self.ln_q(x).reshape(x.shape[0], -1, width)
        return self.down_proj(jax.nn.gelu(self.up_proj(cells), approximate=False))


def axial_angles(
    coordinates: Int[Array, "B S 2"], head_dim: int, theta: float
) -> tuple[Float[Array, "B S 1 h"], Float[Array, "B S 1 h"]]:
    """Cosines and sines of 2-D rotary positions, float32, h = H / 2.

    The first half of the h angles are `row * theta^(-4i/H)`, the second half the same
    of the column, i = 0 ... H/4 - 1.
    """
    exponents = jnp.arange(0, head_dim, 4, dtype=jnp.float32) / head_dim
    frequencies = jnp.reciprocal(jnp.float32(theta) ** exponents)
    angles = jnp.einsum(
        "bsa,f->bsaf",
        coordinates.astype(jnp.float32),
        frequencies,
        precision=jax.lax.Precision.HIGHEST,
    )
    angles = angles.reshape(*coordinates.shape[:-1], 1, head_dim // 2)
    return jnp.cos(angles), jnp.sin(angles)


@dataclasses.dataclass(frozen=True)
class VisionTower:
    """The vision tower as pure functions of its parameters.

    Attributes:
      config: Shape and constants.
      dtype: Compute dtype; parameters are cast to it at each use.
      precision: Matmul precision.
      attention: The attention function, injected.
      remat: Whether the backward pass recomputes each block.
    """

    config: VisionConfig
    dtype: Any = jnp.float32
    precision: jax.lax.Precision = jax.lax.Precision.HIGHEST
    attention: Attention = dot_product_attention
    remat: bool = False

    @cached_property
    def shapes(self) -> Params:
        """The parameters as `jax.ShapeDtypeStruct`, float32."""
        depth = self.config.depth
        return {
            "patch_embed": self._parts[PatchEmbed][1],
            "blocks": jax.tree.map(
                lambda leaf: jax.ShapeDtypeStruct((depth, *leaf.shape), leaf.dtype),
                self._parts[VisionBlock][1],
            ),
            "merger": self._parts[PatchMerger][1],
        }

    def init(self, key: PRNGKey) -> Params:
        """Random float32 parameters: N(0, 1/in) matrices, zero biases, unit norms."""
        leaves, tree = jax.tree.flatten_with_path(self.shapes)
        keys = jax.random.split(key, len(leaves))

        def leaf(key, path, shape):
            module, name = path[-2].key, path[-1].key
            if module in ("norm1", "norm2", "ln_q"):
                return jnp.ones(shape.shape, jnp.float32)
            if name == "bias":
                return jnp.zeros(shape.shape, jnp.float32)
            patch = path[0].key == "patch_embed"
            fan_in = self.config.patch_values if patch else shape.shape[-1]
            draw = jax.random.normal(key, shape.shape, jnp.float32)
            return fan_in**-0.5 * draw

        made = [leaf(k, path, x) for k, (path, x) in zip(keys, leaves, strict=True)]
        return jax.tree.unflatten(tree, made)

    def apply(
        self,
        params: Params,
        patches: Float[Array, "B S C"],
        image_ids: Int[Array, "B S"],
        coordinates: Int[Array, "B S 2"],
    ) -> Float[Array, "B M O"]:
        """One feature for each cell, in the compute dtype.

        The arguments are arrays of `vision_layout.VisionRows`.

        Args:
          params: Parameters as `shapes` describes them.
          patches: Pixel values, zero in empty slots.
          image_ids: 0 for an empty slot; equal numbers are one image.
          coordinates: Row and column of each patch in its image.

        Returns:
          The features of the cells in the order of their slots; those of empty slots
          mean nothing.

        Raises:
          ValueError: A parameter is missing, unknown or of another shape.
        """
        check_shapes(params, self.shapes)
        config = self.config
        head_dim = config.hidden_size // config.num_heads
        angles = axial_angles(coordinates, head_dim, config.rope_theta)
        see_image = self._attend(image_ids)
        see_window = self._attend(image_ids.reshape(-1, config.window.slots))

        def body(x, layer_and_kind):
            layer, full = layer_and_kind

            def attend(query, key, value):
                return jax.lax.cond(full, see_image, see_window, query, key, value)

            block, _ = self._parts[VisionBlock]
            return nnx.merge(block, layer)(x, angles, attend), None

        if self.remat:
            body = jax.checkpoint(body, prevent_cse=False)
        full = np.isin(np.arange(config.depth), config.full_attention_blocks)
        embed = nnx.merge(self._parts[PatchEmbed][0], params["patch_embed"])
        x, _ = jax.lax.scan(body, embed(patches), (params["blocks"], jnp.array(full)))
        return nnx.merge(self._parts[PatchMerger][0], params["merger"])(x)

    def _attend(self, segments: Int[Array, "b s"]) -> Callable[..., Array]:
        """Attention among equal numbers above 0 of each row of `segments`."""
        same = segments[:, :, None] == segments[:, None, :]
        visible = Visible((same & (segments != 0)[:, None, :])[:, None])

        def attend(query, key, value):
            rows = (*segments.shape, *query.shape[2:])
            query_, key_, value_ = (x.reshape(rows) for x in (query, key, value))
            out = self.attention(query_, key_, value_, visible, self.precision)
            return out.reshape(query.shape)

        return attend

    @cached_property
    def _parts(self) -> dict[type[nnx.Module], tuple[nnx.GraphDef, Params]]:
        """Graph and shapes of each module, made without allocating an array."""
        numerics = Numerics(self.dtype, self.precision)
        parts: dict[type[nnx.Module], tuple[nnx.GraphDef, Params]] = {}
        for module in (PatchEmbed, VisionBlock, PatchMerger):
            made = nnx.eval_shape(lambda: module(self.config, numerics))  # noqa: B023
            graph, state = nnx.split(made)
            parts[module] = (graph, nnx.to_pure_dict(state))
        return parts
