"""The tensors that two checkpoints have in common, name by name."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from geomjax.checkpoints.matching import Matching
from geomjax.checkpoints.sources import CheckpointSource


class Pair(NamedTuple):
    """One tensor before and after training, in checkpoint orientation.

    Attributes:
        name: the tensor's name in the source.
        source: its value before, in its storage dtype.
        tuned: its value after, of the same shape, in its own storage dtype.
    """

    name: str
    source: np.ndarray
    tuned: np.ndarray


def iter_pairs(
    source: CheckpointSource, tuned: CheckpointSource, matching: Matching
) -> Iterator[Pair]:
    """Reads the matched tensors one pair at a time, the next one read ahead.

    When the iteration moves on, the pages of the pair before are given back. Its arrays
    stay valid, but are read from disk again if they are touched: to keep memory flat,
    be done with a pair (or have copied it to a device) before taking the next.

    Args:
        source: the checkpoint before training.
        tuned: the checkpoint after it.
        matching: what `match(source, tuned)` found; a subset of it will do.

    Yields:
        Pairs in the matching's order, cut to their common rows where it says so.
    """
    matches = matching.matched
    for i, item in enumerate(matches):
        if i + 1 < len(matches):
            source.prefetch(matches[i + 1].source_key)
            tuned.prefetch(matches[i + 1].tuned_key)
        before, after = source.read(item.source_key), tuned.read(item.tuned_key)
        if item.rows is not None:
            before, after = before[: item.rows], after[: item.rows]
        yield Pair(item.name, before, after)
        source.release(item.source_key)
        tuned.release(item.tuned_key)
