"""Wall time and memory of the analysis, against the first paper's public script.

    python -m experiments.bench_geometry --peer=CHECKOUT [--peer_python=PYTHON]

Makes a pair of checkpoints with Qwen3-0.6B's shapes and fewer layers, analyses it with
`update_geometry` from a cold start in a process of its own, imports and compilation
included, and with `--peer` runs the script (github.com/SydCS/OPD-Param-Analysis; needs
PyTorch, pandas and matplotlib in PYTHON) on the same files in turn. Prints both times,
both peaks of memory, the ratios and whether the values agree. Like the script's without
--make_plots, our time is that until the tables are on disk; the time with curves and
report is printed beside it. The exit status is 1 where the values differ.

    python -m experiments.bench_geometry --phases

times the phases in this process, compilation apart, beside the floor that their
operation counts and the measured rate of a float64 product give.

    python -m experiments.bench_geometry --memory [--hidden=2048 --ffn=6144 ...]

analyses pairs with --layers and with twice as many, and prints both peaks of anonymous
memory: what the process itself holds, without the pages of the mapped files.

    python -m experiments.bench_geometry --large=20000

measures one square pair of that side, in float32 and with known spectra, by the path
for matrices too large to factor, and sets what it finds, its error bounds, its time and
its memory beside the truth. The exit status is 1 where a bound does not hold.
"""

import csv
import os
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

from absl import flags

from experiments.common import cli
from experiments.geometry_bench import large, phases
from experiments.geometry_bench import pair as pairs
from experiments.geometry_bench.process import Cost, memory, watch

COMMON = {
    "tensor_metrics.csv": {
        "delta_fro_norm": "delta_frobenius",
        "frac_isclose_zero_atol_1e-5": "unchanged_atol_1e-05",
        "coord_top_1pct_energy_ratio": "coordinate_energy_0.01",
    },
    "svd_metrics.csv": {
        "spectral_norm": "spectral_norm",
        "effective_rank_entropy": "entropy_rank",
        "top16_energy_ratio": "top_energy_16",
    },
    "base_geometry_metrics.csv": {
        "left_principal_projection_energy_ratio_10pct": "left_energy_0.10",
        "right_principal_projection_energy_ratio_10pct": "right_energy_0.10",
    },
}
"""Columns that both tables have, of every kind of computation."""
TOLERANCE = 1e-3
"""The script computes in float32; its tables agree with float64 to this."""
WANTED = 6.0
"""How many times faster than the script the tables have to be there."""
FLATNESS = 0.10
"""What doubling the layers may add to the peak of anonymous memory."""


def define_flags() -> None:
    """Defines the flags; not at import: experiments can be imported together."""
    flags.DEFINE_string("peer", None, "Checkout of the public script.")
    flags.DEFINE_string("peer_python", sys.executable, "Python that runs it.")
    flags.DEFINE_bool("phases", False, "Time the phases in this process.")
    flags.DEFINE_bool("memory", False, "Measure memory with and without more layers.")
    flags.DEFINE_integer("large", None, "Side of a matrix for the path of large ones.")
    flags.DEFINE_float("memory_budget", None, "GiB, as update_geometry takes it.")
    flags.DEFINE_string("folder", None, "Where the pairs are made; temporary if unset.")
    flags.DEFINE_integer("hidden", 1024, "Width of the model.")
    flags.DEFINE_integer("ffn", 3072, "Width of its feed-forward layers.")
    flags.DEFINE_integer("heads", 16, "Query heads.")
    flags.DEFINE_integer("kv_heads", 8, "Key and value heads.")
    flags.DEFINE_integer("head_dim", 128, "Width of a head.")
    flags.DEFINE_integer("layers", 4, "Number of layers.")
    flags.DEFINE_integer("vocab", 4096, "Size of the vocabulary.")
    flags.DEFINE_bool("tied", False, "Whether the head is the embedding.")


def main() -> None:
    """Does what the flags ask for."""
    values = flags.FLAGS
    if values.folder is not None:
        _measure(Path(values.folder))
        return
    with tempfile.TemporaryDirectory() as folder:
        _measure(Path(folder))


def _measure(root: Path) -> None:
    values = flags.FLAGS
    given: dict[str, Any] = {n: values[n].value for n in pairs.Shapes._fields}
    shapes = pairs.Shapes(**given)
    if values.large is not None:
        # In a process of its own, whose memory is not to be counted.
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as other:
            pair = other.submit(large.write_pair, root, values.large).result()
        print(large.describe(pair))
        print(f"peak memory {memory(os.getpid())[0] / 2**30:.2f} GiB, files included")
    elif values.memory:
        compare_memory(root, shapes)
    elif values.phases:
        made = pairs.write(root, shapes)
        print(phases.describe(made / "source", made / "tuned", root / "out"))
    else:
        compare_speed(pairs.write(root, shapes))


