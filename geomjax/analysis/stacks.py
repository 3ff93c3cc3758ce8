"""Which tensors are measured together, and how much memory that takes."""

import math
import os
from collections.abc import Iterable
from typing import NamedTuple

from geomjax.checkpoints import CheckpointSource, Match
from geomjax.geometry.blocks import block_length
from geomjax.update import TensorKind, group_by_kind

_TARGET_ENTRIES = 1 << 20
"""Entries from which a stack is large enough to keep a device busy."""


class Stack(NamedTuple):
    """Tensors of one kind that one call of a compiled program measures.

    Attributes:
        kind: their shape and dtypes.
        items: the tensors, at most `depth` of them.
        depth: the program's stack depth; what is missing is filled with zeros.
    """

    kind: TensorKind
    items: tuple[Match, ...]
    depth: int


def working_bytes(kind: TensorKind) -> int:
    """Memory that measuring one tensor takes, inputs included, in bytes.

    Counted from the arrays that live at once: three stored copies, ten in float64 or
    with 32-bit keys for one block, and ten of r x r.
    """
    numel = math.prod(kind.shape)
    if len(kind.shape) != 2:
        return 40 * numel
    m, n = kind.shape
    r = min(m, n)
    in_block = r * block_length(m, n)
    return 14 * numel + 80 * in_block + 80 * r * r


def plan_stacks(
    source: CheckpointSource,
    tuned: CheckpointSource,
    matched: Iterable[Match],
    *,
    memory_budget: int,
    devices: int,
) -> list[Stack]:
    """Cuts the matched tensors into stacks.

    The cut depends on the arguments alone, not on what has been measured already, so
    that a resumed run computes every tensor in the company it had the first time.

    Args:
        source: the checkpoint before training.
        tuned: the checkpoint after it.
        matched: the tensors to measure.
        memory_budget: bytes that all stacks in flight may take together.
        devices: devices that share a stack; its depth is a multiple of it.

    Returns:
        Stacks, those of the largest tensors first, so that nothing long is left to run
        alone at the end.
    """
    by_name = {item.name: item for item in matched}
    groups = group_by_kind(
        (item.name, kind_of(source, tuned, item)) for item in by_name.values()
    )
    stacks = []
    for kind, names in groups.items():
        numel = math.prod(kind.shape)
        wanted = max(1, _TARGET_ENTRIES // max(1, numel))
        affordable = memory_budget // (devices * max(1, working_bytes(kind)))
        depth = devices * min(wanted, max(1, affordable), -(-len(names) // devices))
        for start in range(0, len(names), depth):
            part = tuple(by_name[name] for name in names[start : start + depth])
            stacks.append(Stack(kind, part, depth))
    return sorted(stacks, key=lambda stack: -math.prod(stack.kind.shape))


def kind_of(
    source: CheckpointSource, tuned: CheckpointSource, item: Match
) -> TensorKind:
    """What decides which stack a matched tensor belongs to."""
    before, after = source.spec(item.source_key), tuned.spec(item.tuned_key)
    return TensorKind(item.shape, str(before.dtype), str(after.dtype))


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
