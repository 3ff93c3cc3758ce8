"""Measures checkpoints of any size: streamed, resumable, in bounded memory."""

import csv
import hashlib
import io
import json
import math
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from geomjax.analysis import nulls
from geomjax.analysis.aggregate import Summary, summarize
from geomjax.analysis.journal import Journal, write_atomically
from geomjax.analysis.measure import (
    IDENTITY,
    Measured,
    Row,
    StackPlan,
    measure_stack,
    table_columns,
    to_rows,
)
from geomjax.analysis.metrics import DEFAULT, Metric
from geomjax.analysis.stacks import Stack, available_memory, plan_stacks, working_bytes
from geomjax.checkpoints import CheckpointSource, Matching, match
from geomjax.update import Delta, Subtract, delta_dtype

Progress = Callable[[Stack, list[Row]], None]


class RunResult(NamedTuple):
    """What a run found, as its files hold it.

    Attributes:
        rows: one row for each matched tensor, in the source's order (tensors.csv).
        summary: the aggregates (summary.json).
        matching: what was compared and what was not (matching.json).
        not_finite: names of the tensors that hold NaN or infinity.
        identical: whether no tensor moved at all.
    """

    rows: list[Row]
    summary: Summary
    matching: Matching
    not_finite: tuple[str, ...]
    identical: bool


