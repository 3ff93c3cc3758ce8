"""When the update of a matrix enters the channel that it ends in.

The channel of a matrix is what its update D_T at the end of a run has most of: its
leading right singular directions, and its largest entries. An update on its way, D_t,
is as far into the channel as

    directions   ||V_K(t)^T V_K(T)||_F^2 / K, K = 16 (P2's similarity)
    coordinates  the share of the largest 17.5 % of |D_T| that are among those of |D_t|

It has entered where this stays, to the end of the run, at or above the level half way
between chance and 1. Chance is what an update that knows nothing of D_T reaches, K / n
and 17.5 %. As D_t is a part of D_T, any update nears its end; how early it would do so
without a channel is that of a random walk with the run's own scales. It takes an
independent Gaussian step for each step S of the run between snapshots:

    entry (i, j)  ~  N(0, 1) ||S_i.|| ||S_.j|| / ||S||_F, scaled to the norm of S

so that rows and columns have the energy, on average, that they have in S. Without that
a walk of uneven rows or columns, which has no memory, would itself pass for a channel.
"""

import zlib
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np

from geomjax.analysis.measure import solving_device
from geomjax.analysis.trajectory import SIMILARITY_RANK, measure_steps
from geomjax.geometry.sparsity import top_count
from geomjax.geometry.spectrum import default_hill_rank
from geomjax.names import TensorName, classify

DENSITY = 0.175
"""Share of a matrix's entries in its mask, as in the ablation and in P1."""
_STABLE_RANK, _SIMILARITY = 1, 3  # columns of `measure_steps`


class Paths(NamedTuple):
    """How far an update is on its way at each snapshot; NaN where it is undefined.

    Attributes:
      directions: `[T]`.
      coordinates: `[T]`.
      stable_rank: `[T]`, of the update.
    """

    directions: np.ndarray
    coordinates: np.ndarray
    stable_rank: np.ndarray


class Channel(NamedTuple):
    """A matrix's way into its channel.

    Attributes:
      name: Of the tensor.
      place: Its layer, module and group.
      chance: Of `directions`, that of `coordinates` being `DENSITY`.
      run: The way of the run.
      walk: That of a random walk with the norms of the run's steps.
    """

    name: str
    place: TensorName
    chance: float
    run: Paths
    walk: Paths

    def entry(
        self, quantity: str, progress: np.ndarray, *, walk: bool = False
    ) -> float:
        """When it enters, as a share of the run; NaN where the way is undefined.

        Args:
          quantity: `directions` or `coordinates`.
          progress: Of the snapshots, `[T]`.
          walk: Of the random walk, rather than of the run.
        """
        values = getattr(self.walk if walk else self.run, quantity)
        chance = self.chance if quantity == "directions" else DENSITY
        return entry(values, progress, chance)


def entry(values: np.ndarray, progress: np.ndarray, chance: float) -> float:
    """The first place from which on all values reach the level half way to 1."""
    if np.isnan(values).any():
        return float("nan")
    below = np.flatnonzero(values < chance + (1 - chance) / 2)
    first = below[-1] + 1 if below.size else 0
    return float(progress[first]) if first < len(progress) else float("nan")


def follow(
    name: str, before: np.ndarray, steps: Sequence[np.ndarray], seed: int
) -> Channel:
    """Follows one matrix and a random walk beside it, in float64.

    Args:
      name: Of the tensor; walks of other tensors have other draws.
      before: W_0, `[m, n]` float32.
      steps: W_t at the snapshots, the last of which is the end.
      seed: Of the walk.
    """
    stack = np.stack(steps).astype(np.float64) - before
    return Channel(
        name,
        classify(name),
        min(SIMILARITY_RANK, *before.shape) / before.shape[1],
        _paths(stack),
        _paths(random_walk(name, stack, seed)),
    )


def random_walk(name: str, updates: np.ndarray, seed: int) -> np.ndarray:
    """Updates `[T, m, n]` whose steps share norms with these steps, and no more.

    The norm of the whole is the same; those of rows and columns are on average.
    """
    generator = np.random.default_rng((seed, zlib.crc32(name.encode())))
    steps = np.diff(updates, axis=0, prepend=np.zeros_like(updates[:1]))
    rows, columns, wholes = (
        np.linalg.norm(steps, axis=axis, keepdims=True) for axis in (2, 1, (1, 2))
    )
    drawn = generator.standard_normal(steps.shape) * rows * columns
    sizes = np.linalg.norm(drawn, axis=(1, 2), keepdims=True)
    # A step of nothing stays one.
    return np.cumsum(drawn * (wholes / np.where(sizes > 0, sizes, 1.0)), axis=0)


def _paths(updates: np.ndarray) -> Paths:
    r = min(updates.shape[1:])
    with jax.enable_x64(True), solving_device():
        # Updates counted from zero: W_0 no longer matters, and rounds nothing away.
        table = measure_steps(
            np.zeros(updates.shape[1:], np.float32),
            updates.astype(np.float32),
            delta="master",
            subtract="float32",
            hill_rank=default_hill_rank(r),
            k=min(SIMILARITY_RANK, r),
        )
        table = jax.device_get(table)
    largest = [_largest(update) for update in updates]
    end = largest[-1]
    share = [
        np.count_nonzero(mask & end) / np.count_nonzero(end) if end.any() else np.nan
        for mask in largest
    ]
    return Paths(table[:, _SIMILARITY], np.array(share), table[:, _STABLE_RANK])


def _largest(update: np.ndarray) -> np.ndarray:
    """The largest `DENSITY` of the entries, of those that moved."""
    size = np.abs(update)
    count = top_count(DENSITY, size.size)
    bound = np.partition(size, size.size - count, axis=None)[size.size - count]
    return (size >= bound) & (size > 0)
