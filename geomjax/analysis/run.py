"""Measures checkpoints of any size: streamed, resumable, in bounded memory."""

import hashlib
import json
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from geomjax import hosts
from geomjax.analysis import nulls
from geomjax.analysis.aggregate import Summary, summarize
from geomjax.analysis.curves import representative
from geomjax.analysis.journal import (
    FILE,
    Journal,
    merge,
    own_path,
    recorded_inputs,
)
from geomjax.analysis.large import MAX_FACTOR_DIM, is_large, measure_large
from geomjax.analysis.measure import (
    Loaded,
    Row,
    Spectra,
    StackPlan,
    load,
    measure_stack,
    table_columns,
    to_rows,
)
from geomjax.analysis.metric import Metric
from geomjax.analysis.metrics import DEFAULT, with_norms
from geomjax.analysis.schedule import compute
from geomjax.analysis.stacks import (
    Stack,
    available_memory,
    empty_blocks,
    fill_blocks,
    kept_bytes,
    plan_stacks,
    to_blocks,
    working_bytes,
)
from geomjax.analysis.tables import to_csv as to_csv
from geomjax.analysis.tables import write_tables
from geomjax.checkpoints import CheckpointSource, Matching, match
from geomjax.update import Delta, Subtract, delta_dtype

VISIBLE_S = 30.0
"""How long what process 0 has written may take to appear on another host."""

Progress = Callable[[Stack, list[Row]], None]


