"""What lies between the passes over a stack's blocks, and after the last of them.

    solve     singular values and vectors of the short side, thresholds
    begin     starts what no pass waits for
    cut       where the masks and the largest coordinates end
    finish    sines of the angles, energies, tables

All of it is done on the host on every backend, in float64 and int64. What is not small
beside the passes are the eigenproblems: see `geomjax.geometry.lapack`.
"""

# The plan says which of the optional results are there; the type checker cannot know.
# mypy: disable-error-code="arg-type, index, misc, operator, union-attr"

import os
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from typing import NamedTuple

import ml_dtypes
import numpy as np
from jaxtyping import Float, Int

from geomjax.analysis.needs import Needs
from geomjax.analysis.rounds import Cuts, First, Known, Plan, Second, Third
from geomjax.geometry import factor, lapack, masks, sparsity, subspace
from geomjax.geometry.factor import Factors
from geomjax.geometry.select import Cut, locate, refine, upto


class Sizes(NamedTuple):
    """What must be known of each tensor's size.

    Attributes:
        numel: entries.
        coordinates: how many the largest coordinates are, for each share.
        masks: entries of each mask.
    """

    numel: Int[np.ndarray, " p"]
    coordinates: Int[np.ndarray, "p f"]
    masks: Int[np.ndarray, "p q"]

    @property
    def smaller(self) -> Int[np.ndarray, "p f"]:
        """Which entry by size, from 1, is the least of the largest coordinates."""
        return self.numel[:, None] - self.coordinates + 1

    @property
    def outside(self) -> Int[np.ndarray, "p q"]:
        """Which entry by size, from 1, is the least of each principal mask."""
        return self.numel[:, None] - self.masks + 1


class Solved(NamedTuple):
    """Factors and thresholds, from the first pass; what is not needed is None.

    Attributes:
        source: factors of W.
        tuned: factors of W'.
        limits: of |D|, in float32.
        low: upper 16 bits of where each low mask ends.
        coordinates: those of where the largest coordinates end.
        counts: of |D|, where `Plan.counted`.
    """

    source: Factors | None
    tuned: Factors | None
    limits: Float[np.ndarray, "p t"] | None
    low: Cut | None
    coordinates: Cut | None
    counts: Int[np.ndarray, "p bins"] | None

    @property
    def below(self) -> Int[np.ndarray, "p t"] | None:
        """Entries up to each limit, where `counts` tells them."""
        if self.counts is None or self.limits is None:
            return None
        return upto(self.counts, self.limits)

    @property
    def known(self) -> Known:
        """What the later passes must know of it."""

        def bins(cut):
            return None if cut is None else cut.threshold.astype(np.int32)

        return Known(
            self.source, self.tuned, self.limits, bins(self.low), bins(self.coordinates)
        )


class Ends(NamedTuple):
    """Where masks and the largest coordinates end; what is not needed is None.

    Attributes:
        low: of the low masks.
        principal: upper bits of the key of where each principal mask ends.
        coordinates: of the largest coordinates.
    """

    low: Cut | None
    principal: Cut | None
    coordinates: Cut | None

    @property
    def cuts(self) -> Cuts:
        """What the third pass must know of it."""

        def keys(cut, dtype):
            return None if cut is None else cut.threshold.astype(dtype)

        return Cuts(
            keys(self.low, np.uint32),
            keys(self.principal, np.int32),
            keys(self.coordinates, np.uint32),
        )


class Finished(NamedTuple):
    """What the last pass gives in the end; what is not needed is None."""

    short_sines: tuple[Float[np.ndarray, "p k"], ...]
    long_sines: tuple[Float[np.ndarray, "p k"], ...]
    energies: tuple[Float[np.ndarray, "p n"], ...] | None
    tables: Int[np.ndarray, "p q 3 3 3"] | None
    coordinates: Float[np.ndarray, "p f"] | None


def counted(total: First, plan: Plan) -> First:
    """The sums of the first pass, with what the histogram of D tells."""
    if not (plan.counted and plan.needs.atols):
        return total
    limits = np.asarray(sparsity.float32_upto(np.asarray(plan.needs.atols)))
    limits = np.broadcast_to(limits, (len(total.delta_keys), len(limits)))
    return total._replace(within=upto(total.delta_keys, limits))


def solve(total: First, sizes: Sizes, plan: Plan) -> Solved:
    """Factors and thresholds, from the sums of the first pass, on the host."""
    needs = plan.needs
    source = _factored(total.source_gram, needs.source_directions)
    tuned = _factored(total.tuned_gram, needs.tuned_directions)
    low = coordinates = None
    # Tensors that are not finite are among them, and left out later.
    with np.errstate(invalid="ignore", over="ignore"):
        limits = _limits(total, sizes, needs) if needs.rms_tolerances else None
    if needs.masks:
        low = locate(total.source_keys, sizes.masks)
    if needs.coordinate_fractions:
        coordinates = locate(total.delta_keys, sizes.smaller)
    counts = total.delta_keys if plan.counted else None
    return Solved(_joined(source), _joined(tuned), limits, low, coordinates, counts)


class Beside(NamedTuple):
    """What is computed beside the later passes, for each matrix of a stack.

    Attributes:
        delta: factors of D, without vectors; None: not needed.
        short_sines: sines on the short side, for each rank; empty: not needed.
    """

    delta: list[Future[Factors]] | None
    short_sines: list[Future[list[np.ndarray]]]


