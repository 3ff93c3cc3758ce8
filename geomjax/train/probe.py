"""Geometry of the update during a run: metrics of W_t - W_0, on the device."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
from jax import lax
from jaxtyping import Array, Float

from geomjax.geometry import factor, sparsity, spectrum
from geomjax.names import classify
from geomjax.optim.roles import Role, Roles, dotted, leaf_paths, map_with_roles
from geomjax.train.evaluate import Evaluate
from geomjax.typing import Params
from geomjax.update import Delta, Subtract, delta_dtype, form, to_bfloat16

SHARES = ("exact_zero_fraction", "unchanged_atol_1e-05")
SPECTRAL = ("stable_rank", "top_energy_16", "hill_exponent_K")
COLUMNS = ("relative_frobenius", *SHARES, *SPECTRAL)
"""What a probe can measure, by the names of the analysis' tables."""

_ATOL = 1e-5
_TOP_RANK = 16


class _Plan(NamedTuple):
    """What the compiled program depends on; `groups` and `depths` are by leaf."""

    columns: tuple[str, ...]
    delta: Delta
    subtract: Subtract
    hill_rank: int | None
    groups: tuple[str, ...]
    depths: tuple[int, ...]
    is_matrix: tuple[bool, ...]


def make_probe(
    anchor_params: Params,
    roles: Roles,
    columns: Sequence[str] = COLUMNS,
    *,
    delta: Delta = "stored",
    subtract: Subtract = "bfloat16",
    hill_rank: int | None = None,
) -> Evaluate:
    """Measures the update D = W_t - W_0 of a run where its parameters live.

    A probe is an `Evaluate`, so it joins a run by way of the loop's `evaluate`, at the
    steps at which `Schedule` evaluates:

        probe = make_probe(params, roles)

        def evaluate(params):
            return {**accuracy(params), **probe(params)}

        run(directory, state, advance, evaluate, schedule)

    A run that passes `accuracy` instead compiles, computes and keeps nothing of it.
    The training step is the same program either way, and its results the same bits.

    The kernels are those of the analysis, in float64, which is entered around this
    call alone: values equal `geomjax.analysis.measure` of the two checkpoints. Each
    stacked leaf is taken one matrix at a time, so that one of them is in float64 at
    once. Each spectral column costs the singular values of all matrices: leave the
    three of `SPECTRAL` out where eigenvalue problems in float64 are slow, as on TPUs.

    Args:
      anchor_params: W_0, stacked as the model has it. A copy is kept on its devices, in
        bfloat16 for `stored` updates and float32 for `master` ones, so that a step may
        donate the original.
      roles: What each parameter is, by path; its stack depth and kind are used.
      columns: Which of `COLUMNS` to measure.
      delta: `stored`, as exported in bfloat16, or `master`, see `geomjax.update.form`.
      subtract: Rounding of a stored difference, `bfloat16` (P1) or `float32` (P2).
      hill_rank: K of the Hill exponent, max(2, r // 10) by default.

    Returns:
      A function from parameters W_t to scalars named `update/PART/COLUMN`, or
      `master_update/PART/COLUMN`, where PART is `global` or one of the groups of
      `geomjax.names`. Norms and shares are pooled over the part; spectral columns are
      medians over its matrices that moved, named `COLUMN_median`, as P1 tabulates them.
      What is undefined, such as the stable rank of a zero update at step 0, is left
      out; so are figures of parameters that are not finite.

    Raises:
      ValueError: An unknown column, delta or subtract, none or one twice, a Hill rank
        below 2, or a path without a role; when called, parameters of other names or
        shapes than the anchor's.
    """
    delta_dtype(delta, subtract)
    unknown = [column for column in columns if column not in COLUMNS]
    if unknown or not columns or len(set(columns)) < len(columns):
        raise ValueError(
            f"columns={list(columns)}: expected at least one of {list(COLUMNS)}, each "
            "at most once"
        )
    if hill_rank is not None and hill_rank < 2:
        raise ValueError(f"hill_rank={hill_rank}: a Hill exponent needs at least 2")

    def of_each(attribute: Callable[[Role], Any]) -> tuple[Any, ...]:
        mapped = map_with_roles(
            lambda path, leaf, role: attribute(role), anchor_params, roles
        )
        return tuple(jax.tree.leaves(mapped))

    plan = _Plan(
        columns=tuple(columns),
        delta=delta,
        subtract=subtract,
        hill_rank=hill_rank,
        groups=tuple(classify(dotted(p)).group for p in leaf_paths(anchor_params)),
        depths=of_each(lambda role: role.stack_depth),
        is_matrix=of_each(lambda role: role.kind != "vector"),
    )
    keep = to_bfloat16 if delta == "stored" else partial(jnp.asarray, dtype=jnp.float32)
    anchor = jax.tree.map(lambda leaf: jnp.copy(keep(leaf)), anchor_params)
    shapes = _shapes(anchor)
    prefix = "update" if delta == "stored" else "master_update"

    def probe(params: Params) -> dict[str, float]:
        if _shapes(params) != shapes:
            differ = sorted(set(_shapes(params).items()) ^ set(shapes.items()))
            raise ValueError(
                "the parameters are not those of the anchor; names and shapes that one "
                f"side alone has: {differ}"
            )
        with jax.enable_x64(True):
            measured = jax.device_get(_measure(anchor, params, plan=plan))
        scalars = {f"{prefix}/{name}": float(v) for name, v in measured.items()}
        return {name: v for name, v in scalars.items() if v == v}

    return probe


