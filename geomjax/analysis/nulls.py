"""The nulls of a checkpoint pair: updates of equal norm without structure."""

import math
import zlib
from collections.abc import Sequence
from typing import Any, Literal

import jax
import numpy as np
from jaxtyping import Array, Float

from geomjax.analysis.measure import StackPlan
from geomjax.geometry import null
from geomjax.typing import PRNGKey
from geomjax.update import form, to_bfloat16

Kind = Literal["gaussian", "rounded"]
KINDS: tuple[Kind, ...] = ("gaussian", "rounded")


def tensor_key(seed: int, name: str) -> Array:
    """A PRNG key that depends on the seed and the tensor's name alone."""
    return jax.random.fold_in(jax.random.key(seed), zlib.crc32(name.encode()))


def draw(
    source: Float[np.ndarray, "*s"],
    tuned: Float[np.ndarray, "*s"],
    key: PRNGKey,
    *,
    plan: StackPlan,
    kind: Kind,
) -> tuple[Float[np.ndarray, "*s"], Float[np.ndarray, "*s"]]:
    """W and W + D0, D0 being a null with the norm of the update; under x64.

    Args:
        source: W in storage dtype.
        tuned: W', which gives the null its norm.
        key: PRNG key of the tensor.
        plan: how D is formed.
        kind: `gaussian` or `rounded`, see `geomjax.geometry.null`.

    Returns:
        Both sides, in float32 for a Gaussian null: rounded to bfloat16 it would be the
        other one.
    """
    length = null.chunk_length(source.size)
    before, after = (_chunks(side, length) for side in (source, tuned))
    formed = [
        form(w, w_tuned, delta=plan.delta, subtract=plan.subtract)
        for w, w_tuned in zip(before, after, strict=True)
    ]
    norm = np.sqrt(null.energy([d for _, _, d in formed]))
    norm = float(norm) if np.isfinite(norm) else 0.0
    counts = [min(length, source.size - i * length) for i in range(len(formed))]
    drawn = [
        null.noise(key, np.int32(i), np.int32(count), length=length)
        for i, count in enumerate(counts)
    ]
    if kind == "rounded":
        starts = [to_bfloat16(w) for w, _, _ in formed]
        scale = null.rounded_scale(starts, drawn, norm)
        move = null.rounded
    else:
        starts = [w.astype(np.float32) for w, _, _ in formed]
        scale = np.float32(norm / np.sqrt(null.energy(drawn)))
        move = null.gaussian
    moved = [move(w, g, scale) for w, g in zip(starts, drawn, strict=True)]
    shape = source.shape
    first, second = (_whole(side, shape) for side in (starts, moved))
    return first, second


def _chunks(tensor: Float[np.ndarray, "*s"], length: int) -> list[np.ndarray]:
    """Chunks of the entries, the last one filled up with zeros."""
    flat = tensor.reshape(-1)
    parts = [flat[i : i + length] for i in range(0, flat.size, length)]
    parts[-1] = np.pad(parts[-1], (0, length - parts[-1].size))
    return parts


def _whole(chunks: Sequence[Array], shape: tuple[int, ...]) -> np.ndarray:
    flat = np.concatenate([np.asarray(chunk) for chunk in chunks])
    return flat[: math.prod(shape)].reshape(shape)


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
