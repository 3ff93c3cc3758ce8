"""The path for large matrices at size, on a pair whose spectra are known exactly."""

import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
from safetensors.numpy import save_file

from geomjax.analysis import Row, measure
from geomjax.analysis.large import BOUND_SUFFIX
from geomjax.checkpoints import open_source
from geomjax.geometry import spectrum

NAME = "model.layers.0.mlp.up_proj.weight"
_ROWS = 1024
_ROUNDING = 1e-4
"""Relative: both sides are stored in float32, and so is what D is the difference of."""


class Pair(NamedTuple):
    """The folders of both sides, and the singular values of D."""

    source: Path
    tuned: Path
    values: np.ndarray


def write_pair(folder: Path, side: int, seed: int = 0) -> Pair:
    """Writes a square pair in float32 with known spectra.

    `H_a diag(s) H_b` with reflections H has the singular values s and is dense. Those
    of W fall like 1 / sqrt(i), those of D like 1 / i, from a tenth of W's first.
    """
    rng = np.random.default_rng(seed)
    index = np.arange(1, side + 1)
    values = 0.1 / index
    paths = [folder / name / "model.safetensors" for name in ("source", "tuned")]
    w = _reflected(np.sqrt(1 / index), rng)
    tuned = _reflected(values, rng)
    tuned += w
    for path, matrix in zip(paths, (w, tuned), strict=True):
        path.parent.mkdir(parents=True)
        save_file({NAME: matrix}, path)
    return Pair(paths[0].parent, paths[1].parent, values)


def _reflected(values: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """`(I - 2 u u^T) diag(values) (I - 2 v v^T)`, some rows at a time."""
    u, v = (x / np.linalg.norm(x) for x in rng.standard_normal((2, len(values))))
    inner = float(u @ (values * v))
    out = np.empty((len(values), len(values)), np.float32)
    for start in range(0, len(values), _ROWS):
        rows = slice(start, start + _ROWS)
        part = np.outer(u[rows], -2 * values * u + 4 * inner * v)
        part -= np.outer(2 * values[rows] * v[rows], v)
        part[np.arange(len(part)), np.arange(len(values))[rows]] += values[rows]
        out[rows] = part
    return out


def truth(values: np.ndarray) -> dict[str, float]:
    """Columns of D that follow from its singular values."""
    values = values[None]  # A stack of one, as the kernels take them.
    out = {
        "delta_frobenius": np.linalg.norm(values, axis=-1),
        "spectral_norm": values[:, 0],
        "stable_rank": spectrum.stable_rank(values),
        "entropy_rank": spectrum.entropy_rank(values),
        "hill_exponent_K": spectrum.hill_exponent(
            values, spectrum.default_hill_rank(values.shape[-1])
        ),
    }
    out |= {
        f"top_energy_{k}": spectrum.top_energy(values, k) for k in (1, 2, 4, 8, 16, 64)
    }
    out |= {
        f"rank_fraction_1e-0{i}": spectrum.rank_fraction(values, 10.0**-i)
        for i in (4, 5, 6)
    }
    return {name: value.item() for name, value in out.items()}


def describe(pair: Pair) -> str:
    """Measures a pair, and sets what was found beside the truth.

    Raises:
        ValueError: a column is further from the truth than its bound.
    """
    side, start = len(pair.values), (time.perf_counter(), time.process_time())
    sides = open_source(pair.source), open_source(pair.tuned)
    (row,) = measure(*sides, delta="master", max_factor_dim=side - 1)
    wall, busy = time.perf_counter() - start[0], time.process_time() - start[1]
    lines = [
        f"{side} x {side} in float32: {wall:.0f} s, {busy:.0f} s of processor time",
        *compare(row, truth(pair.values)),
    ]
    return "\n".join(lines)


def compare(row: Row, known: dict[str, float]) -> list[str]:
    """A line a column; raises ValueError where one is wrong."""
    lines, wrong = [f"{'column':<22}{'truth':>12}{'found':>12}  bound"], []
    for name, value in known.items():
        found = row[name]
        if found is None:
            lines.append(f"{name:<22}{value:12.6g}{'null':>12}")
            continue
        bound = row[name + BOUND_SUFFIX] if name + BOUND_SUFFIX in row else 0.0
        lines.append(f"{name:<22}{value:12.6g}{found:12.6g}  {bound:.1e}")
        if abs(found - value) > bound + _ROUNDING * abs(value):
            wrong.append(name)
    lines.append(f"notes: {row['notes']}")
    if wrong:
        raise ValueError("\n".join([*lines, f"further off than bounded: {wrong}"]))
    return lines
