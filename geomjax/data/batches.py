"""Batches of padded prompts, in an order that is a function of seed and step."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Array, Int32, Int64


class Shard(NamedTuple):
    """A process's part of every batch: block `index` of `count` equal blocks of rows.

    The blocks of all processes, one below the other, are the batch of one process.
    """

    index: int = 0  # type: ignore[assignment] # hides a method
    count: int = 1  # type: ignore[assignment] # hides a method

    def rows(self, batch_size: int) -> slice:
        """The rows of this part.

        Raises:
            ValueError: if the parts would not be equal, or there is no such part.
        """
        if not 0 <= self.index < self.count or batch_size % self.count:
            raise ValueError(
                f"shard: got part {self.index} of {self.count} of a batch of "
                f"{batch_size}, expected a part from 0 to {self.count - 1}, and a "
                "batch that can be cut into equal parts"
            )
        size = batch_size // self.count
        return slice(self.index * size, (self.index + 1) * size)


WHOLE = Shard()
"""The part of a process that makes whole batches."""


class PromptBatch(NamedTuple):
    """Prompts padded on the left, so that all of them end in the last column.

    `positions` count a prompt's own tokens from 0 (and are 0 on padding),
    `segment_ids` are 1 on tokens and 0 on padding, and `index` says which of the
    encoded prompts each row is. `images` are those of the rows, as the model takes
    them; None for text.
    """

    tokens: Int32[Array | np.ndarray, "B P"]
    positions: Int32[Array | np.ndarray, "B P"]
    segment_ids: Int32[Array | np.ndarray, "B P"]
    index: Int32[Array | np.ndarray, "B"]  # type: ignore[assignment] # hides a method
    images: Any = None


ImagesOf = Callable[[Sequence[int]], Any]
"""Reads the images of some of the encoded prompts, by number, for a batch of them."""


def longest(token_ids: Sequence[Int32[np.ndarray, "_"]]) -> int:
    """Length of the longest prompt."""
    return max(len(ids) for ids in token_ids)


def pad_prompts(
    token_ids: Sequence[Int32[np.ndarray, "_"]], length: int, pad_id: int
) -> PromptBatch:
    """Pads prompts on the left to one length; row i is prompt i.

    Args:
        token_ids: the prompts' token ids, each of shape [n] with 1 <= n <= length.
        length: the padded length P, in tokens.
        pad_id: the token id on padding; nothing attends to it.

    Returns:
        A batch of all the prompts, `index` being 0, 1, 2, ...

    Raises:
        ValueError: if a prompt is empty or longer than `length`.
    """
    lengths = _checked_lengths(token_ids, length)
    tokens = np.full((len(token_ids), length), pad_id, dtype=np.int32)
    for row, ids in zip(tokens, token_ids, strict=True):
        row[length - len(ids) :] = ids
    column = np.arange(length, dtype=np.int32)[None, :] - (length - lengths)[:, None]
    return PromptBatch(
        tokens=tokens,
        positions=np.maximum(column, 0),
        segment_ids=(column >= 0).astype(np.int32),
        index=np.arange(len(token_ids), dtype=np.int32),
    )


@functools.lru_cache(maxsize=8)
def epoch_order(seed: int, epoch: int, size: int) -> Int64[np.ndarray, "_"]:
    """The order of one epoch: a permutation of 0..size-1, keyed on (seed, epoch).

    Sorts raw generator output, whose stream NumPy keeps between releases; that of
    `Generator.permutation` may change.
    """
    draws = np.random.PCG64(np.random.SeedSequence((seed, epoch))).random_raw(size)
    order = np.argsort(draws, kind="stable")
    order.flags.writeable = False  # The cache hands out this very array.
    return order


def batch_index(
    step: int, *, seed: int, batch_size: int, size: int
) -> Int32[np.ndarray, "B"]:
    """Which prompts make the batch of one step.

    The epochs' orders form one endless sequence, and step k takes its places
    `k * batch_size` to `(k + 1) * batch_size - 1`: a batch that an epoch cannot fill
    is filled from the next (and may then hold a prompt twice). Each epoch visits each
    prompt once.

    Args:
        step: the step, from 0.
        seed: the seed of the order, not negative.
        batch_size: prompts in a batch, at most `size`.
        size: number of prompts in all.

    Returns:
        Indices in [0, size).

    Raises:
        ValueError: if an argument is out of its range.
    """
    if step < 0 or seed < 0:
        raise ValueError(f"got step {step} and seed {seed}, expected 0 or more")
    if not 1 <= batch_size <= size:
        raise ValueError(
            f"batch_size: got {batch_size} with {size} prompts, expected 1 to {size}; "
            "give more prompts or ask for a smaller batch"
        )
    epoch, first = divmod(step * batch_size, size)
    index = epoch_order(seed, epoch, size)[first : first + batch_size]
    missing = batch_size - len(index)
    if missing:
        index = np.concatenate([index, epoch_order(seed, epoch + 1, size)[:missing]])
    return index.astype(np.int32)


def make_batches(
    token_ids: Sequence[Int32[np.ndarray, "_"]],
    *,
    batch_size: int,
    seed: int,
    pad_id: int,
    length: int | None = None,
    shard: Shard = WHOLE,
    images_of: ImagesOf | None = None,
) -> Callable[[int], PromptBatch]:
    """Makes the function from a step to its batch, which a `Pipeline` calls ahead.

    The function has no state, so that a resumed run asks for its next step and gets
    what the run that was killed would have got. All batches have one shape, so that
    nothing recompiles.

    Args:
        token_ids: the prompts' token ids.
        batch_size: prompts in a batch.
        seed: the seed of the order.
        pad_id: the token id on padding.
        length: the padded length in tokens, or None for that of the longest prompt.
            Datasets that share a compiled program should be given one length.
        shard: which rows of each batch are made here.
        images_of: reads the images of a batch; None for prompts without images.

    Returns:
        A function from a step (0, 1, 2, ...) to a `PromptBatch`.

    Raises:
        ValueError: if there are fewer prompts than a batch holds, one is empty or
            longer than `length`, or a batch cannot be cut into that many shards.
    """
    rows = shard.rows(batch_size)
    batch_index(0, seed=seed, batch_size=batch_size, size=len(token_ids))
    padded_length = longest(token_ids) if length is None else length
    _checked_lengths(token_ids, padded_length)

    def batch_at(step: int) -> PromptBatch:
        index = batch_index(step, seed=seed, batch_size=batch_size, size=len(token_ids))
        index = index[rows]
        chosen = [token_ids[i] for i in index]
        images = None if images_of is None else images_of(index.tolist())
        batch = pad_prompts(chosen, padded_length, pad_id)
        return batch._replace(index=index, images=images)

    return batch_at


def _checked_lengths(
    token_ids: Sequence[Int32[np.ndarray, "_"]], longest_allowed: int
) -> Int32[np.ndarray, "_"]:
    lengths = np.array([len(ids) for ids in token_ids], dtype=np.int32)
    wrong = np.flatnonzero((lengths < 1) | (lengths > longest_allowed))
    if wrong.size:
        raise ValueError(
            f"prompt {wrong[0]} has {lengths[wrong[0]]} tokens (one of {wrong.size} "
            f"such prompts), expected 1 to {longest_allowed}"
        )
    return lengths