def _shapes(params: Params) -> dict[str, tuple[int, ...]]:
    leaves = jax.tree.leaves(params)
    names = map(dotted, leaf_paths(params))
    return {name: x.shape for name, x in zip(names, leaves, strict=True)}


class _Leaf(NamedTuple):
    """Numbers of the p tensors of one leaf.

    Attributes:
      numel: Entries of each tensor.
      values: `source_energy` and `delta_energy`, and the columns asked for but the
        relative norm; `[p]` each, NaN where undefined.
    """

    numel: int
    values: dict[str, Float[Array, " p"]]


@partial(jax.jit, static_argnames="plan")
def _measure(
    anchor: Params, params: Params, *, plan: _Plan
) -> dict[str, Float[Array, ""]]:
    """The scalars of all parts; undefined ones are NaN."""
    leaves = []
    for before, after, depth, is_matrix in zip(
        jax.tree.leaves(anchor),
        jax.tree.leaves(params),
        plan.depths,
        plan.is_matrix,
        strict=True,
    ):
        shape = before.shape[depth:]
        stacks = (before.reshape(-1, *shape), after.reshape(-1, *shape))
        one = partial(_measure_tensor, plan=plan, is_matrix=is_matrix)
        leaves.append(_Leaf(math.prod(shape), lax.map(one, stacks)))
    out = {}
    for part in ("global", *dict.fromkeys(plan.groups)):
        chosen = [
            leaf
            for leaf, group in zip(leaves, plan.groups, strict=True)
            if part in ("global", group)
        ]
        for name, value in _aggregate(chosen, plan.columns).items():
            out[f"{part}/{name}"] = value
    return out


def _measure_tensor(
    pair: tuple[Float[Array, "*s"], Float[Array, "*s"]],
    *,
    plan: _Plan,
    is_matrix: bool,
) -> dict[str, Float[Array, ""]]:
    source, _, d = form(*pair, delta=plan.delta, subtract=plan.subtract)
    flat = d.reshape(-1).astype(jnp.float32)
    delta_energy = sparsity.energy(flat)
    out = {
        "source_energy": sparsity.energy(source.reshape(-1)),
        "delta_energy": delta_energy,
    }
    # P1 compares in bfloat16 where D is rounded to it, its tolerance rounded too.
    rounded = d.dtype == jnp.bfloat16
    atol = float(ml_dtypes.bfloat16(_ATOL)) if rounded else _ATOL
    shares = sparsity.fraction_within(flat, jnp.asarray([0.0, atol]))
    out |= {c: shares[i] for i, c in enumerate(SHARES) if c in plan.columns}
    if not is_matrix or not set(SPECTRAL) & set(plan.columns):
        return out
    values = factor.singular_values(d)
    r = values.shape[-1]
    k = spectrum.default_hill_rank(r) if plan.hill_rank is None else plan.hill_rank
    hill = spectrum.hill_exponent(values, min(k, r)) if r > 1 else jnp.nan
    spectral = {
        "stable_rank": delta_energy / jnp.square(values[0]),
        "top_energy_16": spectrum.top_energy(values, _TOP_RANK),
        "hill_exponent_K": hill,
    }
    for column, value in spectral.items():
        if column in plan.columns:
            out[column] = jnp.where(delta_energy > 0, value, jnp.nan)
    return out


def _aggregate(
    leaves: Sequence[_Leaf], columns: Sequence[str]
) -> dict[str, Float[Array, ""]]:
    """Sums over sums for norms and shares, medians over matrices for spectra."""
    out: dict[str, Float[Array, ""]] = {}
    for column in columns:
        if column == "relative_frobenius":
            source, moved = (
                sum(jnp.sum(leaf.values[name]) for leaf in leaves)
                for name in ("source_energy", "delta_energy")
            )
            out[column] = jnp.sqrt(moved / source)
        elif column in SHARES:
            count = sum(leaf.numel * len(leaf.values[column]) for leaf in leaves)
            share = sum(leaf.numel * jnp.sum(leaf.values[column]) for leaf in leaves)
            out[column] = jnp.asarray(share / count)
    spectral = [column for column in columns if column in SPECTRAL]
    matrices = [
        jnp.stack([leaf.values[column] for column in spectral])
        for leaf in leaves
        if spectral and spectral[0] in leaf.values
    ]
    if matrices:
        medians = jnp.nanmedian(jnp.concatenate(matrices, axis=-1), axis=-1)
        out |= {f"{column}_median": medians[i] for i, column in enumerate(spectral)}
    return out