class Values(NamedTuple):
    """Singular values of W, W' and D, descending; what is not needed is None."""

    source: Float[np.ndarray, "p r"] | None
    tuned: Float[np.ndarray, "p r"] | None
    delta: Float[np.ndarray, "p r"] | None


def values(solved: Solved, beside: Beside) -> Values:
    """The singular values, once they are all there."""
    factors = (solved.source, solved.tuned, _joined(beside.delta))
    return Values(*(None if f is None else f.values for f in factors))


def begin(total: First, solved: Solved, needs: Needs) -> Beside:
    """Starts what no later pass waits for: these leave a core idle now and then."""
    delta = _factored(total.delta_gram, None if total.delta_gram is None else 0)
    short_sines = _short_sines(solved, needs.sine_ranks) if needs.sine_ranks else []
    return Beside(delta, short_sines)


def _limits(total: First, sizes: Sizes, needs: Needs) -> Float[np.ndarray, "p t"]:
    """The largest float32 below each tolerance times rms(W)."""
    rms = np.sqrt(total.energies[:, 0] / sizes.numel)[:, None]
    exact = rms * np.asarray(needs.rms_tolerances)
    if needs.rms_in_bfloat16:
        exact = exact.astype(np.float32).astype(ml_dtypes.bfloat16).astype(np.float64)
    # Below a limit is up to the float32 before it.
    return np.asarray(sparsity.float32_upto(np.nextafter(exact, 0)))


def _factored(
    rows: Sequence[np.ndarray] | None, k: int | None
) -> list[Future[Factors]] | None:
    """Factors of each matrix of a stack, all at work at the same time."""
    if k is None:
        return None
    return [
        _workers().submit(_factor, [part[i] for part in rows], k)
        for i in range(len(rows[0]))
    ]


def _factor(rows: Sequence[np.ndarray], k: int) -> Factors:
    lower = factor.lower(rows)
    if k:
        return factor.from_squares(*lapack.eigenpairs(lower, k))
    return factor.from_squares(lapack.eigenvalues(lower), lower[:0])


def _joined(parts: list[Future[Factors]] | None) -> Factors | None:
    if parts is None:
        return None
    return Factors(*map(np.stack, zip(*(part.result() for part in parts), strict=True)))


@lru_cache(maxsize=1)
def _workers() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(os.cpu_count() or 1, thread_name_prefix="lapack")


def cut(solved: Solved, total: Second, sizes: Sizes, needs: Needs) -> Ends:
    """Where the masks and the largest coordinates end, from the second pass."""
    low = principal = coordinates = None
    if needs.masks:
        low = refine(solved.low, sizes.masks, total.low)
        principal = locate(total.principal, sizes.outside)
    if needs.coordinate_fractions:
        coordinates = refine(solved.coordinates, sizes.smaller, total.coordinates)
    return Ends(low, principal, coordinates)


def finish(
    solved: Solved,
    beside: Beside,
    second: Second,
    ends: Ends,
    third: Third,
    sizes: Sizes,
    needs: Needs,
) -> Finished:
    """Sines, energies, tables and the energy of the largest coordinates."""
    inside = tables = coordinates = None
    long_sines = _long_sines(third, needs.sine_ranks)
    if needs.energy_ranks:
        short = solved.source.short[:, : max(needs.energy_ranks)]
        inside = subspace.energies(
            short, second.on_short, second.on_long, needs.energy_ranks
        )
    if needs.masks:
        at = sizes.outside - ends.principal.below
        tables = masks.joint_table(third.joint, at)
    if needs.coordinate_fractions:
        # Entries equal to the threshold carry equal energy: which of them are taken is
        # without effect.
        threshold, below, tied = ends.coordinates
        value = threshold.view(np.float32).astype(np.float64)
        if solved.counts is None:
            above = np.asarray(third.above)
        else:
            above = sparsity.energy_beyond(solved.counts, value)
        larger = sizes.numel[:, None] - below - tied
        coordinates = above + (sizes.coordinates - larger) * np.square(value)
    short_sines = _by_rank(beside.short_sines)
    return Finished(short_sines, long_sines, inside, tables, coordinates)


def _short_sines(
    solved: Solved, ranks: tuple[int, ...]
) -> list[Future[list[np.ndarray]]]:
    """For each matrix its sines on the short side for each rank."""
    k = max(ranks)

    def short(a, b):
        residuals = subspace.nested_residuals(a[:k], b[:k], ranks)
        return [_sine(residual) for residual in residuals]

    pairs = zip(solved.source.short, solved.tuned.short, strict=True)
    return [_workers().submit(short, *pair) for pair in pairs]


def _long_sines(third: Third, ranks: tuple[int, ...]) -> tuple[np.ndarray, ...]:
    """Sines on the long side, for each rank those of the stack."""
    if not ranks:
        return ()

    def long(i):
        return [_sine(factor.lower([x[i] for x in rows])) for rows in third.residuals]

    depth = len(third.residuals[0][0])
    return _by_rank([_workers().submit(long, i) for i in range(depth)])


def _by_rank(tasks: list[Future[list[np.ndarray]]]) -> tuple[np.ndarray, ...]:
    found = [task.result() for task in tasks]
    return tuple(map(np.stack, zip(*found, strict=True)))


def _sine(residual: Float[np.ndarray, "k k"]) -> Float[np.ndarray, " k"]:
    return np.sqrt(np.clip(lapack.eigenvalues(residual), 0, 1))
