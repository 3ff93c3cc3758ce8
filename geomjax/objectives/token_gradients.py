"""The gradient of each token's loss by itself, with respect to one matrix."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from geomjax.objectives.base import Batch, Objective
from geomjax.typing import Params, Path


def token_gradients(
    objective: Objective,
    params: Params,
    context: Params,
    batch: Batch,
    path: Path,
    index: tuple[int, ...] = (),
) -> Float[Array, "N m n"]:
    """`g_t = d l_t / d W` for every slot t with a weight slot, of any objective.

    An objective is linear in the weights of its batch, `L = sum_t w_t l_t`, so l_t is
    its loss with the weight 1 at t and 0 elsewhere. The derivative is exact: it counts
    every place at which W acts on the tokens before t, unlike the outer product of one
    position's error and input. The rows of the batch are taken one after another, the
    slots of a row together: R backward passes and `R m n` numbers at a time.

    P2 writes its gradient as `g = sum_t a_t phi_t`; here `g_t = a_t phi_t`, and phi_t
    itself is the gradient of `cross_entropy`, with its sign reversed.

    Args:
      objective: Its value alone is used.
      params: Parameters to differentiate at.
      context: Passed on to the objective.
      batch: Sequences; the sizes of their weights are not used, and a slot without a
        target (weight 0) gives a zero gradient.
      path: The leaf that holds the matrix.
      index: The matrix within a stacked leaf, such as `(layer,)`.

    Returns:
      The gradients, N = B R, row by row.

    Raises:
      ValueError: The path is no leaf, or the index leaves no matrix.
    """
    leaf = _leaf(params, path)
    if leaf.ndim - len(index) != 2:
        raise ValueError(
            f"{'.'.join(path)} has shape {leaf.shape}; the index {index} leaves no "
            "matrix of it"
        )

    def loss(matrix, row, weights):
        moved = _replace(params, path, leaf.at[index].set(matrix))
        return objective(moved, context, row._replace(weights=weights[None]))[0]

    def of_row(row: Batch) -> Float[Array, "R m n"]:
        row = jax.tree.map(lambda x: x[None], row)
        used = (row.weights[0] != 0).astype(row.weights.dtype)
        each = jax.vmap(jax.grad(loss), (None, None, 0))
        return each(leaf[index], row, jnp.diag(used))

    gradients = jax.lax.map(of_row, batch)
    return gradients.reshape(-1, *gradients.shape[-2:])


def _leaf(params: Params, path: Path) -> Array:
    node: Any = params
    for key in path:
        if not isinstance(node, dict) or key not in node:
            raise ValueError(f"no parameter {'.'.join(path)}")
        node = node[key]
    if isinstance(node, dict):
        raise ValueError(f"{'.'.join(path)} is no parameter but a group of them")
    return node


def _replace(params: Params, path: Path, leaf: Array) -> Params:
    key, *rest = path
    inner = _replace(params[key], tuple(rest), leaf) if rest else leaf
    return {**params, key: inner}
