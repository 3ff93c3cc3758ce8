"""From a stack of tensors to one row of numbers for each of them."""

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float

from geomjax.analysis.between import Sizes
from geomjax.analysis.metric import Column, Metric
from geomjax.analysis.metrics import rank_of_angles
from geomjax.analysis.needs import Needs, combine
from geomjax.analysis.operands import Operands
from geomjax.analysis.programs import Layout, Programs, programs
from geomjax.analysis.reductions import Reductions
from geomjax.analysis.rounds import Block, Plan
from geomjax.analysis.stacks import Stack, read, read_blocks
from geomjax.checkpoints import CheckpointSource
from geomjax.geometry.sparsity import top_count
from geomjax.geometry.subspace import angles as angles_from
from geomjax.names import classify
from geomjax.update import Delta, Subtract, TensorKind, delta_dtype, form

Row = dict[str, Any]
"""One tensor: column names to Python values, None where undefined."""

IDENTITY = (
    "name",
    "layer",
    "module",
    "group",
    "shape",
    "numel",
    "source_dtype",
    "tuned_dtype",
    "delta_dtype",
)
"""Columns that describe a tensor, before those of the metrics; `notes` is the last."""


class StackPlan(NamedTuple):
    """How a stack is measured: everything that a compiled program depends on."""

    delta: Delta
    subtract: Subtract
    metrics: tuple[Metric, ...]


def applicable(metrics: Sequence[Metric], ndim: int) -> tuple[Metric, ...]:
    """The metrics that apply to a tensor of so many axes."""
    return tuple(m for m in metrics if ndim == 2 or m.applies_to == "tensor")


def table_columns(metrics: Sequence[Metric]) -> tuple[Column, ...]:
    """Every column of a table of metrics, in order.

    Raises:
        ValueError: two metrics have a column in common.
    """
    columns = tuple(column for metric in metrics for column in metric.columns)
    names = [column.name for column in columns]
    taken = {name for name in names if names.count(name) > 1} | set(names) & {
        *IDENTITY,
        "notes",
    }
    if taken:
        raise ValueError(f"columns of more than one metric: {sorted(taken)}")
    return columns


class Spectra(NamedTuple):
    """Curves behind the columns of spectra and angles.

    Attributes:
        source: singular values of W, descending.
        delta: those of D.
        left: principal angles of the left subspaces in degrees, ascending; NaN where a
            subspace is not unique.
        right: those of the right subspaces.
    """

    source: Float[np.ndarray, "p r"]
    delta: Float[np.ndarray, "p r"]
    left: Float[np.ndarray, "p k"]
    right: Float[np.ndarray, "p k"]

    def of(self, place: int) -> dict[str, list[float] | None]:
        """Those of one tensor, as JSON data; None where a curve is undefined."""
        curves = {name: part[place] for name, part in self._asdict().items()}
        return {
            name: part.tolist() if np.isfinite(part).all() else None
            for name, part in curves.items()
        }


class Numbers(NamedTuple):
    """The columns of one stack.

    Attributes:
        values: one row for each tensor, one column for each of the applicable metrics'.
        finite: whether all of W and W' is finite.
        spectra: curves, where the metrics have both spectra and principal angles.
    """

    values: Float[np.ndarray, "p c"]
    finite: Bool[np.ndarray, " p"]
    spectra: Spectra | None = None


class Loaded(NamedTuple):
    """A stack on the host.

    Attributes:
        blocks: its blocks.
        whole: both sides of each tensor as they are, if they are wanted so.
    """

    blocks: list[Block]
    whole: list[tuple[np.ndarray, np.ndarray]]


def load(
    source: CheckpointSource,
    tuned: CheckpointSource,
    stack: Stack,
    plan: StackPlan,
    *,
    whole: bool = False,
) -> Loaded:
    """Reads a stack; its whole tensors too if `whole`, or if a metric wants them."""
    if stack.layout is None:
        return Loaded([], [])
    metrics = applicable(plan.metrics, _ndim(stack))
    tensors = []
    if whole or any(metric.needs is None for metric in metrics):
        tensors = [
            (read(source, m.source_key, m.rows), read(tuned, m.tuned_key, m.rows))
            for m in stack.items
        ]
    return Loaded(read_blocks(source, tuned, stack), tensors)


