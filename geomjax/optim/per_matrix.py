"""Matrix-wise transforms over stacked layers."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import optax

from geomjax.optim.roles import Role, Roles, map_with_roles
from geomjax.typing import Path


class PerMatrixState(NamedTuple):
    """State of `per_matrix`.

    Attributes:
      inner_states: a tree shaped as the parameters, with one state of the wrapped
        transform in place of each leaf; all its arrays begin with the stack axes.
    """

    inner_states: Any


def per_matrix(
    tx: optax.GradientTransformation, roles: Roles
) -> optax.GradientTransformationExtraArgs:
    r"""Applies a transform to every tensor of a stacked leaf by itself.

    A leaf of stack depth d, :math:`W \in R^{L_1 \times \dots \times L_d \times \dots}`,
    stands for :math:`L_1 \cdots L_d` tensors. `tx` sees one of them at a time, as a
    tree that is a bare array: its `init` and `update` are mapped over the first d axes.
    A norm over a leaf, LAMB's trust ratio for one, is then the norm of one matrix.

    Element-wise transforms do not need this, and three things must stay outside it:
    global-norm clipping would clip each matrix by its own norm, added noise would be
    the same in all layers, and injected hyperparameters would be stacked.
    `optax.tree.map_params` does not apply to the state, which has the parameters'
    structure around the transform's and not within it.

    Args:
      tx: a transform that works on a tree of one leaf. Extra arguments of `update`
        reach it unchanged, the same for every tensor.
      roles: gives the stack depth of each leaf.

    Returns:
      The transform. Its `init` and `update` raise ValueError if a leaf has no role.
    """
    inner = optax.with_extra_args_support(tx)

    def init(params: Any) -> PerMatrixState:
        def init_leaf(path: Path, leaf: Any, role: Role) -> Any:
            del path
            return _map_stack(inner.init, role.stack_depth)(leaf)

        return PerMatrixState(map_with_roles(init_leaf, params, roles))

    def update(
        updates: Any, state: PerMatrixState, params: Any = None, **extra_args: Any
    ) -> tuple[Any, PerMatrixState]:
        def update_tensor(update: Any, tensor_state: Any, *param: Any) -> _Result:
            return _Result(*inner.update(update, tensor_state, *param, **extra_args))

        def update_leaf(depth: int, *leaves: Any) -> _Result:
            return _map_stack(update_tensor, depth)(*leaves)

        depths = map_with_roles(
            lambda path, leaf, role: role.stack_depth, updates, roles
        )
        trees = [updates, state.inner_states] + ([] if params is None else [params])
        results = jax.tree.map(update_leaf, depths, *trees)

        def part(index: int) -> Any:
            return jax.tree.map(
                lambda result: result[index],
                results,
                is_leaf=lambda node: isinstance(node, _Result),
            )

        return part(0), PerMatrixState(part(1))

    return optax.GradientTransformationExtraArgs(init, update)


class _Result(NamedTuple):
    update: Any
    state: Any


def _map_stack(function: Callable[..., Any], depth: int) -> Callable[..., Any]:
    for _ in range(depth):
        function = jax.vmap(function)
    return function
