"""The update of one run at each of its checkpoints, as in P2's Figures 4, 5 and 7."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from geomjax.analysis.measure import Row, solving_device
from geomjax.checkpoints import CheckpointSource, match
from geomjax.geometry import factor, spectrum
from geomjax.geometry.trajectory import right_similarity
from geomjax.names import classify
from geomjax.update import Delta, Subtract, form

SIMILARITY_RANK = 16
NOT_FINITE = "not finite: excluded from every mean"
COLUMNS = (
    "delta_frobenius",
    "stable_rank",
    "hill_exponent_K",
    f"subspace_similarity_{SIMILARITY_RANK}",
    f"subspace_similarity_{SIMILARITY_RANK}_next",
    f"subspace_similarity_{SIMILARITY_RANK}_chance",
)


@partial(jax.jit, static_argnames=("delta", "subtract", "hill_rank", "k"))
def measure_steps(
    source: Float[Array, "m n"],
    steps: Float[Array, "t m n"],
    *,
    delta: Delta,
    subtract: Subtract,
    hill_rank: int,
    k: int,
) -> Float[Array, "t 5"]:
    """Norm, stable rank, Hill exponent and similarities of D_t = W_t - W_0.

    Args:
        source: W_0, in storage dtype.
        steps: W_1 ... W_T.
        delta: see `geomjax.update.form`.
        subtract: likewise.
        hill_rank: K of the Hill exponent.
        k: right singular vectors compared.

    Returns:
        For each t: the norm, the stable rank, the Hill exponent, the similarity to T
        and that to t + 1 (NaN for T); NaN where D_t has fewer than k directions.
    """
    start = jnp.broadcast_to(source, steps.shape)
    d = form(start, steps, delta=delta, subtract=subtract)[2]
    factors = factor.factor(d, k)
    values = factors.values
    known = jnp.all(factors.scale > 0, axis=-1)

    def similarity(shifted):
        index = jnp.asarray(shifted, jnp.int32)
        other = jax.tree.map(lambda x: x[index], factors)
        found = right_similarity(d, d[index], factors, other)
        return jnp.where(known & known[index], found, jnp.nan)

    last = len(steps) - 1
    following = similarity([min(t + 1, last) for t in range(len(steps))])
    columns = [
        jnp.linalg.norm(values, axis=-1),
        spectrum.stable_rank(values),
        spectrum.hill_exponent(values, hill_rank),
        similarity([last] * len(steps)),
        following.at[last].set(jnp.nan),
    ]
    return jnp.stack(columns, axis=-1)


def _require_one_run(matched: list[dict[str, str]], labels: Sequence[str]) -> None:
    """Raises where a tensor of the source is in some of the checkpoints only."""
    first = matched[0].keys()
    for keys, label in zip(matched, labels, strict=True):
        if odd := sorted(first ^ keys.keys()):
            raise ValueError(
                f"checkpoints {labels[0]} and {label} hold different tensors of the "
                f"source, {odd[0]} and {len(odd) - 1} others; expected checkpoints of "
                "one run, which hold the same"
            )


def trajectory(
    source: CheckpointSource,
    checkpoints: Sequence[CheckpointSource],
    labels: Sequence[str],
    *,
    delta: Delta = "stored",
    subtract: Subtract = "bfloat16",
    hill_rank: int | None = None,
    progress: Callable[[str], None] = lambda name: None,
) -> list[Row]:
    """Follows each matrix's update over the checkpoints of one run.

    Args:
        source: the checkpoint that the run started from, W_0.
        checkpoints: W_1 ... W_T in the order of training.
        labels: what to call them, such as their steps.
        delta: see `geomjax.update.form`.
        subtract: likewise.
        hill_rank: K of the Hill exponent, max(2, r // 10) by default.
        progress: called with the name of each matrix when it is done.

    Returns:
        A row for each matrix and checkpoint: `checkpoint`, name, layer, module, group,
        `COLUMNS` and `notes`, which says why some are null.

    Raises:
        ValueError: no checkpoint, or not one label for each, or checkpoints that hold
            different tensors of the source, as those of one run do not.
    """
    if not checkpoints or len(labels) != len(checkpoints):
        raise ValueError(
            f"{len(checkpoints)} checkpoints and {len(labels)} labels: give at least "
            "one checkpoint, and a label for each"
        )
    delta_keys = [
        {item.name: item.tuned_key for item in match(source, c).matched}
        for c in checkpoints
    ]
    _require_one_run(delta_keys, labels)
    rows = []
    for name in list(source.keys()):
        shape = source.spec(name).shape
        if len(shape) != 2 or min(shape) < 2:
            continue
        if not all(name in keys for keys in delta_keys):
            continue
        sides = zip(checkpoints, delta_keys, strict=True)
        steps = np.stack([np.asarray(c.read(keys[name])) for c, keys in sides])
        before = np.asarray(source.read(name))
        known = bool(np.all(np.isfinite(before)))
        finite = [known and bool(np.all(np.isfinite(step))) for step in steps]
        r = min(shape)
        k = min(SIMILARITY_RANK, r)
        with jax.enable_x64(True), solving_device():
            table = measure_steps(
                before,
                steps,
                delta=delta,
                subtract=subtract,
                hill_rank=spectrum.default_hill_rank(r)
                if hill_rank is None
                else min(hill_rank, r),
                k=k,
            )
            table = jax.device_get(table)
        for side, key in ((source, name), *_keys(checkpoints, delta_keys, name)):
            side.release(key)
        place = classify(name)._asdict()
        for label, values, ok in zip(labels, table.tolist(), finite, strict=True):
            numbers = dict(zip(COLUMNS, [*values, k / shape[1]], strict=True))
            clean = {c: v if math.isfinite(v) else None for c, v in numbers.items()}
            note = _note(numbers, ok)
            if note == NOT_FINITE:
                clean = dict.fromkeys(COLUMNS)
            rows.append(
                {"checkpoint": label, "name": name, **place, **clean, "notes": note}
            )
        progress(name)
    return rows


def _note(numbers: dict[str, float], finite: bool) -> str:
    """Why numbers of a row are null, empty if only what has no successor is."""
    if not finite:
        return NOT_FINITE
    if numbers["delta_frobenius"] == 0:
        return "zero update: what divides by it is undefined"
    if not math.isfinite(numbers[f"subspace_similarity_{SIMILARITY_RANK}"]):
        return "too few directions, or the last update is zero or not finite"
    return ""


def _keys(
    checkpoints: Sequence[CheckpointSource],
    keys: Sequence[dict[str, str]],
    name: str,
) -> list[tuple[CheckpointSource, str]]:
    return [(c, k[name]) for c, k in zip(checkpoints, keys, strict=True)]


def average(rows: Sequence[Row]) -> dict[str, Any]:
    """Means over the attention matrices (as P2 has it) and over all matrices.

    Args:
        rows: rows of `trajectory`.

    Returns:
        `{"attention": [...], "all": [...]}`, one dict of `COLUMNS` for each checkpoint.
    """
    labels = list(dict.fromkeys(row["checkpoint"] for row in rows))

    def means(part: Sequence[Row]) -> dict[str, float | None]:
        out: dict[str, float | None] = {}
        for column in COLUMNS:
            known = [row[column] for row in part if row[column] is not None]
            out[column] = math.fsum(known) / len(known) if known else None
        return out

    sets = {
        "attention": [row for row in rows if row["group"] == "attention"],
        "all": list(rows),
    }
    return {
        which: [
            {"checkpoint": label}
            | means([row for row in part if row["checkpoint"] == label])
            for label in labels
        ]
        for which, part in sets.items()
    }