def programs_of(
    layout: Layout, ndim: int, plan: StackPlan, mesh: Mesh | None
) -> Programs:
    """The programs that measure stacks of a layout."""
    rounded = plan.delta == "stored" and plan.subtract == "bfloat16"
    needs = combine(
        metric.needs(layout.r, rounded)
        for metric in applicable(plan.metrics, ndim)
        if metric.needs is not None
    )
    return programs(layout, Plan(plan.delta, plan.subtract, needs), mesh)


def measure_stack(
    stack: Stack,
    loaded: Loaded,
    plan: StackPlan,
    *,
    mesh: Mesh | None = None,
    keep: bool = True,
) -> Numbers | None:
    """Measures a stack; call it under `jax.enable_x64(True)`.

    Args:
        stack: the tensors.
        loaded: what `load` read of them.
        plan: how D is formed, and the metrics.
        mesh: devices over which the stack is spread.
        keep: see `Programs.measure`.

    Returns:
        The numbers; None for tensors without entries.
    """
    if stack.layout is None:
        return None
    compiled = programs_of(stack.layout, _ndim(stack), plan, mesh)
    needs = compiled.plan.needs
    shapes = [kind.shape for kind in stack.kinds]
    sizes = sizes_of(shapes, needs, depth=stack.layout.depth)
    measured = compiled.measure(loaded.blocks, sizes, keep=keep)
    rounded = plan.delta == "stored" and plan.subtract == "bfloat16"
    reductions = Reductions(measured, shapes, needs, rounded=rounded)
    columns: list[Float[np.ndarray, " p"]] = []
    for metric in applicable(plan.metrics, _ndim(stack)):
        if metric.needs is None:
            whole = partial(_whole, metric=metric, plan=plan)
            with solving_device():
                found = [whole(w[None], tuned[None]) for w, tuned in loaded.whole]
            parts = jax.device_get(found)
            columns += list(np.concatenate(parts, axis=-1))
        else:
            with np.errstate(divide="ignore", invalid="ignore"):
                columns += _columns(metric, metric.kernel(reductions))
    values = np.stack([np.asarray(c, np.float64) for c in columns], axis=-1)
    return Numbers(values, reductions.finite, _spectra(reductions, plan, needs))


def _spectra(x: Reductions, plan: StackPlan, needs: Needs) -> Spectra | None:
    angles = [m for m in plan.metrics if m.name == "principal_angles"]
    if not angles or not needs.delta_values or not needs.sine_ranks:
        return None
    (wanted,) = angles[0].settings
    k = rank_of_angles(x.r, None if wanted is None else int(wanted))
    if k == 0:  # Matrices of one row have no angles.
        return None
    defined = x.both_defined(k)[:, None]

    def degrees(side):
        ascending = angles_from(x.sines(side, k))[:, ::-1]
        return np.where(defined, np.rad2deg(ascending), np.nan)

    return Spectra(x.source_values, x.delta_values, degrees("left"), degrees("right"))


def solving_device() -> AbstractContextManager[Any]:
    """Where programs run that hold an eigenproblem: not on TPUs, see `geometry.lapack`.

    What is traced over whole tensors, such as a metric of one's own, may hold one; the
    passes over blocks do not.
    """
    if jax.default_backend() != "tpu":
        return nullcontext()
    return jax.default_device(jax.local_devices(backend="cpu")[0])


def _ndim(stack: Stack) -> int:
    return len(stack.kinds[0].shape)


def sizes_of(shapes: Sequence[tuple[int, ...]], needs: Needs, *, depth: int) -> Sizes:
    """Sizes of the tensors; what fills the stack up counts as one entry."""
    numel = [math.prod(shape) for shape in shapes] + [1] * (depth - len(shapes))

    def counts(fractions: Sequence[float]) -> np.ndarray:
        table = [[top_count(f, n) for f in fractions] for n in numel]
        return np.asarray(table, np.int64).reshape(depth, len(fractions))

    return Sizes(
        np.asarray(numel, np.int64),
        counts(needs.coordinate_fractions),
        counts([mask.density for mask in needs.masks]),
    )


