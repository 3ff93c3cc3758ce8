"""Choosing the coordinates of a mask: by size, by threshold, at random.

Everything here runs on the host in NumPy, a few million coordinates at a time. A global
sort of some 1e9 scores would take tens of gigabytes; instead the k-th largest is found
by two histograms over the bit patterns of float32, whose order as integers is that of
the numbers. Each selection is exact; it takes a few passes over the scores, some 15 s
for 1e9 coordinates on one core, and no copy of them beyond one chunk.

Trees are nested dicts as everywhere; arrays may be NumPy's or fully addressable JAX
ones, and the masks come back as NumPy booleans. Leaves that are None stay None: give
None for parameters that a run freezes, lest they use up coordinates of the mask.
"""

import functools
import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from fractions import Fraction
from typing import Any, NamedTuple

import jax
import numpy as np

from geomjax.optim.roles import Role, Roles, dotted, map_with_roles, path_of
from geomjax.typing import Path, PRNGKey

_CHUNK = 1 << 22

# Yields unsigned 32-bit keys, a chunk at a time; called once for each pass.
_Chunks = Callable[[], Iterable[np.ndarray]]


class TopFraction(NamedTuple):
    """The largest scores of a tree.

    Attributes:
      mask: booleans shaped as the scores.
      threshold: the smallest selected score. Scores above it are all selected, scores
        equal to it up to the number asked for.
      selected: number of selected coordinates.
    """

    mask: Any
    threshold: float
    selected: int


def top_fraction_mask(scores: Any, density: float) -> TopFraction:
    r"""Selects the :math:`\lceil \rho N \rceil` coordinates with the largest scores.

    The N coordinates of all leaves compete with each other, as in the masked runs of P1
    (there by a threshold on :math:`|\Delta_i|`). Among equal scores the earlier
    coordinate wins, leaves taken in the order of `jax.tree.leaves`.

    Args:
      scores: arrays in float32, bfloat16 or float16, larger is better; use magnitudes
        for P1's masks. +0 and -0 are equal.
      density: the fraction :math:`\rho`, above 0 and at most 1, taken as the decimal
        number that it prints as: 0.175 of 40 are 7.

    Returns:
      The mask and its threshold.

    Raises:
      ValueError: a density out of range, no coordinates, another dtype, or scores that
        are not finite; with every leaf concerned.
    """
    scores = jax.tree.map(np.asarray, scores)
    _check_floating("scores", scores)
    leaves, treedef = jax.tree.flatten(scores)
    count = _count(density, sum(leaf.size for leaf in leaves))
    cutoff = _cutoff(lambda: (keys for leaf in leaves for keys in _keys(leaf)), count)
    masks = _masks([leaf.shape for leaf in leaves], map(_keys, leaves), cutoff)
    return TopFraction(
        jax.tree.unflatten(treedef, masks), _unordered(cutoff.key), count
    )


def threshold_mask(delta: Any, threshold: float) -> Any:
    r"""Selects the coordinates that moved by more than a threshold.

    Implements P1's :math:`m_i = 1\{|\theta_i - \theta_{0,i}| > \tau\}`, with
    :math:`\tau = 10^{-5}` in the paper. Compared in float32 whatever the dtype: the
    threshold itself is not rounded to bfloat16.

    Args:
      delta: the update, arrays in float32, bfloat16 or float16.
      threshold: :math:`\tau`, at least 0.

    Returns:
      Booleans shaped as `delta`.

    Raises:
      ValueError: a negative or non-finite threshold, another dtype, or values that are
        not finite; with every leaf concerned.
    """
    if not (math.isfinite(threshold) and threshold >= 0):
        raise ValueError(f"threshold: got {threshold}, expected a finite number >= 0")
    delta = jax.tree.map(np.asarray, delta)
    _check_floating("delta", delta)

    def select(leaf: np.ndarray) -> np.ndarray:
        above = [
            np.abs(chunk.astype(np.float32)) > np.float32(threshold)
            for chunk in _chunks(leaf)
        ]
        return np.concatenate(above).reshape(leaf.shape)

    return jax.tree.map(select, delta)


