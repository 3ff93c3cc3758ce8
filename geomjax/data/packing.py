"""Packing: several short sequences in one row, told apart by their segment ids."""

import functools
import threading
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int32

from geomjax.data.batches import WHOLE, Shard, epoch_order
from geomjax.data.supervised import Responses

OPEN_ROWS = 64
"""Rows that may still take a sequence while rows are filled."""


class TokenSequence(NamedTuple):
    """A text to be trained on: its ids, and which of them are targets."""

    tokens: Int32[np.ndarray, " n"]
    completion: Bool[np.ndarray, " n"]


def pack_order(
    lengths: Sequence[int], order: Sequence[int], row_length: int
) -> list[list[int]]:
    """Fills rows with sequences, in the order given.

    First fit: a sequence goes into the first open row that has room. Where none has,
    another row is opened, and of more than `OPEN_ROWS` the fullest is closed. No
    sequence is cut.

    Args:
      lengths: Length of each sequence, in tokens.
      order: Indices into `lengths`.
      row_length: Most tokens of a row.

    Returns:
      The rows, by when they were opened, each a list of indices.
    """
    rows: list[list[int]] = []
    open_rows: list[int] = []
    room = np.zeros(0, np.int64)
    for index in order:
        fits = np.flatnonzero(room >= lengths[index])
        if fits.size:
            place = int(fits[0])
        else:
            if len(open_rows) == OPEN_ROWS:
                fullest = int(room.argmin())
                del open_rows[fullest]
                room = np.delete(room, fullest)
            place = len(open_rows)
            open_rows.append(len(rows))
            rows.append([])
            room = np.append(room, row_length)
        rows[open_rows[place]].append(int(index))
        room[place] -= lengths[index]
    return rows


def join_rows(
    sequences: Sequence[TokenSequence],
    rows: Sequence[Sequence[int]],
    row_length: int,
    pad_id: int,
) -> Responses:
    """Lays sequences into rows: positions begin anew in each, segments count from 1."""
    shape = (len(rows), row_length)
    packed = Responses(
        tokens=np.full(shape, pad_id, np.int32),
        positions=np.zeros(shape, np.int32),
        segment_ids=np.zeros(shape, np.int32),
        completion=np.zeros(shape, bool),
    )
    for r, members in enumerate(rows):
        start = 0
        for segment, index in enumerate(members, start=1):
            tokens, completion = sequences[index]
            here = slice(start, start + len(tokens))
            packed.tokens[r, here] = tokens
            packed.positions[r, here] = np.arange(len(tokens))
            packed.segment_ids[r, here] = segment
            packed.completion[r, here] = completion
            start += len(tokens)
    return packed


def make_packed_batches(
    sequences: Sequence[TokenSequence],
    *,
    batch_rows: int,
    row_length: int,
    seed: int,
    pad_id: int,
    shard: Shard = WHOLE,
) -> Callable[[int], Responses]:
    """Makes the function from a step to its packed batch, which a `Pipeline` calls.

    Each epoch packs every sequence once, in the order that (seed, epoch) gives, and
    steps take the rows of the epochs one after the other. So a step's batch is a
    function of its number, whatever the number of processes, and resuming needs no
    other state.

    Args:
      sequences: What is to be trained on.
      batch_rows: Rows of a batch.
      row_length: Tokens of a row.
      seed: Seed of the order.
      pad_id: The token id on padding.
      shard: Which rows of each batch are made here.

    Returns:
      A function from a step (0, 1, 2, ...) to `[batch_rows, row_length]` arrays.

    Raises:
      ValueError: A sequence is longer than a row, empty, has no target, or has its
        first token as one, which nothing precedes.
    """
    part = shard.rows(batch_rows)
    _check(sequences, row_length)
    lengths = [len(each.tokens) for each in sequences]

    @functools.lru_cache(maxsize=2)
    def rows_of(epoch: int) -> list[list[int]]:
        order = epoch_order(seed, epoch, len(sequences))
        return pack_order(lengths, order.tolist(), row_length)

    ends: list[int] = []  # Rows of all epochs up to each.
    lock = threading.Lock()  # A pipeline's threads share them.

    def row_at(number: int) -> list[int]:
        with lock:
            epoch = int(np.searchsorted(ends, number, side="right"))
            while epoch == len(ends):
                before = ends[-1] if ends else 0
                ends.append(before + len(rows_of(epoch)))
                epoch = int(np.searchsorted(ends, number, side="right"))
            first = ends[epoch - 1] if epoch else 0
            return rows_of(epoch)[number - first]

    def batch_at(step: int) -> Responses:
        numbers = range(step * batch_rows, (step + 1) * batch_rows)[part]
        rows = [row_at(number) for number in numbers]
        return join_rows(sequences, rows, row_length, pad_id)

    return batch_at


def _check(sequences: Sequence[TokenSequence], row_length: int) -> None:
    if not sequences:
        raise ValueError("packing: there is no sequence; expected at least one")
    for i, (tokens, completion) in enumerate(sequences):
        if not 0 < len(tokens) <= row_length:
            raise ValueError(
                f"sequence {i} has {len(tokens)} tokens, expected 1 to {row_length}, "
                "the length of a row"
            )
        if completion[0] or not completion.any():
            raise ValueError(
                f"sequence {i}: expected targets after its first token, got "
                f"{'the first' if completion[0] else 'none'}"
            )
