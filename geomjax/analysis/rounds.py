"""The measurement of a stack in three passes over its blocks.

A stack is p matrices of one short side r, turned so that it comes first, and cut into
blocks of b columns. Whatever their long sides, all stacks of one r and b run the same
few compiled programs:

    first     sums that need nothing else: Gram matrices, norms, histograms
    vectors   a block of the long side's vectors of W and W', keys of W's masks
    second    cosines between them, energies of D, histograms of the principal masks
    third     residuals of the subspaces, entries by mask and support

`first`, `second` and `third` add one block to their total; what lies between the passes
is done on the host, see `geomjax.analysis.between`. Every array has the stack as its
first axis and no entry of it meets another: a stack may be sharded without
communication. Run them under `jax.enable_x64(True)`: sums are in float64, and counts in
int64, as a matrix may have more than 2^31 entries.
"""

# The plan says which of the optional results are there; the type checker cannot know.
# mypy: disable-error-code="arg-type, index, misc, operator, union-attr"

from functools import reduce
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int, UInt32

from geomjax.analysis.needs import Needs
from geomjax.geometry import masks, sparsity, subspace
from geomjax.geometry.blocks import transpose
from geomjax.geometry.factor import AnyArray, Factors, gram_rows, matmul
from geomjax.geometry.select import (
    FINE_KEY_BITS,
    count_inside,
    count_level,
    magnitude_key,
)
from geomjax.update import Delta, Subtract, form, to_bfloat16

GramRows = tuple[Float[Array, "p _ _"], ...]


class Plan(NamedTuple):
    """What the programs depend on beside their arrays."""

    delta: Delta
    subtract: Subtract
    needs: Needs

    @property
    def counted(self) -> bool:
        """Whether D is in bfloat16: a histogram of 2^16 bins then tells all of |D|."""
        return self.delta == "stored" and self.subtract == "bfloat16"

    @property
    def delta_keys(self) -> bool:
        """Whether that histogram, or the one of the upper bits, is needed."""
        needs = self.needs
        thresholds = needs.atols or needs.rms_tolerances
        return bool(needs.coordinate_fractions or (self.counted and thresholds))


class Block(NamedTuple):
    """Columns of the matrices of a stack, in storage dtype.

    Attributes:
        source: of W.
        tuned: of W'.
        columns: how many of the block's columns each matrix has; the rest is zero.
    """

    source: Float[AnyArray, "p r b"]
    tuned: Float[AnyArray, "p r b"]
    columns: Int[AnyArray, " p"]

    @property
    def fresh(self) -> Bool[Array, "p b"]:
        """Which columns are the matrices' own."""
        place = jnp.arange(self.source.shape[-1], dtype=jnp.int32)
        return place[None] < self.columns[:, None]


class First(NamedTuple):
    """Sums of the first pass; what is not needed is None.

    `within` is None too where `Plan.counted`: `delta_keys` tells it.
    """

    not_finite: Int[Array, " p"]
    energies: Float[Array, "p 3"]
    largest: Float[Array, " p"]
    within: Int[Array, "p a"] | None
    unchanged: Int[Array, " p"] | None
    source_gram: GramRows | None
    tuned_gram: GramRows | None
    delta_gram: GramRows | None
    source_keys: Int[Array, "p bins"] | None
    delta_keys: Int[Array, "p bins"] | None

    @property
    def small(self) -> "First":
        """The sums without Gram matrices and histograms."""
        return First(*self[:5], *[None] * 5)


class Known(NamedTuple):
    """What the second pass and the third must know of the first.

    Attributes:
        source: factors of W.
        tuned: factors of W'.
        limits: of |D|, in float32.
        low: upper 16 bits of where each low mask ends.
        coordinates: those of where the largest coordinates end.
    """

    source: Factors | None
    tuned: Factors | None
    limits: Float[AnyArray, "p t"] | None
    low: Int[AnyArray, "p q"] | None
    coordinates: Int[AnyArray, "p f"] | None


