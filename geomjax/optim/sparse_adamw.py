"""AdamW with moments for the coordinates of a mask alone."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec

from geomjax.optim.coordinate_mask import (
    CoordinateMaskState,
    coordinate_mask,
    masks_by_path,
)
from geomjax.optim.packing import Packing, make_packing, pack, unpack
from geomjax.optim.roles import path_of


class SparseAdamWState(NamedTuple):
    """State of `sparse_adamw`.

    Attributes:
      packings: a tree shaped as the parameters, with a `Packing` in place of each leaf,
        or None where the leaf is trained throughout.
      inner_state: state of `optax.adamw` for the packed parameters, `[*grid, K]`.
    """

    packings: Any
    inner_state: Any


def sparse_adamw(
    coordinates: Any,
    learning_rate: optax.ScalarOrSchedule,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 1e-4,
    mask: Any = None,
    *,
    clip_norm: float | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""AdamW on the coordinates of a mask, with state for no others.

    Does what `coordinate_mask` does around clipping and `optax.adamw`, bit for bit. For
    the coordinates :math:`i` with :math:`m_i = 1`, gradients :math:`g`, and the norm of
    the trained coordinates alone in the clipping factor :math:`c`:

    .. math::
      \begin{aligned}
      \mu_i &\leftarrow \beta_1 \mu_i + (1 - \beta_1)\, c\, g_i \\
      \nu_i &\leftarrow \beta_2 \nu_i + (1 - \beta_2)\, (c\, g_i)^2 \\
      p_i &\leftarrow p_i - \eta_t \left( \frac{\hat\mu_i}{\sqrt{\hat\nu_i} + \epsilon}
        + \lambda p_i \right)
      \end{aligned}

    and :math:`p_i \leftarrow p_i + (-0)` for all others, whose moments stay zero in the
    masked runs of P1 (arXiv 2606.13657) and are not kept here. An update scatters the
    packed moments into zeros (`packing`), runs masked AdamW, and gathers them again.
    Dense moments are temporaries; of how many leaves at once, is the compiler's choice:
    for six equal leaves, temporaries as large as 3 of them on TPU (ahead-of-time, v5e),
    and of all leaves on CPU.

    A chosen coordinate costs 10 bytes of state in float32 (two moments and a 16-bit
    column; 12 where a row of a shard is longer than 65,536), a row 4 more, against 8
    bytes a coordinate of dense AdamW, and 9 of dense AdamW with its mask. What is lost
    to rounding up is below `LANES` places a leaf on one device. On a mesh each device
    packs its own shard into as many places as the fullest shard of the leaf needs.

    State as a share of dense moments, 17.5 % of the coordinates chosen; the first rows
    from `test_bytes_of_the_state` (4 layers of 512 x 1024; fsdp=4, tensor=2), the last
    from masks of the tiny world, whose leaves are small (8 devices: the dearest split
    of every leaf):

    ======================================  ==========  =============
    mask                                    one device  eight devices
    ======================================  ==========  =============
    uniform, or three times denser layers   22.0 %      22.3 %
    rows differ (log-normal, sigma 1)       22.0 %      23.5 %
    columns differ (log-normal, sigma 1)    22.0 %      26.1 %
    tiny world, where AdamW moved most      22.6 %      29.3 %
    tiny world, where the teacher differs   22.6 %      29.0 %
    ======================================  ==========  =============

    Rows padded to the fullest row of a leaf would need 75 % for the fourth of them.

    `init` takes the layout from the parameters: on a mesh, call it outside `jit` with
    the parameters in place, and no gradient has to travel to be packed. Under `jit`, or
    for parameters on one device, a leaf is one block. The mask has to be known when
    `init` is called, since it decides about shapes; `update` reads the state alone, and
    masks that come to the same capacities share one compiled step. A state is restored
    onto the mesh that it was made for, or another of the same grid.

    Args:
      coordinates: as the mask of `coordinate_mask`, readable by this process.
      learning_rate: as in `optax.adamw`, like all that follow.
      b1: decay of the first moment.
      b2: decay of the second moment.
      eps: added to the root of the second moment.
      weight_decay: decoupled, multiplied by the learning rate.
      mask: which leaves decay, as in `optax.adamw`; a function of it is given the
        parameters as they are, not packed.
      clip_norm: largest global norm of the chosen gradients, None for no clipping.

    Returns:
      The transform. Apply its updates with `geomjax.optim.apply_updates`. Its `init`
      raises ValueError if the mask does not fit the parameters, or is traced.

    Examples:
      >>> import jax.numpy as jnp
      >>> from geomjax.optim import sparse_adamw
      >>> params = {"w": jnp.ones((2, 3))}
      >>> tx = sparse_adamw({"w": jnp.eye(2, 3, dtype=bool)}, 0.5, weight_decay=0.0)
      >>> state = tx.init(params)
      >>> updates, state = tx.update({"w": jnp.ones((2, 3))}, state, params)
      >>> print(updates["w"].round(3))
      [[-0.5 -0.  -0. ]
       [-0.  -0.5 -0. ]]
    """

    def adamw(params: Any) -> optax.GradientTransformation:
        decays = mask(params) if callable(mask) else mask
        tx = optax.adamw(
            learning_rate, b1, b2, eps, weight_decay=weight_decay, mask=decays
        )
        if clip_norm is None:
            return tx
        return optax.chain(optax.clip_by_global_norm(clip_norm), tx)

    def init(params: Any) -> SparseAdamWState:
        packings = params  # the placeholder of optax.tree.map_params
        if jax.tree.leaves(params):
            packings = _make_packings(coordinates, params)
        packed = jax.tree.map(_pack, params, packings)
        return SparseAdamWState(packings, adamw(params).init(packed))

    def update(
        updates: Any, state: SparseAdamWState, params: Any = None, **extra_args: Any
    ) -> tuple[Any, SparseAdamWState]:
        packings, packed = state

        def unpacked(moments: Any) -> Any:
            return jax.tree.map(_unpack, updates, moments, packings)

        chosen = jax.tree.map(_mask_of, updates, packings)
        dense = CoordinateMaskState(chosen, _map_moments(unpacked, packed))
        masked = coordinate_mask(None, adamw(updates))
        updates, dense = masked.update(updates, dense, params, **extra_args)

        def repacked(moments: Any) -> Any:
            return jax.tree.map(_pack, moments, packings)

        packed = _map_moments(repacked, dense.inner_state)
        return updates, SparseAdamWState(packings, packed)

    return optax.GradientTransformationExtraArgs(init, update)


