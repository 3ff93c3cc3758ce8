"""What bfloat16 would show of an update that had no structure but its size."""

import zlib
from collections.abc import Mapping, Sequence

import ml_dtypes
import numpy as np

from experiments.common.outcome import Outcome
from experiments.studies.study import Study
from geomjax.geometry.sparsity import top_count
from geomjax.models import hf
from geomjax.typing import Params

DENSE, SHUFFLED = "dense", "shuffled"
NULLS = (DENSE, SHUFFLED)
"""Null updates of a tensor, made from the float32 update D of a run:

- `dense`: Gaussian entries, scaled to the norm of D;
- `shuffled`: the entries of D, each at a random place.

The first says how sparse a dense update of that size would look, the second how sparse
D would, if its entries did not know the weights that they fall on.
"""

UNCHANGED, LOW = "bf16_unchanged_fraction", "low_magnitude_coverage_0.10"
SMALLEST = 0.1

Figures = dict[str, float | None]
Tensors = Mapping[str, np.ndarray]


def null_tensor(
    how: str, name: str, before: np.ndarray, after: np.ndarray, seed: int
) -> np.ndarray:
    """W + D0 in float32, a function of its arguments alone.

    Args:
      how: One of `NULLS`.
      name: Of the tensor; tensors have draws of their own.
      before: W, float32.
      after: W + D.
      seed: Of the draws.

    Raises:
      ValueError: An unknown null.
    """
    generator = np.random.default_rng((seed, zlib.crc32(name.encode())))
    start = before.astype(np.float64)
    d = after.astype(np.float64) - start
    if how == SHUFFLED:
        drawn = generator.permutation(d.ravel()).reshape(d.shape)
    elif how == DENSE:
        drawn = generator.standard_normal(d.shape)
        drawn *= np.linalg.norm(d) / np.linalg.norm(drawn)
    else:
        raise ValueError(f"null {how!r}; known: {', '.join(NULLS)}")
    return (start + drawn).astype(np.float32)


def stored_figures(before: Tensors, after: Tensors) -> Figures:
    """What two bfloat16 checkpoints of these tensors show, pooled over all of them.

    The columns of the analysis under the same names: a run's nulls are many, and need
    no spectra.

    Args:
      before: W by name.
      after: W + D.

    Returns:
      `bf16_unchanged_fraction`, the share of all weights, and
      `low_magnitude_coverage_0.10`, the share of the changed weights of matrices that
      are among the smallest tenth of theirs, None where none changed. Weights as large
      as the largest of the tenth count by the share of them that it has room for.
    """
    same = total = changed = small = 0.0
    for name, source in before.items():
        stored = source.astype(ml_dtypes.bfloat16)
        moved = stored != after[name].astype(ml_dtypes.bfloat16)
        same += moved.size - np.count_nonzero(moved)
        total += moved.size
        if moved.ndim == 2:
            changed += np.count_nonzero(moved)
            small += _small(np.abs(stored.astype(np.float32)), moved)
    low = float(small / changed) if changed else None
    return {UNCHANGED: float(same / total), LOW: low}


def _small(magnitude: np.ndarray, moved: np.ndarray) -> float:
    """How many changed weights are among the smallest tenth."""
    count = top_count(SMALLEST, magnitude.size)
    bound = np.partition(magnitude, count - 1, axis=None)[count - 1]
    below, tied = magnitude < bound, magnitude == bound
    room = (count - np.count_nonzero(below)) / np.count_nonzero(tied)
    return np.count_nonzero(moved & below) + room * np.count_nonzero(moved & tied)


def measure_nulls(
    study: Study, origin: Params, runs: Sequence[Outcome]
) -> dict[str, list[Figures]]:
    """The figures of each null of each run's final update.

    Args:
      study: Where the runs were made.
      origin: Parameters that the updates count from.
      runs: One a seed, which seeds the draws too.

    Returns:
      By null, the figures of each run.
    """
    config = study.world.student.model.config
    before = dict(hf.to_hf(origin, config))
    found: dict[str, list[Figures]] = {how: [] for how in NULLS}
    for run in runs:
        after = dict(hf.to_hf(run.params(config), config))
        for how, figures in found.items():
            moved = {
                name: null_tensor(how, name, before[name], after[name], run.seed)
                for name in before
            }
            figures.append(stored_figures(before, moved))
    return found