class Vectors(NamedTuple):
    """What belongs to a block of the long side; what is not needed is None.

    Attributes:
        source: leading vectors of W.
        tuned: those of W'.
        keys: of the reconstructions of W that are the principal masks.
    """

    source: Float[Array, "p k b"] | None
    tuned: Float[Array, "p l b"] | None
    keys: UInt32[Array, "p q r b"] | None


class Second(NamedTuple):
    """Sums of the second pass; `below` is None where `Plan.counted`."""

    below: Int[Array, "p t"] | None
    cosines: Float[Array, "p l l"] | None
    on_short: Float[Array, "p k"] | None
    on_long: Float[Array, "p k r"] | None
    principal: Int[Array, "p q bins"] | None
    low: Int[Array, "p q bins"] | None
    coordinates: Int[Array, "p f bins"] | None


class Cuts(NamedTuple):
    """What the third pass must know of the second.

    Attributes:
        low: key of where each low mask ends.
        principal: upper bits of the key of where each principal mask ends.
        coordinates: key of where the largest coordinates end.
    """

    low: UInt32[AnyArray, "p q"] | None
    principal: Int[AnyArray, "p q"] | None
    coordinates: UInt32[AnyArray, "p f"] | None


class Third(NamedTuple):
    """Sums of the third pass; `above` is None where `Plan.counted`."""

    residuals: tuple[GramRows, ...]
    joint: Int[Array, "p q c"] | None
    above: Float[Array, "p f"] | None


def first(total: First | None, block: Block, *, plan: Plan) -> First:
    """Adds a block to the sums of the first pass; `total` is None for the first."""
    needs = plan.needs
    w, w_tuned, d = _form(block, plan)
    fresh = block.fresh[:, None]
    wide = jnp.result_type(float)
    sides = [x.astype(wide) for x in (w, w_tuned, d)]
    finite = jnp.isfinite(w) & jnp.isfinite(w_tuned)
    size = lax.optimization_barrier(jnp.abs(d.astype(jnp.float32)))
    within = None
    if needs.atols and not plan.counted:
        within = _within(size, _atol_limits(needs, len(size)), fresh)

    def grams(x, wanted):
        return gram_rows(x) if wanted else None

    part = First(
        _count(~finite),
        jnp.stack([jnp.sum(jnp.square(x), axis=(-2, -1)) for x in sides], axis=-1),
        jnp.max(size, axis=(-2, -1)).astype(wide),
        within,
        _unchanged(block) if needs.bf16_unchanged else None,
        grams(sides[0], needs.source_directions is not None),
        grams(sides[1], needs.tuned_directions is not None),
        grams(sides[2], needs.delta_values),
        count_level(magnitude_key(w), block.fresh) if needs.masks else None,
        count_level(magnitude_key(d), block.fresh) if plan.delta_keys else None,
    )
    out = _add(total, part)
    if total is None:
        return out
    return out._replace(largest=jnp.maximum(total.largest, part.largest))


def vectors(known: Known, block: Block, *, plan: Plan) -> Vectors:
    """What both later passes need of a block of columns."""
    needs = plan.needs
    w, w_tuned, _ = _form(block, plan)

    def leading(factors, k, x):
        rows = factors.short[:, :k] * factors.scale[:, :k, None]
        return matmul(rows, x.astype(rows.dtype))

    a = b = keys = None
    if needs.long_vectors:
        a = leading(known.source, needs.long_vectors, w)
    if needs.sine_ranks:
        b = leading(known.tuned, max(needs.sine_ranks), w_tuned)
    if needs.masks:
        keys = masks.principal_keys(known.source, a, [m.rank for m in needs.masks])
    return Vectors(a, b, keys)