def random_mask(key: PRNGKey, like: Any, density: float) -> Any:
    r"""Selects :math:`\lceil \rho N \rceil` coordinates uniformly at random.

    The k coordinates with the largest of N independent 32-bit random numbers, drawn
    from PCG64 streams that the key, the leaf's place and the chunk determine, on any
    machine and with any NumPy. All subsets are equally likely, save that the few
    coordinates with exactly the k-th number (N / 2**32 on average) go by index.

    Args:
      key: a JAX random key; one key gives one mask.
      like: arrays or `jax.ShapeDtypeStruct`s; their shapes are used.
      density: as in `top_fraction_mask`.

    Returns:
      Booleans shaped as `like`.

    Raises:
      ValueError: a density out of range, or no coordinates.
    """
    leaves, treedef = jax.tree.flatten(like)
    sizes = [math.prod(leaf.shape) for leaf in leaves]
    count = _count(density, sum(sizes))
    seed = _seed(key)

    def streams() -> Iterator[Iterator[np.ndarray]]:
        return (_random_keys(seed, (i,), size) for i, size in enumerate(sizes))

    cutoff = _cutoff(lambda: itertools.chain.from_iterable(streams()), count)
    masks = _masks([leaf.shape for leaf in leaves], streams(), cutoff)
    return jax.tree.unflatten(treedef, masks)


def matched_random_mask(key: PRNGKey, mask: Any, roles: Roles) -> Any:
    """Selects at random, in every tensor, as many coordinates as a mask has there.

    The control that tells layer allocation from the choice of coordinates: it keeps how
    many coordinates each tensor trains, one layer's slice of a stacked leaf being one
    tensor, and draws which ones uniformly, as `random_mask` does.

    Args:
      key: a JAX random key; one key gives one mask.
      mask: booleans shaped as the parameters.
      roles: stack depth of each leaf.

    Returns:
      Booleans shaped as `mask`.

    Raises:
      ValueError: leaves that are not boolean, or have no role.
    """
    wrong = [
        f"{dotted(path)}: got {leaf.dtype}, expected bool"
        for path, leaf in _named_leaves(mask)
        if leaf.dtype != bool
    ]
    if wrong:
        raise ValueError("mask: not boolean:\n  " + "\n  ".join(wrong))
    seed = _seed(key)
    places = {path: place for place, (path, _) in enumerate(_named_leaves(mask))}

    def draw(path: Path, leaf: Any, role: Role) -> np.ndarray:
        stack, shape = leaf.shape[: role.stack_depth], leaf.shape[role.stack_depth :]
        tensors = np.asarray(leaf).reshape(math.prod(stack), math.prod(shape))
        drawn = np.zeros_like(tensors)
        for layer, tensor in enumerate(tensors):
            count = int(np.count_nonzero(tensor))
            if count:
                keys = functools.partial(
                    _random_keys, seed, (places[path], layer), tensor.size
                )
                [drawn[layer]] = _masks([tensor.shape], [keys()], _cutoff(keys, count))
        return drawn.reshape(leaf.shape)

    return map_with_roles(draw, mask, roles)


class _Cutoff(NamedTuple):
    """The k largest keys are those above `key`, and the first `ties` equal to it."""

    key: int
    ties: int


def _cutoff(chunks: _Chunks, count: int) -> _Cutoff:
    """Finds the `count`-th largest key: its upper half first, then its lower half."""
    upper, above = _bin_of_rank(_histogram(k >> 16 for k in chunks()), count)
    lower, above_within = _bin_of_rank(
        _histogram(k[(k >> 16) == upper] & 0xFFFF for k in chunks()), count - above
    )
    return _Cutoff(int(upper << 16 | lower), int(count - above - above_within))


def _histogram(halves: Iterable[np.ndarray]) -> np.ndarray:
    counts = np.zeros(1 << 16, np.int64)
    for half in halves:
        counts += np.bincount(half, minlength=1 << 16)
    return counts