def run(
    source: CheckpointSource,
    tuned: CheckpointSource,
    workdir: str | os.PathLike[str],
    *,
    delta: Delta = "stored",
    subtract: Subtract = "bfloat16",
    metrics: tuple[Metric, ...] = DEFAULT,
    null_seeds: Sequence[int] = (),
    mesh: Mesh | None = None,
    memory_budget: int | None = None,
    in_flight: int = 2,
    common_rows: bool = False,
    progress: Progress | None = None,
) -> RunResult:
    """Measures every matched tensor of two checkpoints and writes the tables.

    Tensors of one kind run as stacks. The next stack is read while others compute, and
    each finished one is on disk, in `journal.jsonl`, before it counts as done: called
    again with the same arguments, a run that was stopped goes on where it was, repeats
    at most the stacks in flight, and ends with the same bytes.

    Args:
        source: the checkpoint before training.
        tuned: the checkpoint after it.
        workdir: folder for the results, made if it is not there.
        delta: `stored` bfloat16 values, or `master` values as they are.
        subtract: rounding of a stored difference, see `geomjax.update.form`.
        metrics: the table of metrics.
        null_seeds: seeds of the null updates; each costs two more measurements.
        mesh: devices to spread each stack over, without communication; one by default.
        memory_budget: bytes for all stacks in flight; a quarter of what is free by
            default. One tensor is measured whatever it takes.
        in_flight: stacks that compute at the same time, to keep two cores busy.
        common_rows: see `geomjax.checkpoints.match`.
        progress: called with each finished stack, or one that was found finished.

    Returns:
        The tables.

    Raises:
        ValueError: the folder holds results of other inputs.
        CheckpointError: the checkpoints have no tensor in common.
    """
    delta_dtype(delta, subtract)
    plan = StackPlan(delta, subtract, metrics)
    workdir = Path(workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    matching = match(source, tuned, common_rows=common_rows)
    budget = available_memory() // 4 if memory_budget is None else memory_budget
    devices = 1 if mesh is None else mesh.size
    stacks = plan_stacks(
        source,
        tuned,
        matching.matched,
        memory_budget=budget // (1 + in_flight),
        devices=devices,
    )
    inputs = _inputs(source, tuned, matching, plan, null_seeds, stacks)
    with Journal(workdir / "journal.jsonl", inputs) as journal, jax.enable_x64(True):
        done = {record["row"]["name"]: record for record in journal.records}
        todo = []
        for stack in stacks:
            if all(item.name in done for item in stack.items):
                if progress is not None:
                    progress(stack, [done[m.name]["row"] for m in stack.items])
            else:
                todo.append(stack)
        compute = partial(_dispatch, plan=plan, seeds=tuple(null_seeds), mesh=mesh)
        for stack, results in _stream(source, tuned, todo, compute, in_flight):
            records = _records(stack, plan, null_seeds, results)
            journal.append(records)
            done |= {record["row"]["name"]: record for record in records}
            if progress is not None:
                progress(stack, [record["row"] for record in records])
    records = [done[item.name] for item in matching.matched]
    return _finish(workdir, matching, plan, records, null_seeds)


def _inputs(
    source: CheckpointSource,
    tuned: CheckpointSource,
    matching: Matching,
    plan: StackPlan,
    null_seeds: Sequence[int],
    stacks: Sequence[Stack],
) -> dict[str, Any]:
    """What the results depend on, with a few bytes of every tensor's two sides."""
    columns = [column.name for column in table_columns(plan.metrics)]
    return {
        "format": 1,
        "delta": plan.delta,
        "subtract": plan.subtract,
        "columns": columns,
        "null_seeds": list(null_seeds),
        "source": _digest(source, [(m.source_key, m.shape) for m in matching.matched]),
        "tuned": _digest(tuned, [(m.tuned_key, m.shape) for m in matching.matched]),
        "stacks": _hash(
            repr([(s.depth, [m.name for m in s.items]) for s in stacks]).encode()
        ),
    }


def _digest(source: CheckpointSource, keys: list[tuple[str, tuple[int, ...]]]) -> str:
    digest = hashlib.sha256()
    for key, shape in keys:
        spec = source.spec(key)
        digest.update(repr((key, shape, tuple(spec.shape), str(spec.dtype))).encode())
        flat = source.read(key).reshape(-1)
        step = max(1, flat.size // 64)
        digest.update(np.ascontiguousarray(flat[::step]).tobytes())
        source.release(key)
    return digest.hexdigest()


def _hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _stream(
    source: CheckpointSource,
    tuned: CheckpointSource,
    stacks: Sequence[Stack],
    compute: Callable[..., dict[str, Measured]],
    in_flight: int,
) -> Iterator[tuple[Stack, dict[str, Measured]]]:
    """Reads ahead in a thread, keeps `in_flight` stacks computing, yields in order."""
    pending: deque[tuple[Stack, dict[str, Measured]]] = deque()
    with ThreadPoolExecutor(1, thread_name_prefix="read") as reader:
        reads = iter(stacks)
        upcoming: deque[Any] = deque()

        def read_next() -> None:
            if (stack := next(reads, None)) is not None:
                task = reader.submit(_read_stack, source, tuned, stack)
                upcoming.append((stack, task))

        read_next()
        while upcoming:
            stack, task = upcoming.popleft()
            arrays = task.result()
            read_next()
            pending.append((stack, compute(stack, arrays)))
            del arrays, task
            if len(pending) >= in_flight:
                done, results = pending.popleft()
                yield done, jax.device_get(results)
        while pending:
            done, results = pending.popleft()
            yield done, jax.device_get(results)


def _read_stack(
    source: CheckpointSource, tuned: CheckpointSource, stack: Stack
) -> tuple[np.ndarray, np.ndarray]:
    if 0 in stack.kind.shape:
        empty = np.zeros((stack.depth, *stack.kind.shape), np.float32)
        return empty, empty
    before = _read_side(source, [(m.source_key, m.rows) for m in stack.items], stack)
    after = _read_side(tuned, [(m.tuned_key, m.rows) for m in stack.items], stack)
    return before, after


def _read_side(
    source: CheckpointSource, keys: Sequence[tuple[str, int | None]], stack: Stack
) -> np.ndarray:
    out = None
    for i, (key, rows) in enumerate(keys):
        tensor = source.read(key)
        tensor = tensor if rows is None else tensor[:rows]
        if out is None:
            out = np.zeros((stack.depth, *tensor.shape), tensor.dtype)
        out[i] = tensor
        source.release(key)
    assert out is not None
    return out


@lru_cache
def sharded_measure_stack(mesh: Mesh) -> Callable[..., Measured]:
    """`measure_stack` with each device of a mesh at its own part of the stack."""
    spec = PartitionSpec(mesh.axis_names)

    @partial(jax.jit, static_argnames=("plan",))
    def measure(source, tuned, *, plan):
        return jax.shard_map(
            partial(measure_stack, plan=plan),
            mesh=mesh,
            in_specs=(spec, spec),
            out_specs=spec,
            check_vma=False,
        )(source, tuned)

    return measure


def _dispatch(
    stack: Stack,
    arrays: tuple[np.ndarray, np.ndarray],
    *,
    plan: StackPlan,
    seeds: tuple[int, ...],
    mesh: Mesh | None,
) -> dict[str, Measured]:
    """Starts the programs of a stack; returns before they end."""
    if 0 in stack.kind.shape:
        return {}
    program: Callable[..., Measured]
    if mesh is None:
        before, after = jax.device_put(arrays)
        program = measure_stack
    else:
        placed = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
        before, after = jax.device_put(arrays, placed)
        program = sharded_measure_stack(mesh)
    out = {"update": program(before, after, plan=plan)}
    names = [item.name for item in stack.items]
    names += [f"padding {i}" for i in range(stack.depth - len(names))]
    for seed in seeds:
        keys = nulls.null_keys(seed, names)
        for kind in nulls.KINDS:
            sides = nulls.draw(before, after, keys, plan=plan, kind=kind)
            null_plan = nulls.null_plan(plan, kind)
            out[f"{kind} {seed}"] = program(*sides, plan=null_plan)
    return out


def _records(
    stack: Stack,
    plan: StackPlan,
    seeds: Sequence[int],
    results: dict[str, Measured],
) -> list[dict[str, Any]]:
    """Journal records of a stack: a row for each tensor, and its nulls' rows."""
    names = [item.name for item in stack.items]

    def rows(label: str) -> list[Row]:
        if not results:
            return to_rows(names, stack.kind, plan, None, None)
        values, finite = map(np.asarray, results[label])
        return to_rows(names, stack.kind, plan, values, finite)

    labels = [f"{kind} {seed}" for seed in seeds for kind in nulls.KINDS]
    null_rows = {label: rows(label) for label in labels}
    return [
        {"row": row, "nulls": {label: null_rows[label][i] for label in labels}}
        for i, row in enumerate(rows("update"))
    ]


def _finish(
    workdir: Path,
    matching: Matching,
    plan: StackPlan,
    records: list[dict[str, Any]],
    seeds: Sequence[int],
) -> RunResult:
    rows = [record["row"] for record in records]
    summary = summarize(rows, plan.metrics)
    not_finite = tuple(
        row["name"] for row in rows if row["notes"].startswith("not finite")
    )
    summary["not_finite"] = list(not_finite)
    measured = [row for row in rows if row["delta_frobenius"] is not None]
    identical = bool(measured) and all(r["delta_frobenius"] == 0 for r in measured)
    summary["identical"] = identical
    if seeds:
        summary["null"] = {
            kind: nulls.mean_over_seeds(
                [
                    summarize(
                        [record["nulls"][f"{kind} {seed}"] for record in records],
                        plan.metrics,
                    )
                    for seed in seeds
                ]
            )
            for kind in nulls.KINDS
        }
    columns = [*IDENTITY, *(c.name for c in table_columns(plan.metrics)), "notes"]
    write_atomically(workdir / "tensors.csv", to_csv(rows, columns))
    for name, content in (("matching", matching.to_json()), ("summary", summary)):
        text = json.dumps(content, indent=1, allow_nan=False) + "\n"
        write_atomically(workdir / f"{name}.json", text)
    return RunResult(rows, summary, matching, not_finite, identical)


def to_csv(rows: Sequence[Row], columns: Sequence[str]) -> str:
    """Rows as CSV: numbers as Python prints them, null as an empty field."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(columns)
    for row in rows:
        writer.writerow([_field(row[column]) for column in columns])
    return out.getvalue()


def _field(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, list):
        return json.dumps(value)
    return value if isinstance(value, str) else repr(value)


class Estimate(NamedTuple):
    """What a run would take.

    Attributes:
        tensors: matched tensors.
        bytes_read: bytes of both checkpoints that would be read.
        memory: bytes of the stacks in flight.
        disk: bytes of the results, about.
        operations: floating-point operations in float64, about.
    """

    tensors: int
    bytes_read: int
    memory: int
    disk: int
    operations: float


def estimate(
    source: CheckpointSource,
    tuned: CheckpointSource,
    *,
    memory_budget: int | None = None,
    in_flight: int = 2,
) -> Estimate:
    """Time, memory and disk that a run would take, from names and shapes alone."""
    matched = match(source, tuned).matched
    budget = available_memory() // 4 if memory_budget is None else memory_budget
    stacks = plan_stacks(
        source, tuned, matched, memory_budget=budget // (1 + in_flight), devices=1
    )
    sizes = sorted((s.depth * working_bytes(s.kind) for s in stacks), reverse=True)
    nbytes = sum(
        math.prod(m.shape) * source.spec(m.source_key).dtype.itemsize
        + math.prod(m.shape) * tuned.spec(m.tuned_key).dtype.itemsize
        for m in matched
    )
    return Estimate(
        tensors=len(matched),
        bytes_read=nbytes,
        memory=sum(sizes[: in_flight + 1]),
        disk=len(matched) * 16384,
        operations=sum(operations(m.shape) for m in matched),
    )


def operations(shape: tuple[int, ...]) -> float:
    """Floating-point operations of the matrix columns of one tensor, about.

    Three Gram products, vectors of the long side and their angles for half of r, the
    projections and reconstructions up to a fifth of r, and three eigenproblems of
    twenty r^3.
    """
    if len(shape) != 2 or 0 in shape:
        return 0.0
    r, long = min(shape), max(shape)
    k = min(512, r // 2)
    products = 3 * r * r + 2 * k * r + 3 * k * k + 1.1 * r * r
    return float(2 * long * products + 60 * r**3)