@partial(jax.jit, static_argnames=("metric", "plan"))
def _whole(
    source: Float[Array, "p *s"],
    tuned: Float[Array, "p *s"],
    *,
    metric: Metric,
    plan: StackPlan,
) -> Float[Array, "c p"]:
    """Columns of a metric that is traced over whole tensors; not finite ones as 0."""
    formed = form(source, tuned, delta=plan.delta, subtract=plan.subtract)
    finite = jnp.all(jnp.isfinite(source)) & jnp.all(jnp.isfinite(tuned))
    formed = [jnp.where(finite, x, jnp.zeros_like(x)) for x in formed]
    is_matrix = source.ndim == 3
    directions = metric.directions(min(source.shape[1:])) if is_matrix else 0
    operands = Operands(*formed, directions=directions)
    columns = _columns(metric, metric.kernel(operands))
    return jnp.stack([jnp.asarray(column, operands.dtype) for column in columns])


def _columns(metric: Metric, out: Any) -> list[Any]:
    names = [column.name for column in metric.columns]
    if set(out) != set(names):
        raise ValueError(
            f"metric {metric.name!r} returned {sorted(out)}; its columns are "
            f"{sorted(names)}"
        )
    return [out[name] for name in names]


def to_rows(stack: Stack, plan: StackPlan, numbers: Numbers | None) -> list[Row]:
    """Rows of one stack.

    Args:
        stack: its tensors.
        plan: the plan they were measured by.
        numbers: what `measure_stack` returned.

    Returns:
        One row for each tensor, every column of the table present.
    """
    everything = table_columns(plan.metrics)
    rows = []
    for i, (item, kind) in enumerate(zip(stack.items, stack.kinds, strict=True)):
        present = [
            column
            for metric in applicable(plan.metrics, len(kind.shape))
            for column in metric.columns
        ]
        notes = []
        found: dict[str, float] = {}
        if numbers is None:
            notes.append("empty tensor")
        elif not numbers.finite[i]:
            notes.append("not finite: excluded from every aggregate")
        else:
            values = numbers.values[i].tolist()
            found = dict(zip((c.name for c in present), values, strict=True))
            notes += _notes(kind.shape, found, present)
        row = dict(zip(IDENTITY, _identity(item.name, kind, plan), strict=True))
        row |= {c.name: _or_none(found, c.name) for c in everything}
        rows.append(row | {"notes": "; ".join(notes)})
    return rows


def _identity(name: str, kind: TensorKind, plan: StackPlan) -> tuple[Any, ...]:
    place = classify(name)
    return (
        name,
        *place,
        list(kind.shape),
        math.prod(kind.shape),
        kind.source_dtype,
        kind.tuned_dtype,
        delta_dtype(plan.delta, plan.subtract),
    )


def _notes(
    shape: tuple[int, ...], numbers: dict[str, float], present: Sequence[Column]
) -> list[str]:
    """Reasons for the nulls of one row; removes numbers that a zero update leaves."""
    notes = []
    if len(shape) != 2:
        notes.append(f"{len(shape)} axes: matrix columns are for 2")
    if numbers.get("delta_frobenius") == 0:
        notes.append("zero update: what divides by it is undefined")
        for column in present:
            if column.of_update:
                numbers[column.name] = math.nan
        return notes
    undefined = [
        c.name
        for c in present
        if not math.isfinite(numbers[c.name]) and not c.name.endswith("_chance")
    ]
    if undefined:
        notes.append(
            "undefined (empty support, or rank of a side too low, or a repeated "
            f"singular value at the cut): {' '.join(undefined)}"
        )
    return notes


def _or_none(numbers: dict[str, float], name: str) -> float | None:
    value = numbers[name] if name in numbers else math.nan
    return value if math.isfinite(value) else None
