"""Parameters held fixed by name: embeddings, norms, the head."""

import re
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from geomjax.optim.roles import dotted, leaf_paths, path_of
from geomjax.typing import Path


def freeze(
    patterns: Iterable[str], tx: optax.GradientTransformation
) -> optax.GradientTransformationExtraArgs:
    """Freezes whole parameters by name and trains the others with `tx`.

    A frozen parameter is not shown to `tx`: it has no moments, enters no clipping norm,
    and its update is the negative zero, which leaves every bit of it in place (see
    `coordinate_mask`). `optax.freeze` and `optax.set_to_zero` do not suffice: the first
    is no wrapper, so moments and norms still see the frozen parameters, and the second
    answers with +0, which turns a parameter of -0 into +0.

    Args:
      patterns: regular expressions, each searched for in the dotted path of every
        parameter: `norm` freezes `norm.weight` and
        `layers.input_layernorm.weight` as well, `^norm` the first of them alone.
      tx: the transform for what is left.

    Returns:
      The transform; its state is `tx`'s in an `optax.MaskedState`. Its `init` raises
      ValueError if a pattern matches no parameter, or nothing is left to train.

    Raises:
      ValueError: a pattern is no regular expression.
    """
    patterns = tuple(patterns)
    compiled = _compile(patterns)

    def trainable(tree: Any) -> Any:
        return jax.tree_util.tree_map_with_path(
            lambda keys, _: not _matches(compiled, path_of(keys)), tree
        )

    inner = optax.masked(tx, trainable)

    def init(params: Any) -> optax.MaskedState:
        if jax.tree.leaves(params):  # else optax.tree.map_params's placeholder
            frozen_paths(params, patterns)
        return inner.init(params)

    def update(
        updates: Any, state: optax.MaskedState, params: Any = None, **extra_args: Any
    ) -> tuple[Any, optax.MaskedState]:
        updates, state = inner.update(updates, state, params, **extra_args)
        updates = jax.tree.map(
            lambda t, u: u if t else jnp.full_like(u, -0.0), trainable(updates), updates
        )
        return updates, state

    return optax.GradientTransformationExtraArgs(init, update)


def frozen_paths(params: Any, patterns: Iterable[str]) -> tuple[Path, ...]:
    """Paths of the parameters that `freeze(patterns, ...)` holds fixed.

    Args:
      params: the parameters, or a tree of the same structure.
      patterns: as in `freeze`.

    Returns:
      The paths, in the order of `jax.tree.leaves`.

    Raises:
      ValueError: a pattern is no regular expression or matches nothing, or all
        parameters are frozen.
    """
    compiled = _compile(tuple(patterns))
    paths = leaf_paths(params)
    listing = "\n  ".join(dotted(path) for path in paths)
    idle = [p.pattern for p in compiled if not any(_matches([p], q) for q in paths)]
    if idle:
        raise ValueError(
            f"frozen: no parameter matches {idle}; the parameters are:\n  {listing}"
        )
    frozen = tuple(path for path in paths if _matches(compiled, path))
    if len(frozen) == len(paths):
        raise ValueError(
            f"frozen: {[p.pattern for p in compiled]} match all parameters and leave"
            f" nothing to train; the parameters are:\n  {listing}"
        )
    return frozen


def _compile(patterns: tuple[str, ...]) -> list[re.Pattern[str]]:
    compiled = []
    for pattern in patterns:
        try:
            compiled.append(re.compile(pattern))
        except re.error as error:
            raise ValueError(
                f"frozen: {pattern!r} is no regular expression: {error}"
            ) from error
    return compiled


def _matches(patterns: list[re.Pattern[str]], path: Path) -> bool:
    return any(pattern.search(dotted(path)) for pattern in patterns)
