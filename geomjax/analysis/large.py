"""Measures one matrix whose shorter side is past what a device can factor.

The passes of `rounds` over the blocks of a matrix are kept, but for the Gram matrices
and their eigenvectors: leading singular values and vectors of W, W' and D come from
`geometry.krylov`, three Krylov spaces that grow together, one read of each block a
step. With a mesh every device holds its share of the blocks, sums over them on its own,
and what is added up over devices at the end of a pass are a few hundred rows.

Columns are then what the leading values support, each with an error bound (see
`scenarios`), kept if it is below a tenth of the value. What is not known that well,
such as numbers of the whole spectrum of a matrix without decay or angles of subspaces
deep inside it, is null, and `notes` says in which range it lies.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array

from geomjax.analysis import between, rounds
from geomjax.analysis.between import Finished, Sizes, Solved, Values
from geomjax.analysis.measure import (
    Loaded,
    Numbers,
    Row,
    StackPlan,
    applicable,
    sizes_of,
    to_rows,
)
from geomjax.analysis.needs import Needs, combine
from geomjax.analysis.passes import Passes
from geomjax.analysis.programs import Measured
from geomjax.analysis.scenarios import Known, Spectra, evaluate
from geomjax.analysis.stacks import Stack
from geomjax.geometry import certify, krylov, lapack
from geomjax.geometry.factor import Factors
from geomjax.geometry.krylov import Leading
from geomjax.geometry.masks import SourceMask

BOUND_SUFFIX = "_error_bound"
MAX_FACTOR_DIM = 16384
"""Short side up to which a matrix is factored: its Gram matrices take 6 GiB there."""


class Effort(NamedTuple):
    """How much work goes into the leading values; memory is `6 r block depth` doubles.

    Attributes:
        k: singular values and vectors kept of each matrix.
        block: see `krylov.leading`.
        depth: likewise.
        probes: likewise.
        steps: likewise.
        seed: of the random rows and probes.
        tolerance: relative error bound up to which a column is given.
    """

    k: int = 192
    block: int = 32
    depth: int = 12
    probes: int = 32
    steps: int = 24
    seed: int = 0
    tolerance: float = 0.1

    def fitted(self, r: int) -> "Effort":
        """The same, within a matrix whose shorter side is r."""
        depth = min(self.depth, r)
        block = min(self.block, r // depth)
        length = block * depth
        k = min(self.k, length if length == r else (length + 1) // 2)
        return self._replace(block=block, depth=depth, k=k)


def is_large(stack: Stack, max_factor_dim: int) -> bool:
    """Whether a stack is a matrix whose short side is past what is factored."""
    layout = stack.layout
    return layout is not None and stack.is_matrix and layout.r > max_factor_dim


def measure_large(
    stack: Stack,
    loaded: Loaded,
    plan: StackPlan,
    *,
    mesh: Mesh | None = None,
    effort: Effort = Effort(),  # noqa: B008
) -> Row:
    """Measures one matrix; call it under `jax.enable_x64(True)`.

    Args:
        stack: a stack of this one matrix, of depth 1.
        loaded: its blocks.
        plan: how D is formed, and the metrics. One without `needs` is null: its kernel
            takes the whole tensor.
        mesh: devices that share the blocks.
        effort: work put into the leading values.

    Returns:
        Its row: the columns of every other row, and `<column>_error_bound` for those
        that are not exact.

    Raises:
        ValueError: the stack is not one matrix.
    """
    if len(stack.items) != 1 or not stack.is_matrix or stack.layout is None:
        raise ValueError(
            f"a stack of {len(stack.items)} tensors of shape {stack.kinds[0].shape}; "
            "expected a single matrix with entries"
        )
    shape = stack.kinds[0].shape
    r = min(shape)
    rounded = plan.delta == "stored" and plan.subtract == "bfloat16"
    metrics = applicable(plan.metrics, 2)
    needs = combine(m.needs(r, rounded) for m in metrics if m.needs is not None)
    passes = Passes(loaded.blocks, plan, mesh)
    sizes = sizes_of([shape], needs, depth=1)
    streamed = needs._replace(
        delta_values=False,
        source_directions=None,
        tuned_directions=None,
        sine_ranks=(),
        energy_ranks=(),
    )
    first = passes.sum(rounds.first, streamed)
    if int(first.not_finite[0]):
        missing = np.full((1, sum(len(m.columns) for m in metrics)), np.nan)
        return to_rows(stack, plan, Numbers(missing, np.asarray([False])))[0]
    effort = effort.fitted(r)
    spectra = _spectra(passes, first.energies[0], effort, shape)
    rows_plan = rounds.Plan(plan.delta, plan.subtract, streamed)
    first = between.counted(first, rows_plan)
    solved = between.solve(first, sizes, rows_plan)
    measured = _finish(passes, first.small, solved, spectra, needs, sizes)
    known = evaluate(metrics, measured, spectra, needs, shape, rounded=rounded)
    return _row(stack, plan, known, effort)


_begin = jax.jit(krylov.begin, static_argnames=("r", "block", "depth"))
_extend = jax.jit(krylov.extend, donate_argnums=0)
_compress = jax.jit(krylov.compress)
_rotate = jax.jit(krylov.rotate, static_argnames="k")
_spaces = jax.jit(krylov.spaces, static_argnames="probes")
_begin_probes = jax.jit(certify.begin, static_argnames="steps")
_advance = jax.jit(certify.advance, donate_argnums=0)
_assemble = jax.jit(krylov.assemble, static_argnames="long")


def _rayleigh_ritz(basis: krylov.Basis, k: int) -> tuple[Array, Array, Array]:
    """`krylov.rayleigh_ritz` with the eigenproblem on the host."""
    projected = np.array(jax.device_get(_compress(basis)), np.float64)
    return _rotate(basis, *lapack.eigenpairs(projected, len(projected)), k=k)


def _spectra(
    passes: Passes, energies: np.ndarray, effort: Effort, shape: tuple[int, ...]
) -> Spectra:
    """Leading singular values and vectors of W, W' and D."""
    r, (k, block, depth, probes, steps, seed, _) = min(shape), effort
    keys = [jax.random.fold_in(jax.random.key(seed), i) for i in range(3)]
    starts = [_begin(key, r=r, block=block, depth=depth) for key in keys]
    bases = [basis for basis, _ in starts]
    rows = [first for _, first in starts]
    for j in range(depth):
        images = passes.images(jnp.stack(rows))
        for i, key in enumerate(keys):
            bases[i], rows[i] = _extend(
                bases[i], j, rows[i], images[i], jax.random.fold_in(key, j)
            )
    found = (_rayleigh_ritz(basis, k) for basis in bases)
    ritz, residuals, short = zip(*found, strict=True)
    del bases, starts
    rest = [
        _begin_probes(
            jax.random.fold_in(key, depth),
            short[i],
            _spaces(ritz[i][:k], residuals[i], probes=probes),
            steps=steps,
        )
        for i, key in enumerate(keys)
    ]
    for j in range(steps):
        images = passes.images(jnp.stack([probe.rows for probe in rest]))
        rest = [_advance(p, j, images[i], short[i]) for i, p in enumerate(rest)]
    assembled = [
        _assemble(
            ritz[i], residuals[i], short[i], energies[i], rest[i], long=max(shape)
        )
        for i in range(3)
    ]
    return Spectra(*jax.device_get(assembled))