def second(
    total: Second | None,
    known: Known,
    vectors: Vectors,
    block: Block,
    *,
    plan: Plan,
) -> Second:
    """Adds a block to the sums of the second pass."""
    needs, (a, b, keys) = plan.needs, vectors
    w, _, d = _form(block, plan)
    below = cosines = on_short = on_long = principal = low = coordinates = None
    if needs.rms_tolerances and not plan.counted:
        size = lax.optimization_barrier(jnp.abs(d.astype(jnp.float32)))
        below = _within(size, known.limits, block.fresh[:, None])
    if needs.sine_ranks:
        cosines = matmul(b, transpose(a[:, : b.shape[1]]))
    if needs.energy_ranks:
        k = max(needs.energy_ranks)
        on_short, on_long = subspace.inside(
            known.source.short[:, :k], a[:, :k], d.astype(a.dtype)
        )
    if needs.masks:
        principal = count_level(keys, block.fresh, FINE_KEY_BITS)
        if w.dtype == jnp.float32:
            low = count_inside(magnitude_key(w), known.low, block.fresh)
    if needs.coordinate_fractions and d.dtype == jnp.float32:
        bins = known.coordinates
        coordinates = count_inside(magnitude_key(d), bins, block.fresh)
    part = Second(below, cosines, on_short, on_long, principal, low, coordinates)
    return _add(total, part)


def third(
    total: Third | None,
    known: Known,
    cosines: Float[Array, "p l l"] | None,
    cuts: Cuts,
    vectors: Vectors,
    block: Block,
    *,
    plan: Plan,
) -> Third:
    """Adds a block to the sums of the third pass."""
    needs, (a, b, keys) = plan.needs, vectors
    w, _, d = _form(block, plan)
    residuals = tuple(
        subspace.residual_gram(a[:, :k], b[:, :k], cosines[:, :k, :k])
        for k in needs.sine_ranks
    )
    joint = above = None
    if needs.masks:
        joint = masks.joint_counts(
            keys, cuts.principal, w, cuts.low, d, needs.support_atol, block.fresh
        )
    if needs.coordinate_fractions and not plan.counted:
        thresholds = lax.bitcast_convert_type(cuts.coordinates, jnp.float32)
        above = sparsity.energy_above(d, thresholds)
    return _add(total, Third(residuals, joint, above))


def _form(block: Block, plan: Plan) -> tuple[Array, Array, Array]:
    """W, W' and D of a block, once: XLA would form D again for each of its uses."""
    formed = form(block.source, block.tuned, delta=plan.delta, subtract=plan.subtract)
    return lax.optimization_barrier(formed)


def combine(totals):
    """The sum of totals of one pass over different blocks, on the host."""
    out = reduce(lambda a, b: jax.tree.map(np.add, a, b), totals)
    if isinstance(out, First):
        return out._replace(largest=reduce(np.maximum, [t.largest for t in totals]))
    return out


def _add(total, part):
    """Adds a block's sums; its counts are in int32, those of a matrix in int64."""

    def wide(x):
        counts = jnp.issubdtype(x.dtype, jnp.integer)
        return x.astype(jnp.result_type(int)) if counts else x

    part = jax.tree.map(wide, part)
    return part if total is None else jax.tree.map(jnp.add, total, part)


def _count(mask: Bool[Array, "p r b"]) -> Int[Array, " p"]:
    return jnp.sum(mask, axis=(-2, -1), dtype=jnp.int32)


def _within(
    size: Float[Array, "p r b"], limits: Float[Array, "p t"], fresh: Bool[Array, "..."]
) -> Int[Array, "p t"]:
    """Counts of entries up to each limit, in float32."""
    # Unrolled: one reduction over [p, t, r, b] runs at a fifth of the rate.
    counts = [
        _count((size <= limits[:, i, None, None]) & fresh)
        for i in range(limits.shape[-1])
    ]
    return jnp.stack(counts, axis=-1)


def _atol_limits(needs: Needs, depth: int) -> Float[Array, "p a"]:
    exact = jnp.asarray(needs.atols, jnp.result_type(float))
    return jnp.broadcast_to(sparsity.float32_upto(exact), (depth, len(needs.atols)))


def _unchanged(block: Block) -> Int[Array, " p"]:
    same = sparsity.bf16_same(to_bfloat16(block.source), to_bfloat16(block.tuned))
    return _count(same & block.fresh[:, None])
