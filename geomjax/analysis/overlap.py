"""Do two trainings of one source move the same coordinates? P1's Table 4."""

from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from geomjax.analysis.measure import Row
from geomjax.checkpoints import CheckpointSource, match
from geomjax.names import classify
from geomjax.update import Delta, Subtract, form

ATOL = 1e-5
CHUNK = 1 << 20
"""Entries that are counted at a time."""


class MaskCounts(NamedTuple):
    """Sizes of two update supports and of their intersection.

    Attributes:
        numel: coordinates compared.
        a: those that the first update moves.
        b: those that the second moves.
        both: those that both move.
    """

    numel: int
    a: int
    b: int
    both: int

    def __add__(self, other: tuple) -> "MaskCounts":
        return MaskCounts(*(x + y for x, y in zip(self, other, strict=True)))


@partial(jax.jit, static_argnames=("delta", "subtract", "atol"))
def count_masks(
    source: Float[Array, "*s"],
    a: Float[Array, "*s"],
    b: Float[Array, "*s"],
    *,
    delta: Delta = "stored",
    subtract: Subtract = "bfloat16",
    atol: float = ATOL,
) -> Int[Array, " 4"]:
    """Counts of `|D_a| > atol`, `|D_b| > atol` and both, P1 eqs. (25) to (27).

    A difference in bfloat16 is compared with the tolerance in bfloat16, as the public
    script does: 1e-5 becomes 1.0014e-5.

    Args:
        source: W, in storage dtype.
        a: the first tuned copy of it.
        b: the second.
        delta: see `geomjax.update.form`.
        subtract: likewise.
        atol: coordinates that moved by no more count as unmoved.

    Returns:
        The three counts, and that of the coordinates where a side is not finite.
    """

    def moved(tuned):
        d = form(source, tuned, delta=delta, subtract=subtract)[2]
        return jnp.abs(d) > jnp.asarray(atol, d.dtype)

    masks = moved(a), moved(b)
    both = masks[0] & masks[1]
    bad = ~(jnp.isfinite(source) & jnp.isfinite(a) & jnp.isfinite(b))
    return jnp.stack([jnp.sum(x, dtype=jnp.int32) for x in (*masks, both, bad)])


def describe(counts: MaskCounts) -> dict[str, float | int | None]:
    """Coverage, Jaccard and lift with their chance levels, from counts.

    Two independent masks of densities p and q meet in `pq` of the coordinates: chance
    is q for the coverage of a by b, and `pq / (p + q - pq)` for Jaccard's index. The
    lift, observed over chance, is the same number from both sides.

    Args:
        counts: sizes of the supports.

    Returns:
        The columns of overlap.csv; None where a support is empty.
    """
    numel, a, b, both = counts
    p, q = _over(a, numel), _over(b, numel)
    union = a + b - both
    chance = None
    if p is not None and q is not None:
        chance = _over(p * q, p + q - p * q)
    jaccard = _over(both, union)
    return {
        "numel": numel,
        "a_density": p,
        "b_density": q,
        "covered_by_b": _over(both, a),
        "covered_by_b_chance": q,
        "covered_by_a": _over(both, b),
        "covered_by_a_chance": p,
        "jaccard": jaccard,
        "jaccard_chance": chance,
        "lift": _over(both * numel, a * b),
    }


def _over(numerator: float | int, denominator: float | int) -> float | None:
    return numerator / denominator if denominator else None


def overlap(
    source: CheckpointSource,
    a: CheckpointSource,
    b: CheckpointSource,
    *,
    delta: Delta = "stored",
    subtract: Subtract = "bfloat16",
    atol: float = ATOL,
    progress: Callable[[str], None] = lambda name: None,
) -> list[Row]:
    """Compares the supports of two updates of one source, tensor by tensor.

    Args:
        source: the checkpoint that both trainings started from.
        a: the first trained checkpoint.
        b: the second.
        delta: see `geomjax.update.form`.
        subtract: likewise.
        atol: coordinates that moved by no more count as unmoved.
        progress: called with the name of each tensor when it is done.

    Returns:
        A row for each tensor that all three have, with the counts `a`, `b` and `both`;
        these and what follows from them are None where a side is not finite.
    """
    rows = []
    for name, w, w_a, w_b in _triples(source, a, b):
        count = partial(count_masks, delta=delta, subtract=subtract, atol=atol)
        found = [jax.device_get(count(*parts)) for parts in _chunks(w, w_a, w_b)]
        *moved, bad = (sum(map(int, part)) for part in zip(*found, strict=True))
        counts = MaskCounts(w.size, *moved)
        numbers = counts._asdict() | describe(counts)
        if bad:
            numbers = dict.fromkeys(numbers) | {"numel": counts.numel}
        rows.append({"name": name, **classify(name)._asdict(), **numbers})
        progress(name)
    return rows


def _chunks(*tensors: np.ndarray) -> Iterator[tuple[np.ndarray, ...]]:
    """Parts of the tensors, small enough to be counted in int32.

    What fills the last one up did not move. Tensors of every shape share a program.
    """
    flat = [tensor.reshape(-1) for tensor in tensors]
    if flat[0].size <= CHUNK:
        yield tuple(flat)
        return
    for start in range(0, flat[0].size, CHUNK):
        parts = [x[start : start + CHUNK] for x in flat]
        yield tuple(np.pad(part, (0, CHUNK - part.size)) for part in parts)


def summarize_overlap(rows: list[Row]) -> dict[str, Any]:
    """Pools the counts over the model, its groups, modules and layers.

    Args:
        rows: rows of `overlap`.

    Returns:
        `{"global": ..., "groups": {...}, "modules": {...}, "layers": {...},
        "not_finite": [...]}`; tensors with NaN or infinity are named and in no count.
    """
    not_finite = [row["name"] for row in rows if row["both"] is None]
    rows = [row for row in rows if row["both"] is not None]

    def pooled(key: Callable[[Row], str | None]) -> dict[str, Any]:
        sums: dict[str, MaskCounts] = defaultdict(lambda: MaskCounts(0, 0, 0, 0))
        for row in rows:
            if (label := key(row)) is not None:
                sums[label] += (row["numel"], row["a"], row["b"], row["both"])
        return {label: describe(counts) for label, counts in sums.items()}

    def layer(row: Row) -> str | None:
        has_one = row["layer"] is not None and row["group"] != "vision"
        return str(row["layer"]) if has_one else None

    return {
        "global": describe(_total(rows)),
        "groups": pooled(lambda row: row["group"]),
        "modules": pooled(lambda row: row["module"]),
        "layers": pooled(layer),
        "not_finite": not_finite,
    }


def _total(rows: list[Row]) -> MaskCounts:
    counts = MaskCounts(0, 0, 0, 0)
    for row in rows:
        counts += (row["numel"], row["a"], row["b"], row["both"])
    return counts


def _triples(
    source: CheckpointSource, a: CheckpointSource, b: CheckpointSource
) -> Iterator[tuple]:
    """Tensors that all three have, read one after another."""
    in_b = {item.name: item for item in match(source, b).matched}
    for item in match(source, a).matched:
        other = in_b.get(item.name)
        if other is None or 0 in item.shape:
            continue
        yield (
            item.name,
            source.read(item.source_key),
            a.read(item.tuned_key),
            b.read(other.tuned_key),
        )
        for side, key in (
            (source, item.source_key),
            (a, item.tuned_key),
            (b, other.tuned_key),
        ):
            side.release(key)
