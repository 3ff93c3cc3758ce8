"""The splash attention kernel that ships with JAX, for long sequences on TPUs."""

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_kernel as kernels,
)
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_mask as masks,
)
from jaxtyping import Array, Float

from geomjax.meshes import ONE_DEVICE, Placement
from geomjax.models.masks import Visible

LANES = 128
"""The kernel's blocks are multiples of it."""

BLOCKS = (512, 256, LANES)
"""Sizes of blocks of queries and keys; the largest that divides the length is taken."""


def splash_attention(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K H"],
    visible: Visible,
    placement: Placement = ONE_DEVICE,
    *,
    interpret: bool = False,
) -> Float[Array, "B T N H"]:
    """`softmax(query key^T / sqrt(H)) value` without an array of the scores.

    Each query sees its own and earlier slots of its own segment, so that packed
    sequences stay apart; heads of queries share keys in groups. Rows are padded to a
    multiple of 128 slots. XLA cannot partition the kernel, so on a mesh each device
    applies it to its own rows and heads, inside `shard_map`.

    Args:
      query: Queries of all slots.
      key: Keys.
      value: Values.
      visible: Its segments and window are read.
      placement: Where the arrays lie; queries and keys are split by heads alike.
      interpret: Whether to run the kernel's operations one by one, on any backend.

    Returns:
      Attended values in the dtype of `query`. At padding they mean nothing.

    Raises:
      ValueError: `visible` has no segments, or there are fewer queries than keys.
    """
    segments, length = visible.segment_ids, query.shape[1]
    if segments is None or key.shape[1] != length:
        raise ValueError(
            f"splash attention takes whole sequences with their segments; got {length} "
            f"queries and {key.shape[1]} keys, "
            f"{'without' if segments is None else 'with'} segments"
        )
    free = -length % LANES
    query = query * jnp.asarray(query.shape[-1] ** -0.5, query.dtype)
    axes = [("batch", heads, None, None) for heads in ("heads", "kv_heads", "kv_heads")]

    def padded(x):
        return jnp.pad(x.transpose(0, 2, 1, 3), ((0, 0), (0, 0), (0, free), (0, 0)))

    def attend(query, key, value, segments):
        kernel = _kernel(query.shape[1], length + free, visible.window, interpret)
        return jax.vmap(
            lambda q, k, v, s: kernel(q, k, v, segment_ids=kernels.SegmentIds(s, s))
        )(query, key, value, segments)

    attend = placement.local(attend, [*axes, ("batch", None)], axes[0])
    segments = jnp.pad(segments, ((0, 0), (0, free)))
    out = attend(padded(query), padded(key), padded(value), segments)
    return out.transpose(0, 2, 1, 3)[:, :length]


def _kernel(heads: int, length: int, window: int | None, interpret: bool):
    shape = (length, length)
    mask: masks.Mask
    if window is None:
        mask = masks.CausalMask(shape)
    else:
        mask = masks.LocalMask(shape, (window - 1, 0), 0)
    block = next(size for size in BLOCKS if length % size == 0)
    blocks = kernels.BlockSizes(
        block_q=block,
        block_kv=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_q_dq=block,
        block_kv_dq=block,
    )
    return kernels.make_splash_mha(
        masks.MultiHeadMask([mask] * heads),
        block_sizes=blocks,
        head_shards=1,
        q_seq_shards=1,
        interpret=interpret,
    )
