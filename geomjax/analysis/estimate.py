"""What a run would take, from names and shapes alone."""

import math
from typing import NamedTuple

from geomjax.analysis.stacks import available_memory, plan_stacks, sides, working_bytes
from geomjax.checkpoints import CheckpointSource, match


class Estimate(NamedTuple):
    """What a run would take.

    Attributes:
        tensors: matched tensors.
        bytes_read: bytes of both checkpoints that would be read.
        memory: bytes of the stack that is measured and of the one that is read.
        disk: bytes of the results, about.
        operations: floating-point operations in float64, about.
    """

    tensors: int
    bytes_read: int
    memory: int
    disk: int
    operations: float


def estimate(
    source: CheckpointSource,
    tuned: CheckpointSource,
    *,
    memory_budget: int | None = None,
) -> Estimate:
    """Time, memory and disk that a run would take, from names and shapes alone."""
    matched = match(source, tuned).matched
    budget = available_memory() // 4 if memory_budget is None else memory_budget
    stacks = plan_stacks(source, tuned, matched, memory_budget=budget // 2, devices=1)
    sizes = sorted(
        (working_bytes(s.layout, s.blocks) for s in stacks if s.layout is not None),
        reverse=True,
    )
    nbytes = sum(
        math.prod(m.shape) * source.spec(m.source_key).dtype.itemsize
        + math.prod(m.shape) * tuned.spec(m.tuned_key).dtype.itemsize
        for m in matched
    )
    return Estimate(
        tensors=len(matched),
        bytes_read=nbytes,
        memory=sum(sizes[:2]),
        disk=len(matched) * 16384,
        operations=sum(operations(m.shape).total for m in matched),
    )


class Operations(NamedTuple):
    """Floating-point operations of the matrix columns of one tensor, about.

    Attributes:
        gram: three Gram matrices of the short side, each 5/8 of a product.
        factor: two eigenproblems with vectors and one without, counted as what a
            product would do in their time: ten r^3 each, and six.
        angles: vectors of the long side, cosines and residuals of W and W'.
        masks: projections and reconstructions up to a fifth of r, the latter twice.
    """

    gram: float
    factor: float
    angles: float
    masks: float

    @property
    def total(self) -> float:
        """All of them."""
        return sum(self)


def operations(shape: tuple[int, ...]) -> Operations:
    """Operations that one tensor takes, by phase; none where it has not two axes."""
    if len(shape) != 2 or 0 in shape:
        return Operations(0.0, 0.0, 0.0, 0.0)
    r, long = sides(shape)
    k, fifth = min(512, r // 2), r // 5
    return Operations(
        gram=3 * 0.625 * 2 * r * r * long,
        factor=26.0 * r**3,
        angles=2 * long * (2 * k * r + 2.7 * k * k) + 6 * k * k * r,
        masks=2 * long * r * 4 * fifth,
    )
