"""Curves of a few representative matrices: spectra, principal angles, near-zero bias.

The tables hold numbers; these are the curves behind some of them, for figures. They
come from the same kernels and nulls, and fit into a small JSON file.
"""

from collections.abc import Collection, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from geomjax.analysis import nulls
from geomjax.analysis.measure import StackPlan
from geomjax.analysis.operands import Operands
from geomjax.checkpoints import CheckpointSource
from geomjax.checkpoints.matching import Match
from geomjax.geometry import spectrum, subspace
from geomjax.geometry.sparsity import fraction
from geomjax.names import classify
from geomjax.update import Delta, Subtract, form

BINS = 20
MOST_MATRICES = 6


class Spectra(NamedTuple):
    """Curves of one update, in float64.

    Attributes:
        source: singular values of W, descending.
        delta: those of D.
        left: principal angles of the left subspaces in degrees, ascending; NaN where
            a subspace is not unique.
        right: those of the right subspaces.
    """

    source: Float[Array, " r"]
    delta: Float[Array, " r"]
    left: Float[Array, " k"]
    right: Float[Array, " k"]


class NearZero(NamedTuple):
    """The update in bins of equal count of |W|, from the smallest weights up.

    Attributes:
        size: mean |D| of a bin over the root mean square of D; NaN for a zero update.
        changed: share of the bin's entries with D other than 0.
    """

    size: Float[Array, " q"]
    changed: Float[Array, " q"]


@partial(jax.jit, static_argnames="k")
def spectra(
    source: Float[Array, "m n"],
    tuned: Float[Array, "m n"],
    delta: Float[Array, "m n"],
    *,
    k: int,
) -> Spectra:
    """Singular values of W and D, and the principal angles between W and W'.

    Call it in `with jax.enable_x64(True):`.

    Args:
        source: W.
        tuned: W'.
        delta: D.
        k: dimensions of the leading subspaces, in [1, min(m, n)].

    Returns:
        The curves.
    """
    x = Operands(source[None], tuned[None], delta[None], directions=k)
    defined = x.both_defined(k)[0]

    def degrees(side):
        ascending = subspace.angles(x.sines(side, [k])[0])[0, ::-1]
        return jnp.where(defined, jnp.rad2deg(ascending), jnp.nan)

    return Spectra(
        x.source_factors.values[0],
        x.delta_values[0],
        degrees("left"),
        degrees("right"),
    )


@partial(jax.jit, static_argnames="bins")
def near_zero(
    source: Float[Array, "m n"], delta: Float[Array, "m n"], *, bins: int = BINS
) -> NearZero:
    """Size and frequency of changes against the quantile of |W|.

    Entries are sorted by |W|, equal ones in the order of the matrix, and bin i holds
    those from `i * mn // bins` up to `(i + 1) * mn // bins`.

    Args:
        source: W.
        delta: D.
        bins: number of bins, at most mn.

    Returns:
        The two curves, of length `bins`.
    """
    order = jnp.argsort(jnp.abs(source).reshape(-1), stable=True)
    d = delta.reshape(-1)[order].astype(jnp.result_type(float))
    edges = [i * d.size // bins for i in range(bins + 1)]
    parts = [d[a:b] for a, b in zip(edges, edges[1:], strict=False)]
    means = jnp.stack([jnp.mean(jnp.abs(part)) for part in parts])
    rms = jnp.sqrt(jnp.mean(jnp.square(d)))
    return NearZero(means / rms, jnp.stack([fraction(part != 0) for part in parts]))


def representative(
    matched: Sequence[Match],
    *,
    exclude: Collection[str] = (),
    limit: int = MOST_MATRICES,
) -> list[Match]:
    """The largest matrix of each module in the middle layer, at most `limit` of them.

    The middle of L layers is layer L // 2. Blocks of a vision tower, which are numbered
    on their own, are left out, as are matrices with a single row or column. Where there
    are more modules than `limit`, those with the larger matrices are kept.

    Args:
        matched: the tensors of a pair.
        exclude: names to leave out, such as those that are not finite.
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
        if item.name in exclude:
            continue
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
    *,
    delta: Delta = "stored",
    subtract: Subtract = "bfloat16",
    angle_rank: int | None = None,
    seed: int | None = 0,
) -> list[dict[str, Any]]:
    """Measures the curves of some matrices, and of their nulls.

    The spectrum and the angles have the Gaussian null, the near-zero bias the rounding
    null: those of the tables, drawn anew from the same seed.

    Args:
        source: the checkpoint before training.
        tuned: the checkpoint after it.
        matched: matrices to measure, such as those of `representative`.
        delta: see `geomjax.update.form`.
        subtract: likewise.
        angle_rank: dimensions of the principal angles; P2's by default.
        seed: seed of the nulls; None for no nulls.

    Returns:
        For each matrix its name, place and shape, with lists of numbers: plain JSON
        data, None where a curve is undefined.
    """
    plan = StackPlan(delta, subtract, ())
    out = []
    with jax.enable_x64(True):
        for item in matched:
            before, after = _sides(source, tuned, item)
            rank = _angle_rank(min(item.shape), angle_rank)
            record = {
                "name": item.name,
                **classify(item.name)._asdict(),
                "shape": list(item.shape),
                "update": _describe(before, after, plan, rank, None, item.name),
                "null": None
                if seed is None
                else _describe(before, after, plan, rank, seed, item.name),
            }
            out.append(record)
    return out


def _angle_rank(r: int, wanted: int | None) -> int:
    """The rank that the column of principal angles uses."""
    k = spectrum.default_angle_rank(r) if wanted is None else wanted
    return k if k < r else r // 2


def _sides(
    source: CheckpointSource, tuned: CheckpointSource, item: Match
) -> tuple[np.ndarray, np.ndarray]:
    """W and W' in memory of their own, so that the files' pages can go."""
    out = []
    for side, key in ((source, item.source_key), (tuned, item.tuned_key)):
        out.append(np.array(side.read(key)[: item.shape[0]]))
        side.release(key)
    return out[0], out[1]


def _describe(
    before: np.ndarray,
    after: np.ndarray,
    plan: StackPlan,
    rank: int,
    seed: int | None,
    name: str,
) -> dict[str, list[float] | None]:
    """Curves of the update itself, or of its nulls under a seed."""
    if seed is None:
        spectral = form(before, after, delta=plan.delta, subtract=plan.subtract)
        stored = spectral
    else:
        key = nulls.tensor_key(seed, name)
        sides = []
        for kind in nulls.KINDS:
            pair = nulls.draw(before, after, key, plan=plan, kind=kind)
            of_null = nulls.null_plan(plan, kind)
            formed = form(*pair, delta=of_null.delta, subtract=of_null.subtract)
            sides.append(formed)
        spectral, stored = sides
    # One program serves both dtypes: bfloat16 values are exact in float32.
    found = spectra(*(x.astype(jnp.float32) for x in spectral), k=rank)
    w, _, d = (x.astype(jnp.float32) for x in stored)
    binned = near_zero(w, d, bins=min(BINS, w.size))
    curves = jax.device_get({**found._asdict(), **binned._asdict()})
    return {key: _finite(values) for key, values in curves.items()}


def _finite(values: np.ndarray) -> list[float] | None:
    return values.tolist() if np.all(np.isfinite(values)) else None
