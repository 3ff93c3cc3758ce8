"""Which attention a backend gets."""

from functools import partial

import jax
import jax.numpy as jnp

from geomjax.meshes import ONE_DEVICE, Placement
from geomjax.models.attention import Attention, dot_product_attention
from geomjax.models.splash import splash_attention

SPLASH_LENGTH = 1024
"""Slots from which the splash kernel is taken; our choice. Scores of shorter sequences
are small, and XLA fuses what it makes of them."""

CUDNN_HEAD = 128
"""Largest head that cuDNN's kernel takes on every GPU that has it."""


def choose_attention(backend: str, placement: Placement = ONE_DEVICE) -> Attention:
    """The attention of whole sequences for a backend.

    On a CPU the written-out one of `attention`. On accelerators
    `jax.nn.dot_product_attention`, which on a GPU is cuDNN's kernel for the shapes and
    dtypes that it takes; on a TPU, splash for long sequences in bfloat16. What none of
    these kernels takes (float32 at full precision, few queries over many keys, images)
    is computed by XLA.

    Args:
      backend: `cpu`, `gpu` or `tpu`, as `jax.default_backend()` names them.
      placement: Where the activations of the model lie.

    Returns:
      A function to hand to a model.
    """
    if backend == "cpu":
        return dot_product_attention
    return partial(_attend, backend, placement)


def _attend(backend, placement, query, key, value, visible, precision):
    if backend == "tpu" and takes_splash(query, key, visible, placement):
        return splash_attention(query, key, value, visible, placement)
    cudnn = backend == "gpu" and takes_cudnn(query, key)
    # JAX's own function mixes dtypes and ranks, which a caller may have forbidden.
    with (
        jax.default_matmul_precision(precision.name.lower()),
        jax.numpy_dtype_promotion("standard"),
        jax.numpy_rank_promotion("allow"),
    ):
        return jax.nn.dot_product_attention(
            query,
            key,
            value,
            mask=visible.mask,
            implementation="cudnn" if cudnn else "xla",
        )


def takes_splash(query, key, visible, placement) -> bool:
    """Whether the splash kernel computes this, and is worth it.

    Its products are the native ones, so float32 is left to XLA. Queries lie with the
    keys that they share only where both are split alike.
    """
    return (
        query.dtype == jnp.bfloat16
        and placement.mesh_axes("heads") == placement.mesh_axes("kv_heads")
        and visible.segment_ids is not None
        and query.shape[1] == key.shape[1] >= SPLASH_LENGTH
    )


def takes_cudnn(query, key) -> bool:
    """Whether cuDNN's kernel takes these shapes and this dtype on any of its GPUs."""
    head, lengths = query.shape[-1], (query.shape[1], key.shape[1])
    return (
        query.dtype in (jnp.bfloat16, jnp.float16)
        and head <= CUDNN_HEAD
        and head % 8 == 0
        and all(length % 2 == 0 for length in lengths)
    )