def _finish(
    passes: Passes,
    first: rounds.First,
    solved: Solved,
    spectra: Spectra,
    needs: Needs,
    sizes: Sizes,
) -> Measured:
    """The second and third pass, for the subspaces that are known."""
    assert spectra.source is not None
    k, r = spectra.source.short.shape
    given = needs._replace(
        sine_ranks=tuple(j for j in needs.sine_ranks if spectra.both_sines(j) < 1),
        energy_ranks=tuple(j for j in needs.energy_ranks if spectra.source_sine(j) < 1),
        # Of a larger rank the low mask alone is known, which has no rank.
        masks=tuple(SourceMask(min(m.rank, k), m.density) for m in needs.masks),
    )
    below, finished = solved.below, None
    if needs.second_pass:
        assert spectra.tuned is not None
        solved = solved._replace(
            source=_factors(spectra.source), tuned=_factors(spectra.tuned)
        )
        beside = between.begin(first, solved, given)
        second = passes.sum(rounds.second, given, solved.known)
        ends = between.cut(solved, second, sizes, given)
        third = passes.sum(rounds.third, given, solved.known, second.cosines, ends.cuts)
        finished = between.finish(solved, beside, second, ends, third, sizes, given)
        below = second.below if below is None else below
        finished = _with_gaps(finished, given, needs)
    return Measured(first, Values(None, None, None), below, finished)


def _factors(leading: Leading) -> Factors:
    return jax.tree.map(lambda x: np.asarray(x)[None], leading.factors())


def _with_gaps(finished: Finished, given: Needs, needs: Needs) -> Finished:
    """Results in the order of `needs`, NaN for subspaces that are not known."""

    def sines(parts):
        known = dict(zip(given.sine_ranks, parts, strict=True))
        return tuple(
            known[k] if k in known else np.full((1, k), np.nan)
            for k in needs.sine_ranks
        )

    energies: Any = None
    if needs.energy_ranks:
        parts = [np.full((1, len(needs.energy_ranks)), np.nan) for _ in range(3)]
        places = [needs.energy_ranks.index(k) for k in given.energy_ranks]
        for part, found in zip(parts, finished.energies or (), strict=False):
            part[:, places] = found
        energies = tuple(parts)
    return finished._replace(
        short_sines=sines(finished.short_sines),
        long_sines=sines(finished.long_sines),
        energies=energies,
    )


def _row(stack: Stack, plan: StackPlan, known: dict[str, Known], effort: Effort) -> Row:
    """The row, with bounds, and in `notes` what is not known well enough."""
    columns = [c.name for m in applicable(plan.metrics, 2) for c in m.columns]
    loose = {
        name: column
        for name, column in known.items()
        if not column.error <= effort.tolerance * abs(column.value)
    }
    values = [math.nan if c in loose else known[c].value for c in columns]
    numbers = Numbers(np.asarray([values]), np.asarray([True]))
    row = to_rows(stack, plan, numbers)[0]
    ranges, unknown = [], []
    for name, (value, error) in known.items():
        if row[name] is not None:
            if error > 0:
                row[name + BOUND_SUFFIX] = error
        elif math.isfinite(value) and math.isfinite(error):
            ranges.append(
                f"{name} in [{max(value - error, 0):.4g}, {value + error:.4g}]"
            )
        elif not name.endswith(("_chance", "_min", "_max")):
            unknown.append(name)
    if row["delta_frobenius"] and (ranges or unknown):
        notes = f"from the leading {effort.k} singular values by matrix products"
        notes += f"; known to lie {', '.join(ranges)}" if ranges else ""
        notes += f"; not known: {' '.join(unknown)}" if unknown else ""
        row["notes"] = notes
    return row
