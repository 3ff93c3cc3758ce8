"""What a compiled program needs: time to compile, memory, operations, traffic."""

import re
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from experiments.aot.programs import Program
from geomjax.compiled import collectives
from geomjax.jaxpr_flops import matmul_flops


class Measured(NamedTuple):
    """One program on one slice.

    Attributes:
      compile_s: Seconds of tracing and compiling.
      processor_s: Of them, seconds of all processor cores together.
      chip_bytes: Memory of one chip at its peak: arguments, results, temporaries and
        code; None where it does not compile for lack of it.
      over: Where it does not fit, what the compiler would use and has, and by how much
        that is too much.
      flops: Of matrix products, on all chips together, recomputation included; None
        where they are not counted.
      sent_bytes: What a chip sends, by kind of collective, as often as loops run.
    """

    compile_s: float
    processor_s: float
    chip_bytes: int | None
    over: str
    flops: float | None
    sent_bytes: dict[str, float]


def measure(program: Program, dump: str = "") -> Measured:
    """Compiles a program for the devices of its arguments; allocates nothing.

    Args:
      program: The program.
      dump: A folder for what the compiler writes down on its way.
    """
    options: Any = {"xla_dump_to": dump} if dump else None
    spent = stopwatch()
    jitted = jax.jit(program.function, donate_argnums=program.donated, keep_unused=True)
    traced = jitted.trace(*program.arguments)
    flops = matmul_flops(traced.jaxpr)
    try:
        compiled = traced.lower().compile(compiler_options=options)
    except jax.errors.JaxRuntimeError as error:
        return Measured(*spent(), None, refusal(error), flops, {})
    seconds = spent()
    return Measured(
        *seconds, chip_bytes(compiled), "", flops, sent_by_kind(compiled.as_text())
    )


def stopwatch() -> Callable[[], tuple[float, float]]:
    """Starts one; what it returns gives seconds since, on the clock and computing."""
    start, busy = time.perf_counter(), time.process_time()
    return lambda: (time.perf_counter() - start, time.process_time() - busy)


def chip_bytes(compiled: Any) -> int:
    """The most memory of one chip that is taken at a time, with the code itself."""
    return compiled.memory_analysis().peak_memory_in_bytes


def sent_by_kind(text: str) -> dict[str, float]:
    """What a chip sends in a compiled program, by kind of collective."""
    sent: dict[str, float] = defaultdict(float)
    for each in collectives(text):
        # A loop of unknown length is taken once: a lower bound.
        sent[each.kind] += (each.trip_count or 1) * each.sent_bytes
    return dict(sent)


_OVER = (
    re.compile(r"Used ([\d.]+)G of ([\d.]+)G hbm"),
    re.compile(r"\(([\d.]+)G\) exceeds available HBM \(([\d.]+)G\)"),
)
"""How the compiler says that a program does not fit, in GiB."""


def refusal(error: jax.errors.JaxRuntimeError) -> str:
    """The compiler's figures of what does not fit, `25.30G of 15.75G, 9.55G over`.

    Raises:
      JaxRuntimeError: It says something else.
    """
    message = str(error)
    if "RESOURCE_EXHAUSTED" not in message:
        raise error
    for form in _OVER:
        if found := form.search(message):
            used, there = found.groups()
            return f"{used}G of {there}G, {float(used) - float(there):.2f}G over"
    return message.splitlines()[0]
