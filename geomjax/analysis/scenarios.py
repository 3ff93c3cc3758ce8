"""What columns are worth when only leading singular values are known, with bounds.

A metric's kernel is a function of what the passes over a matrix found. Where some of
that is known only to lie in a range, the kernel is evaluated for many matrices at once,
the scenarios: the first with the values found, the others with the ends of the ranges.
The largest deviation from the first is the error bound of a column.

Ranges are taken at their ends, so this bounds every column that is monotone in each of
its arguments, as all of ours are, one argument at most against the others, as in the
Hill exponent. Singular values of D below the leading ones share the energy that is left
over: evenly in one scenario, in as few as possible in another. Of all spectra with
these leading values and this energy the two are the extremes by majorization, and so
bound what is Schur-concave in the spectrum, as the entropy is. `rank_fraction`, which
counts, is bounded on its own.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from geomjax.analysis.between import Finished, Values
from geomjax.analysis.metric import Metric
from geomjax.analysis.metrics import RANK_THRESHOLDS
from geomjax.analysis.needs import Needs
from geomjax.analysis.programs import Measured
from geomjax.analysis.reductions import Reductions
from geomjax.geometry.krylov import Leading


class Known(NamedTuple):
    """What is known of a column: a value, and how far off it may be.

    Attributes:
        value: NaN where undefined.
        error: bound on its error; 0 where it is exact, infinite where not known.
    """

    value: float
    error: float


class Spectra(NamedTuple):
    """The leading singular values and vectors of W, W' and D; None where not needed."""

    source: Leading | None
    tuned: Leading | None
    delta: Leading | None

    def source_sine(self, rank: int) -> float:
        """Bound on the sines of W's leading subspace of a rank; infinite if unknown."""
        return _sine(self.source, rank)

    def both_sines(self, rank: int) -> float:
        """The sum of those of W and of W'."""
        return _sine(self.source, rank) + _sine(self.tuned, rank)


def _sine(leading: Leading | None, rank: int) -> float:
    if leading is None or rank > len(leading.values):
        return np.inf
    if rank == leading.short.shape[-1]:
        return 0.0
    return float(leading.sines[rank - 1])


def evaluate(
    metrics: Sequence[Metric],
    measured: Measured,
    spectra: Spectra,
    needs: Needs,
    shape: tuple[int, ...],
    *,
    rounded: bool,
) -> dict[str, Known]:
    """Evaluates the kernels of metrics, with bounds.

    Args:
        metrics: the table; what a metric without `needs` would give is not known.
        measured: sums of one matrix; `finished` in the order of `needs`, NaN where a
            subspace is not known.
        spectra: singular values.
        needs: what all metrics need together.
        shape: of the matrix, in checkpoint orientation.
        rounded: whether D was rounded to bfloat16.

    Returns:
        What is known of each column.
    """
    r = min(shape)
    deltas = _delta_spectra(spectra.delta, r)
    total = float(measured.first.energies[0, 2])
    finished = _finished(measured.finished, spectra, needs, total)
    count = len(deltas) + len(finished)
    ones = np.ones(count, np.int64)
    values = np.concatenate([deltas, np.repeat(deltas[:1], len(finished), axis=0)])

    def repeat(tree):
        return _map(lambda x: np.repeat(np.asarray(x), count, axis=0), tree)

    def fill(leading):
        return None if leading is None else np.outer(ones, _with_unknown(leading, r))

    source = fill(spectra.source)
    of_all = Values(source, fill(spectra.tuned), values)
    first = [measured.finished] * len(deltas)
    batch = Measured(
        first=repeat(measured.first),
        values=of_all,
        below=repeat(measured.below),
        finished=_stack([*first, *finished]),
    )

    def reductions(batch):
        return Reductions(batch, [shape] * count, needs, rounded=rounded)

    # The principal masks are cut from a reconstruction of W, whose error is not bounded
    # entry by entry: they are known where all of W's vectors are.
    unknown = source is not None and np.isnan(source).any()
    without_masks = reductions(
        batch._replace(values=of_all._replace(source=np.full_like(source, np.nan)))
        if unknown
        else batch
    )
    with_masks = reductions(batch)
    found: dict[str, Known] = {}
    for metric in metrics:
        if metric.needs is None:
            found |= {c.name: Known(np.nan, np.inf) for c in metric.columns}
            continue
        masks = metric.needs(r, rounded).masks
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            out = metric.kernel(without_masks if masks else with_masks)
        found |= {c.name: _known(np.asarray(out[c.name])) for c in metric.columns}
    return found | _rank_fractions(found, spectra.delta, r)


