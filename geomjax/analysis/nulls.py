"""The nulls of a checkpoint pair: updates of equal norm without structure."""

import zlib
from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from geomjax.analysis.measure import StackPlan
from geomjax.geometry import null
from geomjax.geometry.sparsity import energy
from geomjax.update import form, to_bfloat16

Kind = Literal["gaussian", "rounded"]
KINDS: tuple[Kind, ...] = ("gaussian", "rounded")


def tensor_key(seed: int, name: str) -> Array:
    """A PRNG key that depends on the seed and the tensor's name alone."""
    return jax.random.fold_in(jax.random.key(seed), zlib.crc32(name.encode()))


def null_keys(seed: int, names: Sequence[str]) -> Array:
    """`tensor_key` of a stack."""
    return jnp.stack([tensor_key(seed, name) for name in names])


@partial(jax.jit, static_argnames=("plan", "kind"))
def draw(
    source: Float[Array, "p *s"],
    tuned: Float[Array, "p *s"],
    keys: Array,
    *,
    plan: StackPlan,
    kind: Kind,
) -> tuple[Float[Array, "p *s"], Float[Array, "p *s"]]:
    """W and W + D0 of a stack, D0 being a null with the norm of its own update.

    Args:
        source: W of p tensors, in storage dtype.
        tuned: W', which gives each null its norm.
        keys: a PRNG key for each tensor.
        plan: how D is formed.
        kind: `gaussian` or `rounded`, see `geomjax.geometry.null`.

    Returns:
        Both sides, in float32 for a Gaussian null: rounded to bfloat16 it would be the
        other one.
    """
    w, _, d = form(source, tuned, delta=plan.delta, subtract=plan.subtract)
    norms = jnp.sqrt(energy(d.reshape(d.shape[0], -1)))
    norms = jnp.where(jnp.isfinite(norms), norms, 0)
    if kind == "rounded":
        return to_bfloat16(w), jax.vmap(null.rounded)(keys, w, norms)
    drawn = jax.vmap(partial(null.gaussian, shape=w.shape[1:]))(keys, norms)
    start = w.astype(jnp.float32)
    return start, start + drawn


def null_plan(plan: StackPlan, kind: Kind) -> StackPlan:
    """How a null is measured: in float32 if it is Gaussian, else like the update."""
    if kind == "gaussian":
        return plan._replace(delta="master")
    return plan._replace(delta="stored")


def mean_over_seeds(summaries: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The mean of equal-shaped aggregates, entry by entry, None where one has none."""
    first = summaries[0]
    out: dict[str, Any] = {}
    for key, value in first.items():
        values = [summary[key] for summary in summaries]
        if isinstance(value, dict):
            out[key] = mean_over_seeds(values)
        elif any(v is None for v in values):
            out[key] = None
        elif isinstance(value, int):
            out[key] = value
        else:
            out[key] = float(np.mean(values))
    return out
