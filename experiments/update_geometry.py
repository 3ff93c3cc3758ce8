"""What did training do to the weights? Every metric of both papers on two checkpoints.

    python -m experiments.update_geometry --source=DIR --tuned=DIR --workdir=OUT

DIR is a folder in the Hugging Face layout, or the name of a repository on the hub.
Written to OUT: tensors.csv (a row for each tensor), summary.json (the whole model, its
groups, modules and layers, and the nulls), matching.json (what was compared and what
was not). A run that was stopped goes on when the same command is given again. The exit
status is 2 if a tensor holds NaN or infinity: it is named, and left out of aggregates.
"""

# ruff: noqa: E402
import os

# Before NumPy loads: two matrices at a time beat one factored by two threads.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import json
import sys
import time
from pathlib import Path

import jax
import numpy as np
from absl import flags
from tqdm import tqdm

from experiments.common import cli
from geomjax.analysis import Metric, Row, RunResult, default_metrics, estimate, run
from geomjax.analysis.stacks import Stack
from geomjax.checkpoints import CheckpointSource, open_source

NOT_FINITE_STATUS = 2


def define_flags() -> None:
    """Defines the flags; not at import: experiments can be imported together."""
    flags.DEFINE_string("source", None, "Checkpoint before training.", required=True)
    flags.DEFINE_string("tuned", None, "Checkpoint after training.", required=True)
    flags.DEFINE_string("workdir", None, "Folder for the results.")
    flags.DEFINE_enum(
        "delta",
        "stored",
        ["stored", "master"],
        "Subtract bfloat16 values, as published, or the values as they are stored.",
    )
    flags.DEFINE_enum(
        "subtract",
        "bfloat16",
        ["bfloat16", "float32"],
        "Rounding of a stored difference: bfloat16 is P1's, float32 P2's.",
    )
    flags.DEFINE_integer("hill_rank", None, "K of the Hill exponent; r // 10 if unset.")
    flags.DEFINE_integer(
        "angle_rank",
        None,
        "Dimensions of the principal angles; 512 or r // 2 if unset.",
    )
    flags.DEFINE_integer("mask_rank", None, "Rank of P2's masks: 64 in its appendix.")
    flags.DEFINE_float(
        "mask_density", None, "Density of P2's masks: 0.3 in its figure, 0.5 elsewhere."
    )
    flags.DEFINE_integer("null_seeds", 1, "Seeds of the null updates; 0 for no nulls.")
    flags.DEFINE_float(
        "memory_budget", None, "GiB for the work; a quarter of what is free if unset."
    )
    flags.DEFINE_bool(
        "common_rows", False, "Compare resized vocabularies in their rows."
    )
    flags.DEFINE_bool("estimate", False, "Print time, memory and disk, and stop.")


def main() -> None:
    """Runs the analysis that the flags describe."""
    values = flags.FLAGS
    source, tuned = open_source(values.source), open_source(values.tuned)
    budget = values.memory_budget
    budget = None if budget is None else int(budget * 2**30)
    if values.estimate:
        print_estimate(source, tuned, budget)
        return
    if values.workdir is None:
        raise ValueError("--workdir is needed, except with --estimate")
    metrics = default_metrics(
        hill_rank=values.hill_rank,
        angle_rank=values.angle_rank,
        mask_rank=values.mask_rank,
        mask_density=values.mask_density,
    )
    result = analyse(source, tuned, metrics, budget)
    print_result(result, Path(values.workdir))
    if result.not_finite:
        sys.exit(NOT_FINITE_STATUS)


def analyse(
    source: CheckpointSource,
    tuned: CheckpointSource,
    metrics: tuple[Metric, ...],
    memory_budget: int | None,
) -> RunResult:
    """Runs with a progress bar, on all devices."""
    values = flags.FLAGS
    devices = jax.devices()
    mesh = jax.make_mesh(
        (len(devices),), ("stack",), axis_types=(jax.sharding.AxisType.Auto,)
    )
    with tqdm(unit=" tensors", desc="measuring") as bar:

        def progress(stack: Stack, rows: list[Row]) -> None:
            bar.set_postfix_str(rows[-1]["name"], refresh=False)
            bar.update(len(rows))

        return run(
            source,
            tuned,
            values.workdir,
            delta=values.delta,
            subtract=values.subtract,
            metrics=metrics,
            null_seeds=range(values.null_seeds),
            mesh=mesh if len(devices) > 1 else None,
            memory_budget=memory_budget,
            common_rows=values.common_rows,
            progress=progress,
        )


def print_estimate(
    source: CheckpointSource, tuned: CheckpointSource, memory_budget: int | None
) -> None:
    """Prints what a run would take, the time from a measured float64 product."""
    found = estimate(source, tuned, memory_budget=memory_budget)
    seconds = found.operations / matmul_rate()
    print(f"{found.tensors} tensors, {found.bytes_read / 2**30:.2f} GiB to read")
    print(f"time:   about {seconds:.0f} s, and two more such for each null seed")
    print(f"memory: about {found.memory / 2**30:.2f} GiB")
    print(f"disk:   about {found.disk / 2**20:.1f} MiB")


def matmul_rate(side: int = 1024) -> float:
    """Float64 operations a second of a square product on this machine."""
    with jax.enable_x64(True):
        x = jax.numpy.asarray(np.random.default_rng(0).standard_normal((side, side)))
        product = jax.jit(lambda a: a @ a)
        jax.block_until_ready(product(x))
        start = time.perf_counter()
        jax.block_until_ready(product(x))
        return 2 * side**3 / (time.perf_counter() - start)


def print_result(result: RunResult, workdir: Path) -> None:
    """Prints the whole model's main figures, and what needs attention."""
    print(result.matching.summary())
    total = result.summary["global"]
    print(f"relative norm of the update   {_show(total['relative_frobenius'])}")
    print(f"unchanged to 1e-5             {_show(total['unchanged_atol_1e-05'])}")
    print(f"bit-identical in bfloat16     {_show(total['bf16_unchanged_fraction'])}")
    for column in ("stable_rank", "top_energy_16"):
        print(f"median {column:<22} {_show(total['median'][column])}")
    for stem in ("principal", "low_magnitude"):
        name = f"{stem}_coverage_0.10"
        chance = total[f"{name}_chance"]
        print(f"{name:<29} {_show(total[name])} (chance {_show(chance)})")
    if result.identical:
        print("the checkpoints are identical: ratios of the update are null")
    if result.not_finite:
        print(f"not finite, left out: {', '.join(result.not_finite)}")
    print(f"written to {json.dumps(str(workdir))}")


def _show(value: float | None) -> str:
    return "null" if value is None else f"{value:.6g}"


if __name__ == "__main__":
    define_flags()
    cli.main(main)
