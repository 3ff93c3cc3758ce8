"""Parameters that are stored in bfloat16 between steps, without float32 masters."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, UInt32

from geomjax.typing import PRNGKey

ROUNDINGS = ("nearest", "stochastic")


class StoredState(NamedTuple):
    """State of `stored_bfloat16`.

    Attributes:
      step: int32, updates done; the draws of an update depend on it.
      seed: uint32, that of the draws; data, so that runs of other seeds share a
        compiled step.
      inner_state: state of the wrapped transform.
    """

    step: Int[Array, ""]
    seed: UInt32[Array, ""]
    inner_state: Any


def stored_bfloat16(
    rounding: str, tx: optax.GradientTransformation, *, seed: int = 0
) -> optax.GradientTransformationExtraArgs:
    r"""Rounds the parameters to bfloat16 after every update.

    With the wrapped transform's update u, the parameters become
    :math:`p \leftarrow \mathrm{round}(p + u)`. Rounding to nearest loses every u below
    half a unit in the last place of p, between 2**-9 and 2**-8 of it, for good;
    stochastic rounding goes up or down with probabilities that make its mean exact, so
    that small updates are kept on average.

    The parameters are float32 arrays that hold bfloat16 values, and so is their update,
    `round(p + u) - p`. That difference, and its sum with p, are exact while p and the
    new value are within a factor of 2**15 of each other or one of them is 0; beyond it
    the sum is right to float32 precision. Put it outermost: nothing may change the
    update afterwards.

    Args:
      rounding: `nearest` (to even) or `stochastic`.
      tx: the transform to wrap; its moments are not rounded.
      seed: of the draws; its lowest 32 bits count.

    Returns:
      The transform; its `update` needs `params`, in float32, and rounds those of them
      that are no bfloat16 values yet.

    Raises:
      ValueError: an unknown rounding; from `update`, no parameters.
    """
    if rounding not in ROUNDINGS:
        raise ValueError(f"rounding: got {rounding!r}, expected one of {ROUNDINGS}")
    inner = optax.with_extra_args_support(tx)

    def init(params: Any) -> StoredState:
        low = jnp.uint32(seed % 2**32)
        return StoredState(jnp.int32(0), low, inner.init(params))

    def update(
        updates: Any, state: StoredState, params: Any = None, **extra_args: Any
    ) -> tuple[Any, StoredState]:
        if params is None:
            raise ValueError("stored_bfloat16: update needs the parameters")
        updates, inner_state = inner.update(
            updates, state.inner_state, params, **extra_args
        )
        key = jax.random.fold_in(jax.random.key(state.seed), state.step)
        leaves, treedef = jax.tree.flatten(params)
        keys = jax.tree.unflatten(
            treedef, [jax.random.fold_in(key, i) for i in range(len(leaves))]
        )

        def rounded(p, u, key):
            moved = p + u
            if rounding == "stochastic":
                return stochastic_round(key, moved) - p
            return jax.lax.reduce_precision(moved, 8, 7) - p

        updates = jax.tree.map(rounded, params, updates, keys)
        return updates, StoredState(state.step + 1, state.seed, inner_state)

    return optax.GradientTransformationExtraArgs(init, update)


def stochastic_round(key: PRNGKey, x: Float[Array, "*s"]) -> Float[Array, "*s"]:
    """Rounds float32 to one of the two bfloat16 values around it, right on average.

    The probability of the farther one is the distance to the nearer over the gap. What
    is a bfloat16 value already stays, infinities and NaN included.

    Args:
      key: PRNG key.
      x: float32.

    Returns:
      Float32 that holds bfloat16 values.

    Raises:
      ValueError: another dtype.
    """
    if x.dtype != jnp.float32:
        raise ValueError(f"stochastic_round: got {x.dtype}, expected float32")
    # A float's magnitude grows with its bits: adding a random number to the 16 that are
    # cut off carries into the 16 that stay with just that probability.
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    noise = jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32)
    cut = (bits + noise) & jnp.uint32(0xFFFF0000)
    rounded = jax.lax.bitcast_convert_type(cut, jnp.float32)
    return jnp.where(jnp.isfinite(x), rounded, x)