def _pack(dense: Any, packing: Packing | None) -> Any:
    return dense if packing is None else pack(packing, dense)


def _unpack(like: Any, packed: Any, packing: Packing | None) -> Any:
    return packed if packing is None else unpack(packing, packed, like.shape)


def _mask_of(like: Any, packing: Packing | None) -> Any:
    if packing is None:
        return None
    return unpack(packing, jnp.ones(packing.columns.shape, bool), like.shape)


def _map_moments(function: Callable[[Any], Any], state: Any) -> Any:
    def is_adam(node: Any) -> bool:
        return isinstance(node, optax.ScaleByAdamState)

    return jax.tree.map(
        lambda node: (
            node._replace(mu=function(node.mu), nu=function(node.nu))
            if is_adam(node)
            else node
        ),
        state,
        is_leaf=is_adam,
    )


def _make_packings(coordinates: Any, params: Any) -> Any:
    masks = masks_by_path(coordinates, params)

    def of_leaf(keys: tuple[Any, ...], leaf: Any) -> Packing | None:
        mask = masks[path_of(keys)]
        if mask is None:
            return None
        if isinstance(mask, jax.core.Tracer):
            raise ValueError(
                "sparse_adamw: the mask is traced, expected known values, which decide"
                " how many moments there are; do not pass it through jit"
            )
        sharding = None if isinstance(leaf, jax.core.Tracer) else leaf.sharding
        if not isinstance(sharding, NamedSharding):
            return jax.tree.map(jnp.asarray, make_packing(np.asarray(mask)))
        shard = sharding.shard_shape(leaf.shape)
        grid = [n // m for n, m in zip(leaf.shape, shard, strict=True)]
        return _place(make_packing(np.asarray(mask), grid), sharding, leaf.ndim)

    return jax.tree_util.tree_map_with_path(of_leaf, params)


def _place(packing: Packing, sharding: NamedSharding, axes: int) -> Packing:
    """The packing on the devices of its parameter, block by block."""
    spec = tuple(sharding.spec) + (None,) * (axes - len(sharding.spec))
    layout = NamedSharding(sharding.mesh, PartitionSpec(*spec, None))
    return jax.tree.map(
        lambda x: jax.make_array_from_callback(x.shape, layout, lambda at: x[at]),
        packing,
    )
