"""A constant learning rate that is data, so that runs at several share a program."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float


class RateState(NamedTuple):
    """State of `with_rate`.

    Attributes:
      rate: Float32, the learning rate.
      inner_state: State of the wrapped transform.
    """

    rate: Float[Array, ""]
    inner_state: Any


def with_rate(
    rate: float, tx: optax.GradientTransformation
) -> optax.GradientTransformationExtraArgs:
    """Multiplies the update of a transform, made at the rate 1, by a rate.

    The update of every optimizer here, weight decay included, is proportional to its
    learning rate. `update` reads the rate from the state alone.

    Args:
      rate: Constant, above 0.
      tx: The transform, with learning rate 1.

    Returns:
      The transform.

    Raises:
      ValueError: The rate is not a finite number above 0.
    """
    if not 0 < rate < float("inf"):
        raise ValueError(f"learning_rate is {rate}; expected a number above 0")
    inner = optax.with_extra_args_support(tx)

    def init(params: Any) -> RateState:
        return RateState(jnp.float32(rate), inner.init(params))

    def update(
        updates: Any, state: RateState, params: Any = None, **extra_args: Any
    ) -> tuple[Any, RateState]:
        updates, inner_state = inner.update(
            updates, state.inner_state, params, **extra_args
        )
        updates = jax.tree.map(lambda u: u * state.rate.astype(u.dtype), updates)
        return updates, RateState(state.rate, inner_state)

    return optax.GradientTransformationExtraArgs(init, update)