class Ours(NamedTuple):
    """What `update_geometry` took.

    Attributes:
        tables: until its tables were on disk.
        whole: until the process ended, with curves and report.
    """

    tables: Cost
    whole: Cost


def run_ours(pair: Path, workdir: Path) -> Ours:
    """Runs `update_geometry` on a pair, in a process of its own."""
    command = [sys.executable, "-m", "experiments.update_geometry"]
    command += ["--compilation_cache="]
    command += [f"--{side}={pair / side}" for side in ("source", "tuned")]
    command += [f"--workdir={workdir}", "--null_seeds=0"]
    if flags.FLAGS.memory_budget is not None:
        command.append(f"--memory_budget={flags.FLAGS.memory_budget}")
    # summary.json is the last of the tables.
    whole, tables = watch(command, until=workdir / "summary.json")
    return Ours(tables, whole)


def compare_speed(pair: Path) -> None:
    """Prints time and memory of this package, and of the script if there is one."""
    values = flags.FLAGS
    ours = run_ours(pair, pair / "ours")
    print(f"this package, tables:          {ours.tables.describe()}")
    print(f"this package, with its report: {ours.whole.describe()}")
    if values.peer is None:
        return
    command = _peer_command(pair, Path(values.peer), values.peer_python)
    theirs, _ = watch(command, until=None)
    print(f"public script, tables:         {theirs.describe()}")
    ratio = theirs.seconds / ours.tables.seconds
    print(
        f"faster {ratio:.1f} times ({theirs.seconds / ours.whole.seconds:.1f} with our "
        f"report), {'as' if ratio >= WANTED else 'MISSED:'} wanted {WANTED:g}"
    )
    print(
        f"peak memory {ours.tables.resident / theirs.resident:.2f} of the script's, "
        f"anonymous {ours.tables.anonymous / theirs.anonymous:.2f}"
    )
    largest, label = compare(pair / "ours" / "tensors.csv", pair / "peer")
    print(f"largest relative difference of the values: {largest:.1e} ({label})")
    if largest > TOLERANCE:
        raise ValueError(f"the values differ by more than {TOLERANCE}")


def _peer_command(pair: Path, checkout: Path, python: str) -> list[str]:
    script = checkout / "scripts" / "analyze_opd_delta.py"
    if not script.is_file():
        raise ValueError(f"--peer={checkout}: it has no scripts/analyze_opd_delta.py")
    return [
        *(python, str(script)),
        *("--src_model", str(pair / "source"), "--opd_model", str(pair / "tuned")),
        *("--out_dir", str(pair / "peer"), "--device", "cpu"),
        *("--max_exact_svd_dim", "4096", "--approx_svd_max_numel", "3000000"),
    ]


def compare(ours: Path, peer: Path) -> tuple[float, str]:
    """The largest relative difference of the common columns, and where it is."""
    with open(ours, newline="") as file:
        rows = {row["name"]: row for row in csv.DictReader(file)}
    worst, label, compared = 0.0, "nowhere", 0
    for name, columns in COMMON.items():
        with open(peer / name, newline="") as file:
            for theirs in csv.DictReader(file):
                for column, own in columns.items():
                    mine = rows[theirs["name"]][own]
                    if mine == "" or theirs[column] == "" or float(mine) == 0:
                        continue
                    compared += 1
                    found = abs(float(theirs[column]) / float(mine) - 1)
                    if found > worst:
                        worst, label = found, f"{theirs['name']} {own}"
    if not compared:
        raise ValueError(f"{ours} and {peer} have no value in common")
    return worst, label


def compare_memory(root: Path, shapes: pairs.Shapes) -> None:
    """Prints the peaks of anonymous memory with the layers given, and with twice."""
    peaks = []
    for layers in (shapes.layers, 2 * shapes.layers):
        pair = pairs.write(root, shapes._replace(layers=layers))
        ours = run_ours(pair, pair / "ours")
        print(f"{layers} layers, tables: {ours.tables.describe()}")
        peaks.append(ours.tables.anonymous)
    growth = peaks[1] / peaks[0] - 1
    verdict = "within" if growth <= FLATNESS else "MISSED:"
    print(f"twice the layers: {growth:+.1%} of memory, {verdict} {FLATNESS:.0%}")


if __name__ == "__main__":
    cli.main(main, define_flags, cache=False)
