"""How a training state lies on a mesh: everything that belongs to a parameter, with it.

A program that is sharded from its first array to its last is built in three calls, for
arrays or, without any device, for `jax.ShapeDtypeStruct`s that have shardings:

    params = load(path, placement=Placement(mesh)).params
    layout = state_layout(params, tx)
    step = make_distill_step(model, objective, tx, sampling, layout=layout, ...)
    state = init_state(params, tx, layout)

`step` returns its state in the layout, and on one device, where the layout is None,
does what it would do without.

What the devices exchange, with the axes of the mesh that exchange it. The tests read it
from the compiled programs (`geomjax.compiled`), on meshes of 8 CPU devices:

| What | How | Over | How often |
|---|---|---|---|
| weights of a layer | gathered in width | fsdp | forward and backward of a layer |
| their gradients | summed, split again | data, fsdp | backward of a layer |
| output of attention and feed-forward | summed | tensor, expert | a layer |
| embeddings of tokens | re-split; summed | fsdp; tensor | a pass |
| unembedding | re-split from width to rows | fsdp | a loss, and its gradient back |
| hidden states | gathered | fsdp | a chunk; gradients summed, split again |
| maxima and sums over the vocabulary | reduced | fsdp, tensor | a chunk |
| likeliest k tokens, if a loss asks | gathered, k a device | fsdp, tensor | a chunk |
| their scores | summed | fsdp, tensor | a chunk |
| gradient of the unembedding | summed | data | a loss |
| norms and flags of the metrics | reduced | all | an update |
| weights for a rollout, compute dtype | gathered in width | fsdp | a rollout |
| output of attention and feed-forward | summed | tensor, expert | a token |
| likeliest token, its score | reduced, some numbers a row | tensor | a token |
| whether a row is unfinished | reduced, one flag | data, fsdp | a token |

No weight is gathered in the decoding loop, no unembedding in the loop over chunks, and
nothing that is exchanged has the vocabulary as an axis beside the tokens.
"""

from typing import Any

import jax
import optax
from jax.sharding import NamedSharding, PartitionSpec

from geomjax.optim.roles import path_of
from geomjax.train.step import TrainState
from geomjax.typing import Params, Path


def state_layout(params: Params, tx: optax.GradientTransformation) -> TrainState | None:
    """The shardings of the state that training starts from.

    Args:
      params: Parameters laid out on a mesh, or their shapes with `sharding`.
      tx: The optimizer; a mask in it may be on the host.

    Returns:
      A sharding for each leaf of the state; None where the parameters are on no mesh.
    """
    leaf = jax.tree.leaves(params)[0]
    # Arrays on the host have no sharding at all.
    if not isinstance(getattr(leaf, "sharding", None), NamedSharding):
        return None
    opt_state = jax.eval_shape(tx.init, params)
    whole: Any = NamedSharding(leaf.sharding.mesh, PartitionSpec())
    return TrainState(
        step=whole,
        params=jax.tree.map(lambda leaf: leaf.sharding, params),
        opt_state=like_parameters(opt_state, params),
    )


def like_parameters(tree: Any, params: Params) -> Any:
    """Shardings of a tree that holds something for each parameter.

    A leaf whose path holds a parameter's path, and which has the parameter's shape, is
    laid out as the parameter: moments, masks, the states of `per_matrix`. So is what
    `sparse_adamw` packs, whose leading axes are the grid of the parameter's shards, of
    size one where shapes alone are known. Everything else, such as counts, is whole on
    every device.

    Args:
      tree: Arrays or their shapes.
      params: Parameters laid out on a mesh, or their shapes with `sharding`.

    Returns:
      A sharding for each leaf of the tree.
    """
    known = {
        path_of(keys): leaf
        for keys, leaf in jax.tree_util.tree_leaves_with_path(params)
    }
    mesh = next(iter(known.values())).sharding.mesh
    whole = NamedSharding(mesh, PartitionSpec())

    def of_leaf(keys: tuple[Any, ...], leaf: Any) -> NamedSharding:
        within = _parameter(path_of(keys), known)
        if within is None:
            return whole
        parameter = known[within]
        packed = leaf.shape[:-1] == (1,) * parameter.ndim
        return parameter.sharding if packed or leaf.shape == parameter.shape else whole

    return jax.tree_util.tree_map_with_path(of_leaf, tree)


def _parameter(path: Path, known: dict[Path, Any]) -> Path | None:
    """The longest parameter's path within a path."""
    count = len(path)
    parts = (path[i : i + n] for n in range(count, 0, -1) for i in range(count - n + 1))
    return next((part for part in parts if part in known), None)
