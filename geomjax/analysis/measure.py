"""From two checkpoints in memory to one row of numbers for each tensor."""

import math
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from geomjax.analysis.metrics import DEFAULT, Column, Metric
from geomjax.analysis.operands import Operands
from geomjax.analysis.stacks import kind_of
from geomjax.checkpoints import CheckpointSource, match
from geomjax.names import classify
from geomjax.update import (
    Delta,
    Subtract,
    TensorKind,
    delta_dtype,
    form,
    group_by_kind,
)

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


class Measured(NamedTuple):
    """One stack's numbers, still on the device.

    Attributes:
        values: one row for each tensor, one column for each of the applicable metrics'.
        finite: whether all of W and W' is finite.
    """

    values: Float[Array, "p c"]
    finite: Bool[Array, " p"]


@partial(jax.jit, static_argnames=("plan",))
def measure_stack(
    source: Float[Array, "p *s"], tuned: Float[Array, "p *s"], *, plan: StackPlan
) -> Measured:
    """Measures a stack of tensors of one shape; call it under `jax.enable_x64(True)`.

    Args:
        source: W of p tensors, in their storage dtype.
        tuned: W', likewise.
        plan: how D is formed, and the metrics.

    Returns:
        The numbers. Tensors that are not finite are measured as zeros.
    """
    formed = form(source, tuned, delta=plan.delta, subtract=plan.subtract)
    w, w_tuned, d = formed
    return evaluate(w, w_tuned, d, plan)


def evaluate(
    source: Float[Array, "p *s"],
    tuned: Float[Array, "p *s"],
    delta: Float[Array, "p *s"],
    plan: StackPlan,
) -> Measured:
    """Traces the metrics of a plan over W, W' and D of a stack, already formed."""
    axes = tuple(range(1, source.ndim))
    finite = jnp.all(jnp.isfinite(source) & jnp.isfinite(tuned), axis=axes)
    keep = finite.reshape(-1, *(1 for _ in axes))
    w, w_tuned, d = (
        jnp.where(keep, x, jnp.zeros_like(x)) for x in (source, tuned, delta)
    )
    metrics = applicable(plan.metrics, len(axes))
    matrix = len(axes) == 2
    r = min(w.shape[1:], default=0)
    directions = max((m.directions(r) for m in metrics), default=0)
    operands = Operands(w, w_tuned, d, directions=directions if matrix else 0)
    values = [column for metric in metrics for column in _columns(metric, operands)]
    return Measured(jnp.stack(values, axis=-1), finite)


def _columns(metric: Metric, operands: Operands) -> list[Float[Array, " p"]]:
    out = metric.kernel(operands)
    names = [column.name for column in metric.columns]
    if set(out) != set(names):
        raise ValueError(
            f"metric {metric.name!r} returned {sorted(out)}; its columns are "
            f"{sorted(names)}"
        )
    return [jnp.asarray(out[name], operands.dtype) for name in names]


def to_rows(
    names: Sequence[str],
    kind: TensorKind,
    plan: StackPlan,
    values: np.ndarray | None,
    finite: np.ndarray | None,
) -> list[Row]:
    """Rows of one stack, from the host copies of its numbers.

    Args:
        names: names of its tensors.
        kind: their shape and dtypes.
        plan: the plan they were measured by.
        values: `Measured.values`; None for tensors without entries.
        finite: `Measured.finite`; None likewise.

    Returns:
        One row for each tensor, every column of the table present.
    """
    everything = table_columns(plan.metrics)
    present = [
        column
        for metric in applicable(plan.metrics, len(kind.shape))
        for column in metric.columns
    ]
    rows = []
    for i, name in enumerate(names):
        notes = []
        numbers: dict[str, float] = {}
        if values is None or finite is None:
            notes.append("empty tensor")
        elif not finite[i]:
            notes.append("not finite: excluded from every aggregate")
        else:
            numbers = dict(
                zip((c.name for c in present), values[i].tolist(), strict=True)
            )
            notes += _notes(kind.shape, numbers, present)
        row = dict(zip(IDENTITY, _identity(name, kind, plan), strict=True))
        row |= {c.name: _or_none(numbers, c.name) for c in everything}
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


def measure(
    source: CheckpointSource,
    tuned: CheckpointSource,
    *,
    delta: Delta = "stored",
    subtract: Subtract = "bfloat16",
    metrics: tuple[Metric, ...] = DEFAULT,
    max_stack: int = 32,
) -> list[Row]:
    """Measures two checkpoints that fit into memory, in one process and without files.

    `geomjax.analysis.run` does the same for checkpoints of any size. A program is
    compiled for each shape and stack depth, and found again by later calls.

    Args:
        source: the checkpoint before training.
        tuned: the checkpoint after it.
        delta: `stored` bfloat16 values, or `master` values as they are.
        subtract: rounding of a stored difference, see `geomjax.update.form`.
        metrics: the table of metrics.
        max_stack: tensors measured at once.

    Returns:
        One row for each matched tensor, in the source's order.
    """
    plan = StackPlan(delta, subtract, metrics)
    delta_dtype(delta, subtract)
    matched = match(source, tuned).matched
    by_name = {item.name: item for item in matched}
    groups = group_by_kind((m.name, kind_of(source, tuned, m)) for m in matched)
    pending: list[tuple[list[str], TensorKind, Measured | None]] = []
    with jax.enable_x64(True):
        for kind, names in groups.items():
            for part in _chunks(names, max_stack):
                if 0 in kind.shape:
                    pending.append((part, kind, None))
                    continue
                items = [by_name[name] for name in part]
                w = np.stack([_read(source, m.source_key, m.rows) for m in items])
                w_tuned = np.stack([_read(tuned, m.tuned_key, m.rows) for m in items])
                pending.append((part, kind, measure_stack(w, w_tuned, plan=plan)))
        fetched = jax.device_get([result for _, _, result in pending])
    rows = {}
    for (names, kind, _), result in zip(pending, fetched, strict=True):
        values, finite = (None, None) if result is None else result
        for row in to_rows(names, kind, plan, values, finite):
            rows[row["name"]] = row
    return [rows[item.name] for item in matched]


def _read(source: CheckpointSource, key: str, rows: int | None) -> np.ndarray:
    tensor = source.read(key)
    return tensor if rows is None else tensor[:rows]


def _chunks(names: Sequence[str], size: int) -> Iterable[list[str]]:
    for start in range(0, len(names), size):
        yield list(names[start : start + size])
