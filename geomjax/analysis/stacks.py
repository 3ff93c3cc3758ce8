"""Which tensors are measured together, in which blocks, and the memory that takes."""

import math
import os
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from geomjax.analysis.programs import Layout
from geomjax.analysis.rounds import Block
from geomjax.checkpoints import CheckpointSource, Match
from geomjax.update import TensorKind

BLOCK_ENTRIES = 1 << 20
"""Entries of a block, and of the stacks of tensors that are smaller than that."""
_COLUMN_STEP = 64


class Stack(NamedTuple):
    """Tensors that the same compiled programs measure at the same time.

    Attributes:
        items: the tensors, at most `layout.depth` of them.
        kinds: shape and dtypes of each.
        layout: the blocks in which they are measured; None for tensors without entries.
    """

    items: tuple[Match, ...]
    kinds: tuple[TensorKind, ...]
    layout: Layout | None

    @property
    def is_matrix(self) -> bool:
        """Whether its tensors have two axes."""
        return len(self.kinds[0].shape) == 2

    @property
    def blocks(self) -> int:
        """Blocks of the longest tensor."""
        assert self.layout is not None
        longest = max(sides(kind.shape)[1] for kind in self.kinds)
        return -(-longest // self.layout.columns)


def sides(shape: tuple[int, ...]) -> tuple[int, int]:
    """Short and long side; what does not have two axes is one row."""
    if len(shape) == 2:
        return min(shape), max(shape)
    return 1, math.prod(shape)


def block_columns(r: int, lengths: Iterable[int]) -> int:
    """Columns of the blocks of tensors with short side r.

    One number for all of them, so that they share their programs: as many as the
    longest has, or where that is more than a block holds, the number that pads least.
    """
    lengths = list(lengths)
    most = max(1, BLOCK_ENTRIES // r)
    if max(lengths) <= most:
        return max(lengths)
    step = _COLUMN_STEP if most > 2 * _COLUMN_STEP else 1
    most -= most % step
    choices = range(most, most // 2, -step)
    return min(choices, key=lambda c: sum(-(-length // c) * c for length in lengths))


def working_bytes(layout: Layout, blocks: int) -> int:
    """Memory that measuring a stack takes, in bytes, inputs included, about.

    Both sides in storage dtype, the host's copy going as the device's comes; what is
    computed from one block, in float64; Gram matrices and what LAPACK works in;
    histograms. Not what is kept between the passes, see `kept_bytes`.
    """
    in_block = layout.r * layout.columns
    stored = np.dtype(layout.source_dtype).itemsize
    stored += np.dtype(layout.tuned_dtype).itemsize
    each = stored * in_block * blocks + 160 * in_block + 120 * layout.r**2
    return layout.depth * (each + (4 << 20))


def kept_bytes(layout: Layout, blocks: int) -> int:
    """Memory for `rounds.Vectors`, where they are kept between passes, about.

    Up to k vectors of W and of W' in float64, and four keys of 4 bytes for each entry.
    """
    k = max(min(512, layout.r // 2), layout.r // 5)
    return layout.depth * 16 * (k + layout.r) * layout.columns * blocks


def plan_stacks(
    source: CheckpointSource,
    tuned: CheckpointSource,
    matched: Iterable[Match],
    *,
    memory_budget: int,
    devices: int,
    max_factor_dim: int | None = None,
) -> list[Stack]:
    """Cuts the matched tensors into stacks.

    The cut depends on the arguments alone, not on what has been measured already, so
    that a resumed run computes every tensor in the company it had the first time.

    Args:
        source: the checkpoint before training.
        tuned: the checkpoint after it.
        matched: the tensors to measure.
        memory_budget: bytes that one stack may take.
        devices: devices that share a stack; its depth is a multiple of it.
        max_factor_dim: short side above which a matrix is a stack of its own, of depth
            1 whatever the devices, for `measure_large`.

    Returns:
        Stacks, those of the largest tensors first, so that nothing long is left to run
        alone at the end.
    """
    groups: dict[tuple, list[tuple[Match, TensorKind]]] = defaultdict(list)
    for item in matched:
        kind = kind_of(source, tuned, item)
        empty = 0 in kind.shape
        r = 0 if empty else sides(kind.shape)[0]
        matrix = len(kind.shape) == 2
        groups[r, matrix, *kind[1:]].append((item, kind))
    stacks = []
    for (r, is_matrix, *dtypes), members in groups.items():
        members.sort(key=lambda member: -math.prod(member[1].shape))
        layout, depth = None, len(members)
        if r:
            columns = block_columns(r, [sides(kind.shape)[1] for _, kind in members])
            one = Layout(1, r, columns, *dtypes)
            blocks = -(-sides(members[0][1].shape)[1] // columns)
            affordable = memory_budget // (devices * working_bytes(one, blocks))
            wanted = min(BLOCK_ENTRIES // (r * columns), -(-len(members) // devices))
            depth = devices * max(1, min(wanted, affordable))
            if is_matrix and max_factor_dim is not None and r > max_factor_dim:
                depth = 1
            layout = one._replace(depth=depth)
        for start in range(0, len(members), depth):
            part = members[start : start + depth]
            items, kinds = zip(*part, strict=True)
            stacks.append(Stack(tuple(items), tuple(kinds), layout))
    return sorted(stacks, key=lambda stack: -math.prod(stack.kinds[0].shape))


def kind_of(
    source: CheckpointSource, tuned: CheckpointSource, item: Match
) -> TensorKind:
    """Shape and dtypes of a matched tensor."""
    before, after = source.spec(item.source_key), tuned.spec(item.tuned_key)
    return TensorKind(item.shape, str(before.dtype), str(after.dtype))


def read(source: CheckpointSource, key: str, rows: int | None) -> np.ndarray:
    """A tensor of a checkpoint, or its leading rows."""
    tensor = source.read(key)
    return tensor if rows is None else tensor[:rows]


def read_blocks(
    source: CheckpointSource, tuned: CheckpointSource, stack: Stack
) -> list[Block]:
    """Reads a stack: its blocks, turned so that the short side comes first.

    The pages of mapped files are given back as they are copied.
    """
    before = _read_side(source, [(m.source_key, m.rows) for m in stack.items], stack)
    after = _read_side(tuned, [(m.tuned_key, m.rows) for m in stack.items], stack)
    return to_blocks(before, after, stack)


def to_blocks(
    before: Sequence[np.ndarray], after: Sequence[np.ndarray], stack: Stack
) -> list[Block]:
    """Blocks of both sides, with how many columns each tensor has in them."""
    assert stack.layout is not None
    columns, lengths = stack.layout.columns, np.zeros(stack.layout.depth, np.int64)
    for i, kind in enumerate(stack.kinds):
        lengths[i] = sides(kind.shape)[1]
    return [
        Block(w, w_tuned, np.clip(lengths - i * columns, 0, columns).astype(np.int32))
        for i, (w, w_tuned) in enumerate(zip(before, after, strict=True))
    ]


def _read_side(
    source: CheckpointSource, keys: Sequence[tuple[str, int | None]], stack: Stack
) -> list[np.ndarray]:
    out: list[np.ndarray] = []
    for i, (key, rows) in enumerate(keys):
        tensor = read(source, key, rows)
        if not out:
            out = empty_blocks(stack, tensor.dtype)
        fill_blocks(out, i, tensor)
        source.release(key)
    return out


def empty_blocks(stack: Stack, dtype: np.dtype) -> list[np.ndarray]:
    """Blocks of zeros."""
    assert stack.layout is not None
    shape = stack.layout[:3]
    return [np.zeros(shape, dtype) for _ in range(stack.blocks)]


def fill_blocks(blocks: Sequence[np.ndarray], place: int, tensor: np.ndarray) -> None:
    """Copies a tensor to its place in a stack's blocks."""
    matrix = tensor if tensor.ndim == 2 else tensor.reshape(1, -1)
    turned = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    columns = blocks[0].shape[-1]
    for i, block in enumerate(blocks):
        part = turned[:, i * columns : (i + 1) * columns]
        block[place, :, : part.shape[1]] = part


def available_memory() -> int:
    """Bytes of memory that can be taken without swapping."""
    try:
        with open("/proc/meminfo") as file:
            for line in file:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except FileNotFoundError:
        pass
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