class RunResult(NamedTuple):
    """What a run found, as its files hold it.

    Attributes:
        rows: one row for each matched tensor, in the source's order (tensors.csv).
        summary: every aggregate (parts.csv, and the most of them in summary.json).
        matching: what was compared and what was not (matching.json).
        not_finite: names of the tensors that hold NaN or infinity.
        identical: whether no tensor moved at all.
        spectra: curves of the matrices that `curves.representative` names, as
            `measure.Spectra.of` gives them, of the `update` and of its Gaussian `null`.
    """

    rows: list[Row]
    summary: Summary
    matching: Matching
    not_finite: tuple[str, ...]
    identical: bool
    spectra: dict[str, Any]


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
    max_factor_dim: int = MAX_FACTOR_DIM,
    common_rows: bool = False,
    progress: Progress | None = None,
) -> RunResult:
    """Measures every matched tensor of two checkpoints and writes the tables.

    Tensors of one short side run the same programs, small ones as stacks. The next
    stack is read while one is measured, which is on disk, in `journal.jsonl`, before
    another is begun: called again with the same arguments, a run that was stopped goes
    on where it was, repeats at most that one stack, and ends with the same bytes.

    Args:
        source: the checkpoint before training.
        tuned: the checkpoint after it.
        workdir: folder for the results, made if it is not there.
        delta: `stored` bfloat16 values, or `master` values as they are.
        subtract: rounding of a stored difference, see `geomjax.update.form`.
        metrics: the table of metrics; the norms are added where they are missing.
        null_seeds: seeds of the null updates; each costs two more measurements.
        mesh: devices of this process to spread each stack over, without communication;
            one by default.
        memory_budget: bytes for the stacks in memory; by default what the journal says
            of the run that is resumed, or else a quarter of what is free. One tensor is
            measured whatever it takes.
        max_factor_dim: short side up to which a matrix is factored; a larger one is
            measured by `geomjax.analysis.large`, with error bounds.
        common_rows: see `geomjax.checkpoints.match`.
        progress: called with each finished stack, or one that was found finished.

    Returns:
        The tables.

    Raises:
        ValueError: the folder holds results of other inputs.
        CheckpointError: the checkpoints have no tensor in common.
        Preempted: one of several processes was told to end, and all have stopped.
    """
    delta_dtype(delta, subtract)
    plan = StackPlan(delta, subtract, with_norms(metrics))
    workdir = Path(workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    matching = match(source, tuned, common_rows=common_rows)
    recorded = hosts.on_main(lambda: recorded_inputs(workdir / FILE))
    if memory_budget is not None:
        budget = memory_budget
    elif recorded is not None and "memory_budget" in recorded:
        budget = recorded["memory_budget"]
    else:
        budget = hosts.on_main(lambda: available_memory() // 4)
    # One stack is measured, and one is read.
    each = budget // 2
    stacks = plan_stacks(
        source,
        tuned,
        matching.matched,
        memory_budget=each,
        devices=1 if mesh is None else mesh.size,
        max_factor_dim=max_factor_dim,
    )
    inputs = _inputs(source, tuned, matching, plan, null_seeds, stacks)
    inputs["max_factor_dim"] = max_factor_dim
    # What matters of the budget is the cut into stacks, which is compared.
    inputs["memory_budget"] = budget if recorded is None else None
    if recorded is not None and "memory_budget" in recorded:
        inputs["memory_budget"] = recorded["memory_budget"]
    done = hosts.on_main(
        lambda: [record["row"]["name"] for record in merge(workdir, inputs)]
    )
    known = set(done)
    todo = [s for s in stacks if not all(item.name in known for item in s.items)]
    work = _Work(
        source,
        tuned,
        plan,
        tuple(null_seeds),
        mesh,
        budget,
        max_factor_dim,
        frozenset(item.name for item in representative(matching.matched)),
    )

    def measure() -> None:
        with Journal(own_path(workdir), inputs) as journal:
            if progress is not None and hosts.is_main():
                _tell_finished(progress, stacks, todo, journal)
            finished = compute(
                _share(todo, work.needed),
                work.load,
                work.records,
                work.needed,
                memory=budget,
            )
            for stack, records in finished:
                journal.append(records)
                if progress is not None:
                    progress(stack, [record["row"] for record in records])

    hosts.independently(measure)
    if hosts.is_main():
        merge(workdir, inputs)
    hosts.barrier()
    found = _read(workdir, [item.name for item in matching.matched])
    return _finish(workdir, matching, plan, found, null_seeds)


def _tell_finished(
    progress: Progress, stacks: list[Stack], todo: list[Stack], journal: Journal
) -> None:
    rows = {record["row"]["name"]: record["row"] for record in journal.records}
    for stack in stacks:
        if stack not in todo:
            progress(stack, [rows[item.name] for item in stack.items])


def _share(stacks: list[Stack], cost: Callable[[Stack], int]) -> list[Stack]:
    """This process's part of the stacks, of about the same cost as every other's."""
    if hosts.count() == 1:
        return stacks
    loads = [0] * hosts.count()
    mine = set()
    costs = [cost(stack) for stack in stacks]
    for i in sorted(range(len(stacks)), key=lambda i: (-costs[i], i)):
        process = loads.index(min(loads))
        loads[process] += costs[i]
        if process == hosts.index():
            mine.add(i)
    return [stack for i, stack in enumerate(stacks) if i in mine]


def _read(workdir: Path, names: Sequence[str]) -> list[dict[str, Any]]:
    """The records of all tensors, as process 0 has merged them."""
    end = time.monotonic() + VISIBLE_S
    while True:
        lines = (workdir / FILE).read_bytes().splitlines()
        try:
            records = [json.loads(line) for line in lines[1:]]
        except ValueError:  # A file on another host, seen half.
            records = []
        found = {record["row"]["name"]: record for record in records}
        if found.keys() >= set(names):
            return [found[name] for name in names]
        if time.monotonic() > end:
            raise OSError(f"{workdir / FILE} lacks records that process 0 has written")
        time.sleep(0.5)


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
        "format": 3,
        "delta": plan.delta,
        "subtract": plan.subtract,
        "columns": columns,
        "settings": {m.name: list(m.settings) for m in plan.metrics if m.settings},
        "null_seeds": list(null_seeds),
        "source": _digest(source, [(m.source_key, m.shape) for m in matching.matched]),
        "tuned": _digest(tuned, [(m.tuned_key, m.shape) for m in matching.matched]),
        "stacks": _hash(
            repr([(s.layout, [m.name for m in s.items]) for s in stacks]).encode()
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


class _Work(NamedTuple):
    """How each stack is measured."""

    source: CheckpointSource
    tuned: CheckpointSource
    plan: StackPlan
    seeds: tuple[int, ...]
    mesh: Mesh | None
    memory: int
    max_factor_dim: int
    curves: frozenset[str]

    def load(self, stack: Stack) -> Loaded:
        """Reads a stack."""
        return load(self.source, self.tuned, stack, self.plan, whole=bool(self.seeds))

    def keeps(self, stack: Stack) -> bool:
        """Whether there is room to keep vectors and keys between the passes."""
        if stack.layout is None:
            return False
        needed = working_bytes(stack.layout, stack.blocks)
        needed += kept_bytes(stack.layout, stack.blocks)
        return needed <= min(self.memory // 2, _device_memory(self.mesh))

    def needed(self, stack: Stack) -> int:
        """Memory that a stack takes, in bytes, about."""
        if stack.layout is None:
            return 0
        layout = stack.layout
        if self.seeds:
            layout = layout._replace(source_dtype="float32", tuned_dtype="float32")
        needed = working_bytes(layout, stack.blocks)
        return needed + self.keeps(stack) * kept_bytes(layout, stack.blocks)

    def records(self, stack: Stack, loaded: Loaded) -> list[dict[str, Any]]:
        """Measures a stack and its nulls."""
        # The setting belongs to the thread.
        with jax.enable_x64(True):
            found = {"update": self._measured(stack, loaded, self.plan)}
            tensors = loaded.whole
            del loaded
            for seed in self.seeds if stack.layout is not None else ():
                for kind in nulls.KINDS:
                    drawn = self._draw(stack, tensors, seed, kind)
                    of_null = nulls.null_plan(self.plan, kind)
                    found[f"{kind} {seed}"] = self._measured(*drawn, of_null)
        records = _records(stack, self.plan, self.seeds, found)
        for i, item in enumerate(stack.items):
            if item.name in self.curves:
                records[i]["spectra"] = self._spectra(found, i)
        return records

    def _measured(self, stack: Stack, loaded: Loaded, plan: StackPlan) -> "_Measured":
        if is_large(stack, self.max_factor_dim):
            return _Measured([measure_large(stack, loaded, plan, mesh=self.mesh)], None)
        keep = self.keeps(stack)
        numbers = measure_stack(stack, loaded, plan, mesh=self.mesh, keep=keep)
        spectra = None if numbers is None else numbers.spectra
        return _Measured(to_rows(stack, plan, numbers), spectra)

    def _spectra(self, found: dict[str, "_Measured"], place: int) -> Any:
        labels = {"update": "update"}
        if self.seeds:
            labels["null"] = f"gaussian {self.seeds[0]}"
        parts = {name: found[label].spectra for name, label in labels.items()}
        if any(part is None for part in parts.values()):
            return None
        return {name: part.of(place) for name, part in parts.items() if part}

    def _draw(
        self,
        stack: Stack,
        tensors: Sequence[tuple[np.ndarray, np.ndarray]],
        seed: int,
        kind: nulls.Kind,
    ) -> tuple[Stack, Loaded]:
        """A stack of null updates, each drawn for its tensor alone."""
        blocks: list[list[np.ndarray]] = []
        whole = []
        items = zip(stack.items, tensors, strict=True)
        for i, (item, (before, after)) in enumerate(items):
            key = nulls.tensor_key(seed, item.name)
            pair = nulls.draw(before, after, key, plan=self.plan, kind=kind)
            if not blocks:
                blocks = [empty_blocks(stack, side.dtype) for side in pair]
            for side, tensor in zip(blocks, pair, strict=True):
                fill_blocks(side, i, tensor)
            if any(metric.needs is None for metric in self.plan.metrics):
                whole.append((pair[0], pair[1]))
            self.source.release(item.source_key)
            self.tuned.release(item.tuned_key)
        assert stack.layout is not None
        dtypes = [str(side[0].dtype) for side in blocks]
        layout = stack.layout._replace(source_dtype=dtypes[0], tuned_dtype=dtypes[1])
        of_null = stack._replace(layout=layout)
        return of_null, Loaded(to_blocks(blocks[0], blocks[1], of_null), whole)


def _device_memory(mesh: Mesh | None) -> float:
    """Half of the memory of a stack's devices; infinite where it is the host's."""
    devices = jax.local_devices()[:1] if mesh is None else list(mesh.local_devices)
    stats = devices[0].memory_stats() or {}
    return len(devices) * stats.get("bytes_limit", float("inf")) / 2


class _Measured(NamedTuple):
    """Rows of a stack, and curves where there are any."""

    rows: list[Row]
    spectra: Spectra | None


def _records(
    stack: Stack, plan: StackPlan, seeds: Sequence[int], found: dict[str, _Measured]
) -> list[dict[str, Any]]:
    """Journal records of a stack: a row for each tensor, and its nulls' rows."""
    labels = [f"{kind} {seed}" for seed in seeds for kind in nulls.KINDS]
    null_rows = {
        label: found[label].rows if label in found else to_rows(stack, plan, None)
        for label in labels
    }
    return [
        {"row": row, "nulls": {label: null_rows[label][i] for label in labels}}
        for i, row in enumerate(found["update"].rows)
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
    if hosts.is_main():
        write_tables(workdir, rows, plan.metrics, matching.to_json(), summary)
    spectra = {r["row"]["name"]: r["spectra"] for r in records if "spectra" in r}
    known = {name: found for name, found in spectra.items() if found is not None}
    return RunResult(rows, summary, matching, not_finite, identical, known)