def _bin_of_rank(counts: np.ndarray, rank: int) -> tuple[int, int]:
    """The bin that holds the rank-th largest item, and how many lie in bins above."""
    from_top = np.cumsum(counts[::-1])
    place = int(np.searchsorted(from_top, rank))
    above = int(from_top[place - 1]) if place else 0
    return len(counts) - 1 - place, above


def _masks(
    shapes: Iterable[tuple[int, ...]],
    leaves: Iterable[Iterable[np.ndarray]],
    cutoff: _Cutoff,
) -> list[np.ndarray]:
    """One mask for each leaf, given the keys of its coordinates."""
    masks, ties = [], cutoff.ties
    for shape, chunks in zip(shapes, leaves, strict=True):
        mask = np.empty(math.prod(shape), bool)
        start = 0
        for keys in chunks:
            part = mask[start : start + keys.size]
            np.greater(keys, cutoff.key, out=part)
            if ties:
                equal = np.flatnonzero(keys == cutoff.key)[:ties]
                part[equal] = True
                ties -= equal.size
            start += keys.size
        masks.append(mask.reshape(shape))
    return masks


def _chunks(leaf: np.ndarray) -> Iterator[np.ndarray]:
    flat = leaf.ravel()
    for start in range(0, max(flat.size, 1), _CHUNK):
        yield flat[start : start + _CHUNK]


def _keys(leaf: np.ndarray) -> Iterator[np.ndarray]:
    return map(_ordered, _chunks(leaf))


def _ordered(values: np.ndarray) -> np.ndarray:
    """Unsigned integers in the order of the numbers; -0 and +0 are one."""
    bits = (values.astype(np.float32) + np.float32(0)).view(np.uint32)
    return np.where(bits >> 31, ~bits, bits | np.uint32(1 << 31))


def _unordered(key: int) -> float:
    """The number that `_ordered` maps to this key."""
    bits = key ^ (1 << 31) if key >> 31 else ~key & 0xFFFFFFFF
    return float(np.uint32(bits).view(np.float32))


def _random_keys(
    seed: tuple[int, ...], place: tuple[int, ...], size: int
) -> Iterator[np.ndarray]:
    """Uniform 32-bit numbers; `random_raw` is the part of NumPy that never changes."""
    for chunk, start in enumerate(range(0, size, _CHUNK)):
        length = min(_CHUNK, size - start)
        sequence = np.random.SeedSequence(seed, spawn_key=(*place, chunk))
        words = np.random.PCG64(sequence).random_raw(-(-length // 2))
        yield words.view(np.uint32)[:length]


def _seed(key: PRNGKey) -> tuple[int, ...]:
    return tuple(int(word) for word in np.ravel(jax.random.key_data(key)))


def _count(density: float, size: int) -> int:
    if not 0 < density <= 1:
        raise ValueError(f"density: got {density}, expected above 0 and at most 1")
    if size == 0:
        raise ValueError("the tree has no coordinates, expected at least one")
    return math.ceil(Fraction(repr(float(density))) * size)


def _named_leaves(tree: Any) -> list[tuple[Path, Any]]:
    return [
        (path_of(keys), leaf)
        for keys, leaf in jax.tree_util.tree_leaves_with_path(tree)
    ]


def _check_floating(name: str, tree: Any) -> None:
    """Raises ValueError unless all leaves are finite and at most float32."""
    problems = []
    for path, leaf in _named_leaves(tree):
        if str(leaf.dtype) not in ("float32", "bfloat16", "float16"):
            problems.append(
                f"{dotted(path)}: got {leaf.dtype}, expected float32, bfloat16 or"
                " float16"
            )
        elif not all(
            np.isfinite(chunk.astype(np.float32)).all() for chunk in _chunks(leaf)
        ):
            problems.append(f"{dotted(path)}: not all values are finite")
    if problems:
        raise ValueError(
            f"{name}: cannot be selected from:\n  " + "\n  ".join(problems)
        )
