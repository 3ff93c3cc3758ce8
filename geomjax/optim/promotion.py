"""Optax under strict dtype promotion."""

from typing import Any

import jax
import optax


def standard_promotion(
    tx: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    """Runs a transform under JAX's standard dtype promotion, whatever is set around it.

    Optax counts updates in int32 and raises floats to that power, which a program with
    `jax_numpy_dtype_promotion="strict"` refuses to trace. This opens an exception for
    the transform and for nothing else.

    Args:
      tx: any transform.

    Returns:
      The same transform, with the same states and updates.
    """
    inner = optax.with_extra_args_support(tx)

    def init(params: Any) -> Any:
        with jax.numpy_dtype_promotion("standard"):
            return inner.init(params)

    def update(
        updates: Any, state: Any, params: Any = None, **extra_args: Any
    ) -> tuple[Any, Any]:
        with jax.numpy_dtype_promotion("standard"):
            return inner.update(updates, state, params, **extra_args)

    return optax.GradientTransformationExtraArgs(init, update)
