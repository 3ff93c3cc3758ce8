"""A learning rate that each update is given, so that runs share a compiled step."""

import dataclasses
from typing import Any

import optax
from jaxtyping import Array, Float

from geomjax.optim.build import OptimizerSpec, build
from geomjax.optim.roles import Roles


def given_rate(
    spec: OptimizerSpec, roles: Roles, mask: Any = None, basis: Any = None
) -> optax.GradientTransformationExtraArgs:
    """`build`, but the rate of each update is an argument of it.

    `update(updates, state, params, learning_rate=rate)` builds the transform at that
    rate and updates by it, so that it is right for every optimizer whose rate may be a
    schedule, however its update depends on the rate. Under `jit` the rate is traced: a
    step that is compiled at one rate serves all. The state is that of `build`, without
    the rate, and `init` sees the rate of the description.

    Args:
      spec: As in `build`; its `learning_rate` is what `init` sees.
      roles: As in `build`.
      mask: As in `build`.
      basis: As in `build`.

    Returns:
      The transform.

    Raises:
      ValueError: As `build` does.
    """

    def update(
        updates: Any,
        state: Any,
        params: Any = None,
        *,
        learning_rate: Float[Array, ""],
        **extra_args: Any,
    ) -> tuple[Any, Any]:
        rated = dataclasses.replace(spec, learning_rate=learning_rate)
        tx = optax.with_extra_args_support(build(rated, roles, mask, basis))
        return tx.update(updates, state, params, **extra_args)

    return optax.GradientTransformationExtraArgs(
        build(spec, roles, mask, basis).init, update
    )
