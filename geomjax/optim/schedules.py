"""Learning rates as functions of the update count."""

import math

import jax
import optax
from jaxtyping import Array, Float

_NAMES = ("constant", "linear", "cosine")


def learning_rate_schedule(
    name: str,
    peak: float | Float[Array, ""],
    *,
    warmup_steps: int = 0,
    total_steps: int | None = None,
) -> optax.Schedule:
    r"""A learning rate that warms up linearly, then stays, or decays to zero.

    With :math:`w` warm-up steps out of :math:`n`, for the update count :math:`t` from
    0, the rate is :math:`t/w` times the peak while :math:`t < w`, and then, with
    :math:`s = \min(1, (t-w)/(n-w))`, the peak times 1 (constant), :math:`1-s` (linear)
    or :math:`(1 + \cos \pi s)/2` (cosine). The first update of a warm-up is zero.

    Args:
      name: what follows the warm-up: "constant", "linear" or "cosine".
      peak: the learning rate after the warm-up; a traced one is not checked.
      warmup_steps: optimizer updates of linear warm-up, 0 for none.
      total_steps: optimizer updates in all, warm-up included; unused by "constant".

    Returns:
      An optax schedule, from update count to learning rate.

    Raises:
      ValueError: an unknown name, a peak that is negative or not finite, steps that
        leave no room for a decay.
    """
    if name not in _NAMES:
        raise ValueError(f"schedule: got {name!r}, expected one of {list(_NAMES)}")
    traced = isinstance(peak, jax.core.Tracer)
    if not traced and not (math.isfinite(peak) and peak >= 0):
        raise ValueError(f"learning_rate: got {peak}, expected a finite number >= 0")
    if warmup_steps < 0:
        raise ValueError(f"warmup_steps: got {warmup_steps}, expected 0 or more")
    if name == "constant":
        after = optax.constant_schedule(peak)
    else:
        if total_steps is None or total_steps <= warmup_steps:
            raise ValueError(
                f"total_steps: got {total_steps}, expected more than warmup_steps ="
                f" {warmup_steps}, since the {name} schedule decays between them"
            )
        decay_steps = total_steps - warmup_steps
        after = (
            optax.linear_schedule(peak, 0.0, decay_steps)
            if name == "linear"
            else optax.cosine_decay_schedule(peak, decay_steps)
        )
    if warmup_steps == 0:
        return after
    warmup = optax.linear_schedule(0.0, peak, warmup_steps)
    return optax.join_schedules([warmup, after], [warmup_steps])
