"""A constant learning rate that is data, so that runs at several share a program."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from geomjax.typing import Params


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

    The update of every optimizer of `geomjax.optim.make`, weight decay included, is
    proportional to its learning rate; `require_proportional` refuses one of somebody
    else's that is not. `update` reads the rate from the state alone.

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


def require_proportional(
    make: Callable[[float], optax.GradientTransformation], params: Params
) -> None:
    """Refuses an optimizer whose update is not proportional to its learning rate.

    Two updates are made at each of two rates, with drawn gradients, of tensors with the
    parameters' names and at most 4 entries a side.

    Args:
      make: From a learning rate to the transform.
      params: Parameters, of which the shapes are read.

    Raises:
      ValueError: The updates of a tensor differ by more than their factor.
    """
    rng = np.random.default_rng(0)

    def draw() -> Params:
        return jax.tree.map(
            lambda x: jnp.asarray(rng.normal(size=[min(n, 4) for n in x.shape]), "f4"),
            params,
        )

    small, gradients = draw(), (draw(), draw())

    def updates(rate: float) -> list[Any]:
        tx = make(rate)
        found: list[Any] = []
        state = tx.init(small)
        for gradient in gradients:
            update, state = tx.update(gradient, state, small)
            found += map(np.asarray, jax.tree.leaves(update))
        return found

    whole, rate = updates(1.0), 1e-3
    for one, other in zip(whole, updates(rate), strict=True):
        scaled = rate * one
        if not np.linalg.norm(other - scaled) <= 1e-3 * np.linalg.norm(scaled):
            raise ValueError(
                "optimizer.transform: its update is not proportional to its learning "
                "rate, by which studies scale it; `optimizer_ablation` takes it"
            )
