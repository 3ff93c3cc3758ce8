"""Where the time of an analysis goes, beside the floor of its operation counts."""

import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np

from geomjax.analysis import DEFAULT, between
from geomjax.analysis.estimate import operations
from geomjax.analysis.journal import Journal
from geomjax.analysis.measure import (
    StackPlan,
    load,
    measure_stack,
    programs_of,
    to_rows,
)
from geomjax.analysis.programs import Programs
from geomjax.analysis.stacks import Stack, plan_stacks
from geomjax.checkpoints import match, open_source

PROGRAMS = ("first", "vectors", "second", "third")
"""Those of `geomjax.analysis.rounds`."""
HOST = ("solve", "cut", "finish")
"""What `geomjax.analysis.between` does between them."""
_BUDGET = 4 << 30


def describe(source: Path, tuned: Path, workdir: Path) -> str:
    """Measures a pair, one stack at a time, and says how long each phase took.

    Programs are compiled before they are timed.
    """
    sides = open_source(source), open_source(tuned)
    matched = match(*sides).matched
    stacks = plan_stacks(*sides, matched, memory_budget=_BUDGET, devices=1)
    plan = StackPlan("stored", "bfloat16", DEFAULT)
    spent: dict[str, float] = defaultdict(float)
    with jax.enable_x64(True), Journal(_fresh(workdir), {}) as journal:
        rate = matmul_rate()
        compiled = {
            programs_of(stack.layout, len(stack.kinds[0].shape), plan, None)
            for stack in stacks
            if stack.layout is not None
        }
        with _timed(spent, list(compiled)):
            for stack in stacks:
                start = time.perf_counter()
                loaded = load(*sides, stack, plan)
                spent["read"] += time.perf_counter() - start
                rows = to_rows(stack, plan, measure_stack(stack, loaded, plan))
                start = time.perf_counter()
                journal.append({"row": row} for row in rows)
                spent["write"] += time.perf_counter() - start
    return _table(spent, _floors(stacks, rate), rate)


def matmul_rate(side: int = 1024, repeats: int = 8) -> float:
    """Float64 operations a second of a square product; call it in `enable_x64`."""
    x = jax.numpy.asarray(np.random.default_rng(0).standard_normal((side, side)))
    product = jax.jit(lambda a: a @ a)
    jax.block_until_ready(product(x))
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(product(x))
        seconds.append(time.perf_counter() - start)
    return 2 * side**3 / min(seconds)


def _fresh(workdir: Path) -> Path:
    workdir.mkdir(parents=True, exist_ok=True)
    journal = workdir / "phases.jsonl"
    journal.unlink(missing_ok=True)
    return journal


@contextmanager
def _timed(spent: dict[str, float], compiled: Sequence[Programs]) -> Iterator[None]:
    """Adds up the seconds of each program, waiting for its results."""
    originals: list[tuple[Any, str, Any]] = [
        (programs, name, vars(programs)[name])
        for programs in compiled
        for name in PROGRAMS
        if name in vars(programs)
    ]
    for _, _, program in originals:
        program.compiled()
    originals += [(between, name, vars(between)[name]) for name in HOST]
    for owner, name, program in originals:
        setattr(owner, name, _waiting(spent, name, program))
    try:
        yield
    finally:
        for owner, name, program in originals:
            setattr(owner, name, program)


def _waiting(spent: dict[str, float], name: str, program: Any) -> Any:
    def call(*args: Any) -> Any:
        start = time.perf_counter()
        out = jax.block_until_ready(program(*args))
        spent[name] += time.perf_counter() - start
        return out

    return call


def _floors(stacks: Sequence[Stack], rate: float) -> dict[str, float]:
    """Seconds that the products of each phase take at the rate."""
    counts = [operations(kind.shape) for stack in stacks for kind in stack.kinds]
    return {
        "gram": sum(c.gram for c in counts) / rate,
        "factor": sum(c.factor for c in counts) / rate,
        "angles and masks": sum(c.angles + c.masks for c in counts) / rate,
    }


def _table(spent: dict[str, float], floors: dict[str, float], rate: float) -> str:
    phases = {
        "read": spent["read"],
        "gram": spent["first"],
        "factor": spent["solve"],
        "angles and masks": sum(
            spent[name] for name in ("vectors", "second", "cut", "third", "finish")
        ),
        "write": spent["write"],
    }
    lines = [f"float64 products: {rate / 1e9:.0f} GFLOP/s", f"{'phase':<18}s  floor"]
    for phase, seconds in phases.items():
        floor = f"{floors[phase]:6.2f}" if phase in floors else ""
        lines.append(f"{phase:<16}{seconds:6.2f} {floor}")
    lines.append(f"{'all':<16}{sum(phases.values()):6.2f} {sum(floors.values()):6.2f}")
    return "\n".join(lines)