def _map(f, tree: Any) -> Any:
    """Applies f to the arrays of nested tuples, None left as it is."""
    if tree is None:
        return None
    if isinstance(tree, tuple):
        parts = [_map(f, part) for part in tree]
        return type(tree)(*parts) if hasattr(tree, "_fields") else tuple(parts)
    return f(tree)


def _stack(trees: Sequence[Any]) -> Any:
    if trees[0] is None:
        return None
    if isinstance(trees[0], tuple):
        parts = [_stack(part) for part in zip(*trees, strict=True)]
        kind = type(trees[0])
        return kind(*parts) if hasattr(kind, "_fields") else tuple(parts)
    return np.concatenate([np.asarray(tree) for tree in trees])


def _known(values: Float[np.ndarray, " s"]) -> Known:
    values = values.astype(np.float64)
    if np.isnan(values[0]):
        return Known(np.nan, 0.0)
    error = np.max(np.abs(values - values[0]))
    return Known(float(values[0]), float(error) if np.isfinite(error) else np.inf)


def _with_unknown(leading: Leading, r: int) -> Float[np.ndarray, " r"]:
    """The leading values, and NaN for the others."""
    out = np.full(r, np.nan)
    out[: len(leading.values)] = leading.values
    return out


def _delta_spectra(leading: Leading | None, r: int) -> Float[np.ndarray, "s r"]:
    """Spectra of D within the bounds, the first with the values found."""
    if leading is None:
        return np.full((1, r), np.nan)
    values, error = (np.asarray(x, np.float64) for x in leading[:2])
    k = len(values)
    up = values + error
    single = np.where(np.eye(k, dtype=bool), up[None], values[None])
    others = np.where(np.eye(k, dtype=bool), values[None], up[None])
    corners = np.concatenate([values[None], up[None], single, others])
    energy = float(leading.energy)
    top = min(float(leading.next), float(values[-1]))
    spectra = [_complete(c, energy, top, r, evenly=True) for c in corners]
    if k < r:
        spectra.append(_complete(values, energy, top, r, evenly=False))
    return np.stack(spectra)


def _complete(
    leading: Float[np.ndarray, " k"], energy: float, top: float, r: int, *, evenly: bool
) -> Float[np.ndarray, " r"]:
    """A spectrum with given leading values and energy, the others at most `top`."""
    k = len(leading)
    out = np.zeros(r)
    out[:k] = leading
    rest = max(energy - float(np.sum(np.square(leading))), 0.0)
    if evenly and k < r:
        out[k:] = np.sqrt(rest / (r - k))
    elif top > 0:
        full = min(r - k, int(rest / top**2))
        out[k : k + full] = top
        if k + full < r:
            out[k + full] = np.sqrt(max(rest - full * top**2, 0.0))
    return out


def _finished(
    finished: Finished | None, spectra: Spectra, needs: Needs, total: float
) -> list[Finished]:
    """Ends of the ranges of energies and sines."""
    if finished is None:
        return []

    def ends(sign):
        short = [
            np.clip(s + sign * spectra.both_sines(k), 0, 1)
            for k, s in zip(needs.sine_ranks, finished.short_sines, strict=True)
        ]
        long = [
            np.clip(s + sign * spectra.both_sines(k), 0, 1)
            for k, s in zip(needs.sine_ranks, finished.long_sines, strict=True)
        ]
        energies = finished.energies
        if energies is not None and spectra.source is not None:
            # The long side's subspace turns no further than the short side's.
            sines = [min(1.0, spectra.source_sine(k)) for k in needs.energy_ranks]
            turned = np.asarray(sines)[None]
            energies = tuple(
                np.clip(part + sign * sides * turned * total, 0, total)
                for part, sides in zip(energies, (1, 1, 2), strict=True)
            )
        return finished._replace(
            short_sines=tuple(short), long_sines=tuple(long), energies=energies
        )

    return [ends(1.0), ends(-1.0)]


def _rank_fractions(
    found: dict[str, Known], leading: Leading | None, r: int
) -> dict[str, Known]:
    """Shares of `sigma_i > t sigma_1`, by what the values and the energy allow."""
    out: dict[str, Known] = {}
    if leading is None or float(leading.values[0]) == 0:
        return out
    values, error = (np.asarray(x, np.float64) for x in leading[:2])
    rest = max(float(leading.energy) - float(np.sum(np.square(values))), 0.0)
    for threshold in RANK_THRESHOLDS:
        name = f"rank_fraction_{threshold:.0e}"
        if name not in found:
            continue
        least = int(np.sum(values > threshold * (values[0] + error[0])))
        cut = threshold * values[0]
        most = int(np.sum(values + error > cut))
        if most == len(values) < r and float(leading.next) > cut:
            most += min(r - len(values), int(rest / cut**2))
        middle, width = (least + most) / 2, (most - least) / 2
        out[name] = Known(middle / r, width / r)
    return out
