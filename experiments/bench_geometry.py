"""Wall time and memory of the analysis, against the first paper's public script.

    python -m experiments.bench_geometry [--peer=CHECKOUT] [--peer_python=PYTHON]

Makes a pair of checkpoints with Qwen3-0.6B's shapes and fewer layers, analyses it from
a cold start in a process of its own, compilation included, and with `--peer` runs the
script (github.com/SydCS/OPD-Param-Analysis; needs PyTorch, pandas and matplotlib in
PYTHON) on the same files in turn. Prints both times, both peaks of memory, the ratio,
and whether the values agree.
"""

import csv
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np
from absl import flags

from experiments.common import cli
from geomjax.checkpoints import write_safetensors

BF16 = ml_dtypes.bfloat16
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


class Cost(NamedTuple):
    """What one process took.

    Attributes:
        seconds: wall time.
        peak_bytes: its largest resident memory, mapped files included.
    """

    seconds: float
    peak_bytes: int


def define_flags() -> None:
    """Defines the flags; not at import: experiments can be imported together."""
    flags.DEFINE_string("peer", None, "Checkout of the public script.")
    flags.DEFINE_string("peer_python", sys.executable, "Python that runs it.")
    flags.DEFINE_integer("hidden", 1024, "Width of the model.")
    flags.DEFINE_integer("ffn", 3072, "Width of its feed-forward layers.")
    flags.DEFINE_integer("layers", 4, "Number of layers.")
    flags.DEFINE_integer("vocab", 4096, "Size of the vocabulary.")


def main() -> None:
    """Makes the pair, runs one or both on it, prints the comparison."""
    values = flags.FLAGS
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_pair(root, values.hidden, values.ffn, values.layers, values.vocab)
        ours = timed(_our_command(root))
        print(f"this package: {_describe(ours)}")
        if values.peer is None:
            return
        theirs = timed(_peer_command(root, Path(values.peer), values.peer_python))
        print(f"public script: {_describe(theirs)}")
        print(
            f"faster {theirs.seconds / ours.seconds:.1f} times, "
            f"memory {theirs.peak_bytes / ours.peak_bytes:.2f} times as much"
        )
        largest, label = compare(root / "ours" / "tensors.csv", root / "peer")
        print(f"largest relative difference of the values: {largest:.1e} ({label})")
        if largest > TOLERANCE:
            raise ValueError(f"the values differ by more than {TOLERANCE}")


def _our_command(root: Path) -> list[str]:
    sides = [f"--{side}={root / side}" for side in ("source", "tuned")]
    module = [sys.executable, "-m", "experiments.update_geometry"]
    return [*module, *sides, f"--workdir={root / 'ours'}", "--null_seeds=0"]


def _peer_command(root: Path, checkout: Path, python: str) -> list[str]:
    script = checkout / "scripts" / "analyze_opd_delta.py"
    if not script.is_file():
        raise ValueError(f"--peer={checkout}: it has no scripts/analyze_opd_delta.py")
    return [
        *(python, str(script)),
        *("--src_model", str(root / "source"), "--opd_model", str(root / "tuned")),
        *("--out_dir", str(root / "peer"), "--device", "cpu"),
        *("--max_exact_svd_dim", "4096", "--approx_svd_max_numel", "3000000"),
    ]


def timed(command: Sequence[str]) -> Cost:
    """Runs a command to its end.

    Raises:
        ValueError: it failed.
    """
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise ValueError(f"status {process.returncode} from {' '.join(command)}")
    return Cost(time.perf_counter() - start, _peak_bytes(usage))


def _peak_bytes(usage: resource.struct_rusage) -> int:
    return usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _describe(cost: Cost) -> str:
    return f"{cost.seconds:.1f} s, peak {cost.peak_bytes / 2**30:.2f} GiB"


def compare(ours: Path, peer: Path) -> tuple[float, str]:
    """The largest relative difference of the common columns, and where it is."""
    with open(ours, newline="") as file:
        rows = {row["name"]: row for row in csv.DictReader(file)}
    worst, label = 0.0, "nowhere"
    for name, columns in COMMON.items():
        with open(peer / name, newline="") as file:
            for theirs in csv.DictReader(file):
                for column, own in columns.items():
                    mine = rows[theirs["name"]][own]
                    if mine == "" or theirs[column] == "" or float(mine) == 0:
                        continue
                    found = abs(float(theirs[column]) / float(mine) - 1)
                    if found > worst:
                        worst, label = found, f"{theirs['name']} {own}"
    return worst, label


def write_pair(root: Path, hidden: int, ffn: int, layers: int, vocab: int) -> None:
    """Writes a source with power-law spectra and a tuned copy, most of it unmoved."""
    rng = np.random.default_rng(0)
    shapes = {
        "self_attn.q_proj": (2 * hidden, hidden),
        "self_attn.k_proj": (hidden, hidden),
        "self_attn.v_proj": (hidden, hidden),
        "self_attn.o_proj": (hidden, 2 * hidden),
        "mlp.gate_proj": (ffn, hidden),
        "mlp.up_proj": (ffn, hidden),
        "mlp.down_proj": (hidden, ffn),
    }
    names = {
        f"model.layers.{i}.{name}.weight": shape
        for i in range(layers)
        for name, shape in shapes.items()
    }
    names["model.embed_tokens.weight"] = names["lm_head.weight"] = (vocab, hidden)
    source, tuned = {}, {}
    for name, (m, n) in names.items():
        k = min(64, m, n)
        left = rng.standard_normal((m, k), np.float32) / m**0.5
        left *= 6 * np.arange(1, k + 1, dtype=np.float32) ** -0.7
        right = rng.standard_normal((k, n), np.float32) / n**0.5
        noise = rng.standard_normal((m, n), np.float32) / n**0.5
        source[name] = (0.5 * (noise + left @ right)).astype(BF16)
        a = rng.standard_normal((m, 8), np.float32)
        step = a @ rng.standard_normal((8, n), np.float32) / 8**0.5
        step += 0.7 * rng.standard_normal((m, n), np.float32)
        tuned[name] = (source[name].astype(np.float32) + 3e-5 * step).astype(BF16)
    for i in range(layers):
        for norm in ("input_layernorm", "post_attention_layernorm"):
            name = f"model.layers.{i}.{norm}.weight"
            source[name] = tuned[name] = np.ones(hidden, BF16)
    for side, tensors in (("source", source), ("tuned", tuned)):
        folder = root / side
        folder.mkdir()
        write_safetensors(folder, tensors)
        config = {"model_type": "qwen3", "tie_word_embeddings": False}
        (folder / "config.json").write_text(json.dumps(config))


if __name__ == "__main__":
    define_flags()
    cli.main(main)
