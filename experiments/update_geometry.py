"""What did training do to the weights? Every metric of both papers on two checkpoints.

    python -m experiments.update_geometry --source=DIR --tuned=DIR --workdir=OUT

DIR is a folder in the Hugging Face layout, or the name of a repository on the hub.
Written to OUT:

    tensors.csv    a row for each tensor
    parts.csv      the whole model, its groups, modules and layers, and the nulls
    summary.json   the whole model and its groups, and the most of the others
    matching.json  what was compared and what was not
    curves.json    spectra, principal angles and near-zero bias of a few matrices
    run.json       command, settings, versions, wall time, peak memory
    report.html    all of it to look at, in one file; report.md and figures/ beside it

The tables are on disk before anything is drawn. A run that was stopped goes on when the
same command is given again. The exit status is 2 if a tensor holds NaN or infinity: it
is named, and left out of aggregates.

    python -m experiments.update_geometry --compare OUT1 OUT2 --workdir=OUT

sets finished runs side by side in one report, from their tables; a single one is drawn
anew. --estimate says what a run would take, and stops.

On several hosts the same command runs on each, with a --workdir that all of them see;
see --coordinator.
"""

import json
import sys
import time
from pathlib import Path

import jax
import numpy as np
from absl import flags

from experiments.common import cli, update_flags
from experiments.common.record import Watch, write_record
from experiments.geometry_report import build, finish, measure, read
from experiments.geometry_report.settings import Settings
from geomjax import hosts
from geomjax.analysis import RunResult, estimate
from geomjax.analysis.allocator import reuse_freed_memory
from geomjax.checkpoints import CheckpointSource, open_source

NOT_FINITE_STATUS = 2


def define_flags() -> None:
    """Defines the flags; not at import: experiments can be imported together."""
    update_flags.define_flags()
    flags.adopt_module_key_flags(update_flags)
    flags.DEFINE_string("source", None, "Checkpoint before training.")
    flags.DEFINE_string("tuned", None, "Checkpoint after training.")
    flags.DEFINE_list(
        "compare", None, "Folders of finished runs, for one report of them all."
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
    """Does what the flags ask for."""
    reuse_freed_memory()
    values = flags.FLAGS
    if values.compare:
        if values.source or values.tuned or values.estimate:
            raise ValueError(
                "--compare takes folders of finished runs, and goes without --source, "
                "--tuned and --estimate"
            )
        folders, workdir = values.compare, _needed("workdir")
        hosts.on_main(lambda: compare(folders, workdir))
        return
    given = values.flag_values_dict()
    settings = Settings(
        source=_needed("source"),
        tuned=_needed("tuned"),
        workdir=values.workdir if values.estimate else _needed("workdir"),
        **{name: given[name] for name in Settings._fields[3:]},
    )
    if values.estimate:
        source = open_source(settings.source)
        tuned = open_source(settings.tuned, base=source)
        print_estimate(source, tuned, settings.memory_budget_bytes())
        return
    if update_geometry(settings).not_finite:
        sys.exit(NOT_FINITE_STATUS)


def _needed(name: str) -> str:
    value = flags.FLAGS[name].value
    if value is None:
        raise ValueError(
            f"--{name} is not given: a run needs --source, --tuned and --workdir, a "
            "comparison --compare and --workdir; --help explains them"
        )
    return value


def update_geometry(settings: Settings) -> RunResult:
    """Measures a pair, writes its tables, prints them in short, and draws the report.

    Args:
        settings: what to measure, how, and where to write it.

    Returns:
        The tables.

    Raises:
        ValueError: the checkpoints, the folder or the settings are not fit.
        OSError: the folder cannot be written.
    """
    with Watch() as watch:
        source = open_source(settings.source)
        tuned = open_source(settings.tuned, base=source)
        result = measure.measure(source, tuned, settings, settings.metrics())
        print_result(result)
        page = hosts.on_main(
            lambda: str(finish.finish(source, tuned, settings, result, watch).page)
        )
    print(f"written to {json.dumps(page)} and beside it")
    return result


def compare(folders: list[str], workdir: str) -> None:
    """Writes one report of finished runs; a single one may be drawn anew in place.

    Args:
        folders: folders of finished runs.
        workdir: the report's folder.

    Raises:
        ValueError: a folder holds no finished run, or would be overwritten.
    """
    with Watch() as watch:
        runs = read.read_labelled(folders)
        own = Path(workdir).resolve() in [Path(folder).resolve() for folder in folders]
        if own and len(folders) > 1:
            raise ValueError(
                f"--workdir={workdir} is one of the compared runs, whose report would "
                "be overwritten; choose another folder"
            )
        files = build.write(runs, workdir)
        if not own:
            settings = {"compare": folders, "workdir": workdir}
            write_record(Path(workdir), settings, watch)
    print(f"written to {json.dumps(str(files.page))} and beside it")


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


def print_result(result: RunResult) -> None:
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


def _show(value: float | None) -> str:
    return "null" if value is None else f"{value:.6g}"


if __name__ == "__main__":
    update_flags.gather_command_line("compare")
    cli.main(main, define_flags, shared=True)
