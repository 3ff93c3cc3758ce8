"""What a compiler has decided before it generates code, where that is enough.

Most of the time that a program takes to compile for a TPU is code generation: of an
update of DeepSeek-R1-Distill-Qwen-1.5B 138 of 147 seconds of a processor, on v5e:4x4.
Layouts, collectives and the place of every buffer are decided before, and the compiler
writes them down where it is asked to. A process of its own compiles, and is ended when
they are there.
"""

import json
import re
import resource
import subprocess
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import jax

from experiments.aot.measure import Measured, sent_by_kind, stopwatch
from experiments.aot.programs import Program
from geomjax.jaxpr_flops import matmul_flops

_POLL_S = 1.0
_LAST = "*after_optimizations_after_buffer_assignment.txt"
"""Written after everything that is read here."""
_ALLOCATION = re.compile(r"^allocation \d+: size (\d+)(.*)$", re.MULTILINE)


def measure_assigned(program: Program, name: str, command: list[str]) -> Measured:
    """Measures a program without the code that would be generated for it.

    Args:
      program: The program.
      name: Its name.
      command: What compiles it when `--dump=FOLDER` is added for what the compiler
        writes, and `--json=FILE` for a line of results where it comes to an end.

    Returns:
      As `measure`, but that the memory lacks the code and has the gaps between buffers,
      each some hundredths of a GiB.

    Raises:
      ValueError: The command fails.
    """
    spent, before = stopwatch(), _children_s()
    traced = jax.jit(program.function, keep_unused=True).trace(*program.arguments)
    flops = matmul_flops(traced.jaxpr)
    with TemporaryDirectory() as made:
        folder, ended = Path(made), Path(made) / "ended"
        command = [*command, f"--dump={folder}", f"--json={ended}"]
        with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
            try:
                while process.poll() is None and not list(folder.glob(_LAST)):
                    time.sleep(_POLL_S)
            finally:
                process.kill()
        if ended.exists():
            return Measured(**json.loads(ended.read_text(encoding="utf-8"))[name])
        seconds, busy = spent()
        busy += _children_s() - before
        return Measured(
            seconds,
            busy,
            assigned_bytes(_read(folder, "*after_optimizations-buffer-assignment.txt")),
            "",
            flops,
            sent_by_kind(_read(folder, "*.after_optimizations.txt")),
        )


def _read(folder: Path, pattern: str) -> str:
    found = list(folder.glob(pattern))
    if len(found) != 1:
        raise ValueError(
            f"the compilation ended early; it wrote {len(found)} {pattern}"
        )
    return found[0].read_text(encoding="utf-8")


def _children_s() -> float:
    """Processor time of the processes that were started here and have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def assigned_bytes(text: str) -> int:
    """Memory of the buffers in HBM, of an assignment as XLA writes it.

    Those with a color are in the chip's own memories.
    """
    allocations = _ALLOCATION.findall(text)
    return sum(int(size) for size, rest in allocations if "color" not in rest)
