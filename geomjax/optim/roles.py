"""What each parameter is: the one table that every tensor-wise rule reads.

A stacked leaf `[L, out, in]` has three axes and is still a stack of matrices; a stacked
norm `[L, D]` has two and is no matrix. So nothing here or elsewhere looks at `ndim`: a
model family writes down one `Role` for each path, and matrix-wise transforms, Muon's
dimension numbers, weight-decay masks and sharding are all derived from it.
"""

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax

from geomjax.typing import Path

Kind = Literal["matrix", "vector", "embedding"]
"""`embedding` is a token table or its unembedding: a matrix whose rows are tokens."""


class Role(NamedTuple):
    """What one parameter is.

    Attributes:
      stack_depth: number of leading axes that index layers, or layers and experts. What
        is left after them is one tensor of the checkpoint.
      kind: what that tensor is.
      out_axis: axis of the outputs, negative; None for vectors.
      in_axis: axis of the inputs, negative; None for vectors.
      logical_axes: a name for every axis of the leaf, the stack included, or None for
        an axis that has no name; sharding maps the names to mesh axes.
    """

    stack_depth: int
    kind: Kind
    out_axis: int | None
    in_axis: int | None
    logical_axes: tuple[str | None, ...]


Roles = Mapping[Path, Role]
"""One role for each path; roles of parameters that a model lacks do no harm."""


def path_of(key_path: tuple[Any, ...]) -> Path:
    """The keys of a `jax.tree_util` key path, as strings."""
    return tuple(jax.tree_util.keystr((key,), simple=True) for key in key_path)


def dotted(path: Path) -> str:
    """The path as patterns and messages spell it, `layers.mlp.up_proj.weight`."""
    return ".".join(path)


def leaf_paths(tree: Any) -> tuple[Path, ...]:
    """Paths of all leaves, in the order of `jax.tree.leaves`."""
    return tuple(path_of(keys) for keys, _ in jax.tree_util.tree_leaves_with_path(tree))


def map_with_roles(
    function: Callable[[Path, Any, Role], Any], tree: Any, roles: Roles
) -> Any:
    """Maps `function(path, leaf, role)` over the leaves of a tree.

    Args:
      function: called once for each leaf.
      tree: parameters, or a tree of the same shape (gradients, moments). Parts that
        optax has masked out are no leaves, and stay as they are.
      roles: a role for the path of every leaf.

    Returns:
      A tree of the same structure.

    Raises:
      ValueError: paths without a role, and leaves whose number of axes is not the
        role's; all of them at once.
    """
    problems = []
    for keys, leaf in jax.tree_util.tree_leaves_with_path(tree):
        path = path_of(keys)
        if path not in roles:
            problems.append(f"{dotted(path)}: no role")
        elif len(roles[path].logical_axes) != leaf.ndim:
            problems.append(
                f"{dotted(path)}: the role names {len(roles[path].logical_axes)} axes"
                f" {roles[path].logical_axes}, the leaf has shape {leaf.shape}"
            )
    if problems:
        raise ValueError(
            "parameters and role table disagree; give every path a role with one"
            " logical axis for each axis of the leaf:\n  " + "\n  ".join(problems)
        )

    def apply(keys: tuple[Any, ...], leaf: Any) -> Any:
        path = path_of(keys)
        return function(path, leaf, roles[path])

    return jax.tree_util.tree_map_with_path(apply, tree)
