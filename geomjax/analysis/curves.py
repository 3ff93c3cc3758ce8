"""Curves of a few representative matrices: spectra, principal angles, near-zero bias.

The tables hold numbers; these are the curves behind some of them, for figures. Spectra
and angles are those that the run has measured and kept; what is added here is a sort of
the weights by size.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float

from geomjax.analysis import nulls
from geomjax.analysis.measure import StackPlan
from geomjax.checkpoints import CheckpointSource
from geomjax.checkpoints.matching import Match
from geomjax.names import classify
from geomjax.update import Delta, Subtract, form

BINS = 20
MOST_MATRICES = 6


class NearZero(NamedTuple):
    """The update in bins of equal count of |W|, from the smallest weights up.

    Attributes:
        size: mean |D| of a bin over the root mean square of D; NaN for a zero update.
        changed: share of the bin's entries with D other than 0.
    """

    size: Float[np.ndarray, " q"]
    changed: Float[np.ndarray, " q"]


def near_zero(
    source: Float[np.ndarray, "*s"], delta: Float[np.ndarray, "*s"], *, bins: int = BINS
) -> NearZero:
    """Size and frequency of changes against the quantile of |W|.

    Entries are sorted by |W|, equal ones in the order of the matrix, and bin i holds
    those from `i * mn // bins` up to `(i + 1) * mn // bins`.

    Args:
        source: W, bfloat16 or float32.
        delta: D.
        bins: number of bins, at most mn.

    Returns:
        The two curves, of length `bins`.
    """
    # By bit pattern: NumPy sorts 16 of them by radix.
    magnitudes = np.abs(source.reshape(-1))
    bits = magnitudes.view(np.uint16 if source.dtype.itemsize == 2 else np.uint32)
    order = np.argsort(bits, kind="stable")
    d = np.abs(delta.reshape(-1)[order].astype(np.float64))
    edges = [i * d.size // bins for i in range(bins + 1)]
    means = np.add.reduceat(d, edges[:-1]) / np.diff(edges)
    changed = np.add.reduceat((d > 0).astype(np.int64), edges[:-1]) / np.diff(edges)
    with np.errstate(invalid="ignore"):
        return NearZero(means / np.sqrt(np.mean(np.square(d))), changed)


def representative(
    matched: Sequence[Match],
    *,
    limit: int = MOST_MATRICES,
) -> list[Match]:
    """The largest matrix of each module in the middle layer, at most `limit` of them.

    The middle of L layers is layer L // 2. Blocks of a vision tower, which are numbered
    on their own, are left out, as are matrices with a single row or column. Where there
    are more modules than `limit`, those with the larger matrices are kept.

    Args:
        matched: the tensors of a pair.
        limit: most matrices.

    Returns:
        Tensors in the order of `matched`; none if the model has no layers.
    """
    layers: dict[int, list[Match]] = {}
    for item in matched:
        layer, _, group = classify(item.name)
        usable = len(item.shape) == 2 and min(item.shape) > 1
        if layer is not None and group != "vision" and usable:
            layers.setdefault(layer, []).append(item)
    if not layers:
        return []
    largest: dict[str, Match] = {}
    for item in layers[sorted(layers)[len(layers) // 2]]:
        module = classify(item.name).module
        if module not in largest or _size(item) > _size(largest[module]):
            largest[module] = item
    kept = sorted(largest.values(), key=_size, reverse=True)[:limit]
    names = {item.name for item in kept}
    return [item for item in matched if item.name in names]


def _size(item: Match) -> int:
    return int(np.prod(item.shape))


def measure_curves(
    source: CheckpointSource,
    tuned: CheckpointSource,
    matched: Sequence[Match],
    spectra: Mapping[str, Any],
    *,
    delta: Delta = "stored",
    subtract: Subtract = "bfloat16",
    seed: int | None = 0,
) -> list[dict[str, Any]]:
    """Puts the curves of some matrices together, and those of their nulls.

    The spectrum and the angles have the Gaussian null, both measured by the run; the
    near-zero bias has the rounding null, drawn anew from the same seed.

    Args:
        source: the checkpoint before training.
        tuned: the checkpoint after it.
        matched: the tensors of the pair.
        spectra: `RunResult.spectra`: which matrices, and their spectra and angles.
        delta: see `geomjax.update.form`.
        subtract: likewise.
        seed: seed of the nulls; None for no nulls.

    Returns:
        For each matrix its name, place and shape, with lists of numbers: plain JSON
        data, None where a curve is undefined.
    """
    plan = StackPlan(delta, subtract, ())
    out = []
    with jax.enable_x64(True):
        for item in matched:
            if item.name not in spectra:
                continue
            before, after = _sides(source, tuned, item)
            found = dict(spectra[item.name])
            found["update"] = found["update"] | _binned(before, after, plan)
            if seed is not None:
                key = nulls.tensor_key(seed, item.name)
                pair = nulls.draw(before, after, key, plan=plan, kind="rounded")
                of_null = nulls.null_plan(plan, "rounded")
                found["null"] = found["null"] | _binned(*pair, of_null)
            place = classify(item.name)._asdict()
            shape = {"name": item.name, **place, "shape": list(item.shape)}
            out.append({**shape, "null": None, **found})
    return out


def _sides(
    source: CheckpointSource, tuned: CheckpointSource, item: Match
) -> tuple[np.ndarray, np.ndarray]:
    """W and W' in memory of their own, so that the files' pages can go."""
    out = []
    for side, key in ((source, item.source_key), (tuned, item.tuned_key)):
        out.append(np.array(side.read(key)[: item.shape[0]]))
        side.release(key)
    return out[0], out[1]


def _binned(
    before: np.ndarray, after: np.ndarray, plan: StackPlan
) -> dict[str, list[float] | None]:
    formed = form(before, after, delta=plan.delta, subtract=plan.subtract)
    w, _, d = jax.device_get(formed)
    found = near_zero(w, d, bins=min(BINS, w.size))
    return {
        name: part.tolist() if np.isfinite(part).all() else None
        for name, part in found._asdict().items()
    }
