"""Feed-forward layers of several experts: top-k routing and grouped products.

On a mesh each device routes its own tokens and computes the experts that it holds,
and the devices that share the tokens sum. No token moves.

Axes: M tokens, C = M * k tokens as the experts see them, E experts, F width of one
expert, D model. Experts are stacked, `[E, out, in]`, so that they can be laid along a
mesh axis.
"""

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from geomjax.models.config import DecoderConfig, ExpertSizes
from geomjax.models.layers import Linear, Numerics, gate

_BY_EXPERT = jax.lax.RaggedDotDimensionNumbers(
    dot_dimension_numbers=(((1,), (2,)), ((), ())),
    lhs_ragged_dimensions=[0],
    rhs_group_dimensions=[0],
)
"""Rows in groups against `[E, out, in]`: group e of the rows meets matrix e."""


def route(
    logits: Float[Array, "M E"], per_token: int, normalise: bool
) -> tuple[Float[Array, "M k"], Int[Array, "M k"]]:
    """Chooses the experts of each token.

    `p = softmax(logits)` over all experts, in float32; the k largest are kept and, if
    asked, divided by their sum.

    Args:
      logits: Scores of the router.
      per_token: How many experts a token takes, k.
      normalise: Whether the weights of a token sum to one.

    Returns:
      Weights in the dtype of `logits`, largest first, and the experts' indices.
    """
    probabilities = jax.nn.softmax(logits.astype(jnp.float32), axis=-1)
    weights, experts = jax.lax.top_k(probabilities, per_token)
    if normalise:
        weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
    return weights.astype(logits.dtype), experts


class ExpertLinear(nnx.Module):
    """The weights of one projection for each expert, `[E, out, in]`."""

    def __init__(self, experts: int, out_features: int, in_features: int):
        self.weight = nnx.Param(jnp.zeros((experts, out_features, in_features)))


class Experts(nnx.Module):
    """The gated feed-forward layers of all experts."""

    def __init__(self, count: int, size: int, width: int, numerics: Numerics):
        self.gate_proj = ExpertLinear(count, size, width)
        self.up_proj = ExpertLinear(count, size, width)
        self.down_proj = ExpertLinear(count, width, size)
        self.numerics = numerics

    def __call__(
        self,
        tokens: Float[Array, "M d"],
        logits: Float[Array, "M E"],
        sizes: ExpertSizes,
    ) -> Float[Array, "M d"]:
        """The weighted sum of the experts that the router's scores give each token."""
        up = ("experts", "ffn", None)
        mix = self.numerics.placement.local(
            partial(_mix, self.numerics, sizes),
            [("batch", None), ("batch", None), up, up, ("experts", None, "ffn")],
            ("batch", None),
        )
        projections = self.gate_proj, self.up_proj, self.down_proj
        return mix(tokens, logits, *(p.weight[...] for p in projections))


def _mix(numerics, sizes, tokens, logits, gate_weight, up_weight, down_weight):
    """`Experts` on one device: its tokens, and those of their experts that it holds."""
    place, count = numerics.placement, gate_weight.shape[0]
    weights, choices = route(logits, sizes.per_token, sizes.normalise_weights)
    shared = place.mesh_axes("experts")
    flat = choices.reshape(-1)
    if shared:
        own = flat - jax.lax.axis_index(shared) * count
        flat = jnp.where((own >= 0) & (own < count), own, count)
    by_expert = jnp.argsort(flat, stable=True)
    group_sizes = jnp.bincount(flat, length=count).astype(jnp.int32)

    def project(x, weight):
        return jax.lax.ragged_dot_general(
            x,
            weight.astype(numerics.dtype),
            group_sizes,
            _BY_EXPERT,
            precision=numerics.precision,
        )

    x = tokens[by_expert // choices.shape[1]]
    out = project(gate(project(x, gate_weight), project(x, up_weight)), down_weight)
    if shared:  # Rows of no group come last, and are whatever the product leaves there.
        out = jnp.where((flat[by_expert] < count)[:, None], out, 0)
    out = out[jnp.argsort(by_expert)].reshape(*weights.shape, -1)
    mixed = jnp.einsum("mkd,mk->md", out, weights, precision=numerics.precision)
    summed = (*shared, *place.mesh_axes("ffn"))
    return jax.lax.psum(mixed, summed) if summed else mixed


class SparseMLP(nnx.Module):
    """`sum_j w_j expert_j(x)` over the k experts that the router gives a token.

    Tokens are sorted by expert, so that each projection is one ragged product: no
    token is dropped, and no capacity is set. On accelerators its cost is that of k
    experts a token; XLA's CPU backend computes every expert for every token.
    """

    def __init__(self, config: DecoderConfig, numerics: Numerics):
        if config.experts is None:
            raise ValueError(f"{config.architecture} has no experts")
        sizes = config.experts
        self.gate = Linear(sizes.count, config.hidden_size, numerics)
        self.experts = Experts(sizes.count, sizes.size, config.hidden_size, numerics)
        self.sizes = sizes

    def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
        """Applies the layer to every token."""
        tokens = x.reshape(-1, x.shape[-1])
        return self.experts(tokens, self.gate(tokens), self.sizes).reshape(x.shape)
