"""The parts that blocks are built from: projections and norms in Flax NNX."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from geomjax.meshes import ONE_DEVICE, Placement


class Numerics(NamedTuple):
    """How products are taken: compute dtype, matmul precision, and on which devices."""

    dtype: Any
    precision: jax.lax.Precision
    placement: Placement = ONE_DEVICE


class Linear(nnx.Module):
    """`y_o = sum_i x_i W_oi + b_o`, W `[out, in]` as in the checkpoint."""

    def __init__(
        self,
        out_features: int,
        in_features: int,
        numerics: Numerics,
        *,
        bias: bool = False,
    ):
        self.weight = nnx.Param(jnp.zeros((out_features, in_features)))
        if bias:
            self.bias = nnx.Param(jnp.zeros((out_features,)))
        self.has_bias = bias
        self.numerics = numerics

    def __call__(self, x: Float[Array, "*b i"]) -> Float[Array, "*b o"]:
        """Applies the projection in the compute dtype.

        Batch axes are flattened first: XLA's CPU backend takes a weight gradient that
        contracts over two axes at half the speed of one over a single axis.
        """
        out = jnp.einsum(
            "ni,oi->no",
            x.reshape(-1, x.shape[-1]),
            self.weight[...].astype(self.numerics.dtype),
            precision=self.numerics.precision,
        )
        if self.has_bias:
            bias = self.bias[...].astype(self.numerics.dtype)
            out = out + jnp.broadcast_to(bias, out.shape)
        return out.reshape(*x.shape[:-1], -1)


class RMSNorm(nnx.Module):
    """`x / sqrt(mean(x^2) + eps) * weight`, in float32."""

    def __init__(self, size: int, eps: float):
        self.weight = nnx.Param(jnp.ones((size,)))
        self.eps = eps

    def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
        """Normalises the last axis and returns the dtype of `x`."""
        return rms_norm(x, self.weight[...], self.eps)


def rms_norm(
    x: Float[Array, "*b d"], weight: Float[Array, " d"], eps: float
) -> Float[Array, "*b d"]:
    """`x / sqrt(mean(x^2) + eps) * weight` over the last axis, in the dtype of `x`."""
    wide = x.astype(jnp.float32)
    mean_square = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
    scaled = jax.lax.mul(
        wide * jax.lax.rsqrt(mean_square + eps),
        jnp.broadcast_to(weight.astype(jnp.float32), wide.shape),
    )
    return scaled.astype(x.dtype)


@jax.custom_vjp
def gate(x: Float[Array, "*b f"], up: Float[Array, "*b f"]) -> Float[Array, "*b f"]:
    """`silu(x) * up`; its gradient keeps the two arguments alone."""
    return jax.nn.silu(x) * up


def _gate_forward(x, up):
    return gate(x, up), (x, up)


def _gate_backward(kept, gradient):
    x, up = kept
    sigmoid = jax.nn.sigmoid(x)
    silu = x * sigmoid
    return gradient * up * (sigmoid + silu * (1 - sigmoid)), gradient * silu


gate.defvjp(_gate_forward, _gate_backward)


def scale(x: Float[Array, "*b d"], factor: float) -> Float[Array, "*b d"]:
    """`factor * x` in the dtype of x; x itself where the factor is one."""
    return x if factor == 1 else x * jnp.asarray(factor, x.dtype)


def cut(tree: Any, last: int | None) -> Any:
    """The last `last` slots of arrays `[B, T, ...]`; None keeps all."""
    return tree if last is None else jax.tree.map(lambda x: x[:, -last:], tree)
