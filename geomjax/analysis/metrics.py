"""The table of metrics: one row for each, with its kernel and its columns.

A metric of your own is one more row:

    def sign_flips(x: Operands) -> dict[str, Array]:
        flipped = x.flat(x.source) * x.flat(x.tuned) < 0
        return {"sign_flips": jnp.mean(flipped, axis=-1, dtype=x.dtype)}

    rows = measure(a, b, metrics=(*DEFAULT, Metric(
        "sign_flips", sign_flips, (Column("sign_flips", Pool.NUMEL),))))
"""

from collections.abc import Callable, Mapping
from enum import Enum
from functools import lru_cache
from typing import Literal, NamedTuple

import jax.numpy as jnp
import ml_dtypes
from jaxtyping import Array

from geomjax.analysis.operands import Operands
from geomjax.geometry import masks, sparsity, spectrum, subspace
from geomjax.geometry.factor import is_defined
from geomjax.geometry.masks import SourceMask
from geomjax.update import to_bfloat16

ATOLS = (1e-8, 1e-7, 1e-6, 1e-5, 1e-4)
RMS_TOLERANCES = (1e-4, 1e-3, 1e-2)
COORDINATE_FRACTIONS = (0.001, 0.01, 0.05)
RANK_THRESHOLDS = (1e-6, 1e-5, 1e-4)
TOP_RANKS = (1, 2, 4, 8, 16, 32, 64)
FRACTIONS = (0.01, 0.05, 0.10, 0.20)
SUPPORT_ATOL = 1e-5


class Pool(Enum):
    """How a column of many tensors becomes one number.

    NUMEL, ENERGY and the two supports give `sum(numerator) / sum(denominator)` with the
    denominator named; MATRIX gives the median and the mean over matrices; NONE nothing.
    """

    NUMEL = "numel"
    ENERGY = "delta_energy"
    SUPPORT = "support"
    SUPPORT_ATOL = "support_atol"
    MATRIX = "matrix"
    NONE = "none"


class Column(NamedTuple):
    """One column of tensors.csv.

    Attributes:
        name: its name.
        pool: how it is aggregated; `ENERGY` spectral columns also get median and mean.
        of_update: whether it divides by the update, and so is null where D is zero.
    """

    name: str
    pool: Pool
    of_update: bool = False


class Metric(NamedTuple):
    """One row of the table.

    Attributes:
        name: for messages.
        kernel: from a stack of p tensors to one array `[p]` for each column; traced.
        columns: what the kernel returns, in the order of the table.
        applies_to: every tensor, or those with two axes alone.
        directions: leading singular vectors of W and W' it uses, from r = min(m, n).
    """

    name: str
    kernel: Callable[[Operands], Mapping[str, Array]]
    columns: tuple[Column, ...]
    applies_to: Literal["tensor", "matrix"] = "tensor"
    directions: Callable[[int], int] = lambda r: 0


def norms() -> Metric:
    """Norms of W, W' and D."""

    def kernel(x: Operands) -> dict[str, Array]:
        source, tuned = jnp.sqrt(x.source_energy), jnp.sqrt(x.tuned_energy)
        delta = jnp.sqrt(x.delta_energy)
        numel = x.flat(x.delta).shape[-1]
        return {
            "source_frobenius": source,
            "tuned_frobenius": tuned,
            "delta_frobenius": delta,
            "delta_max_abs": jnp.max(jnp.abs(x.flat(x.delta)), axis=-1).astype(x.dtype),
            "source_rms": source / numel**0.5,
            "delta_rms": delta / numel**0.5,
            "relative_frobenius": delta / (source + 1e-12),
        }

    names = (
        "source_frobenius",
        "tuned_frobenius",
        "delta_frobenius",
        "delta_max_abs",
        "source_rms",
        "delta_rms",
        "relative_frobenius",
    )
    return Metric("norms", kernel, tuple(Column(name, Pool.NONE) for name in names))


def unchanged() -> Metric:
    """Shares of coordinates that did not move, by every published threshold.

    P1 compares bfloat16 differences in bfloat16, so that its tolerances, absolute and
    relative, are rounded to bfloat16 as well; here that is done where D is rounded.
    """
    atols = tuple(f"unchanged_atol_{a:.0e}" for a in ATOLS)
    relative = tuple(f"unchanged_rms_{t:.0e}" for t in RMS_TOLERANCES)

    def kernel(x: Operands) -> dict[str, Array]:
        delta = x.flat(x.delta)
        rounded = (
            [float(ml_dtypes.bfloat16(a)) for a in ATOLS] if x.delta_is_bf16 else ATOLS
        )
        absolute = jnp.asarray([0.0, *rounded], x.dtype)
        absolute = jnp.broadcast_to(absolute, (delta.shape[0], len(absolute)))
        within = sparsity.fraction_within(delta, absolute)
        rms = jnp.sqrt(x.source_energy / delta.shape[-1])
        relative_to = rms[:, None] * jnp.asarray(RMS_TOLERANCES, x.dtype)[None]
        if x.delta_is_bf16:
            relative_to = to_bfloat16(relative_to).astype(x.dtype)
        below = sparsity.fraction_below(delta, relative_to)
        below = jnp.where(rms[:, None] > 0, below, 0)
        shares = [*jnp.moveaxis(within, -1, 0), *jnp.moveaxis(below, -1, 0)]
        return dict(
            zip(("exact_zero_fraction", *atols, *relative), shares, strict=True)
        )

    columns = ("exact_zero_fraction", *atols, *relative)
    return Metric("unchanged", kernel, tuple(Column(c, Pool.NUMEL) for c in columns))


def bf16_unchanged() -> Metric:
    """P2's share of coordinates whose bfloat16 value did not move."""

    def kernel(x: Operands) -> dict[str, Array]:
        source, tuned = to_bfloat16(x.stored_source), to_bfloat16(x.stored_tuned)
        share = sparsity.bf16_unchanged(x.flat(source), x.flat(tuned))
        return {"bf16_unchanged_fraction": share}

    column = Column("bf16_unchanged_fraction", Pool.NUMEL)
    return Metric("bf16_unchanged", kernel, (column,))


def coordinate_energy() -> Metric:
    """P1's share of the energy in the largest coordinates."""
    columns = tuple(f"coordinate_energy_{p:g}" for p in COORDINATE_FRACTIONS)

    def kernel(x: Operands) -> dict[str, Array]:
        shares = sparsity.coordinate_energy(
            x.as_matrices(x.stored_delta),
            COORDINATE_FRACTIONS,
            low_bits=not x.delta_is_bf16,
        )
        return dict(zip(columns, jnp.moveaxis(shares, -1, 0), strict=True))

    return Metric(
        "coordinate_energy",
        kernel,
        tuple(Column(c, Pool.ENERGY, of_update=True) for c in columns),
    )


def delta_spectrum(hill_rank: int | None) -> Metric:
    """Functions of the singular values of D."""
    ranks = tuple(f"rank_fraction_{t:.0e}" for t in RANK_THRESHOLDS)
    tops = tuple(f"top_energy_{k}" for k in TOP_RANKS)
    hills = ("hill_exponent_K", "hill_exponent_K_halved", "hill_exponent_K_doubled")

    def kernel(x: Operands) -> dict[str, Array]:
        values = x.delta_values
        k = spectrum.default_hill_rank(x.r) if hill_rank is None else hill_rank
        out = {
            "spectral_norm": values[:, 0],
            "stable_rank": x.delta_energy / jnp.square(values[:, 0]),
            "entropy_rank": spectrum.entropy_rank(values),
        }
        for name, threshold in zip(ranks, RANK_THRESHOLDS, strict=True):
            out[name] = spectrum.rank_fraction(values, threshold)
        for name, top in zip(tops, TOP_RANKS, strict=True):
            out[name] = spectrum.top_energy(values, top)
        for name, size in zip(hills, (k, max(2, k // 2), 2 * k), strict=True):
            size = min(size, x.r)
            undefined = jnp.full_like(values[:, 0], jnp.nan)
            out[name] = spectrum.hill_exponent(values, size) if size > 1 else undefined
        return out

    shapes = ("spectral_norm", "stable_rank", "entropy_rank", *ranks)
    columns = (
        *(Column(c, Pool.MATRIX, of_update=True) for c in shapes),
        *(Column(c, Pool.ENERGY, of_update=True) for c in tops),
        *(Column(c, Pool.MATRIX, of_update=True) for c in hills),
    )
    return Metric("delta_spectrum", kernel, columns, "matrix")


def projection() -> Metric:
    """Energy of D in the leading subspaces of W, with its chance level."""
    sides = ("principal", "left", "right")
    names = [f"{s}_energy_{p:.2f}" for s in sides for p in FRACTIONS]

    def kernel(x: Operands) -> dict[str, Array]:
        ranks = [spectrum.leading_rank(p, x.r) for p in FRACTIONS]
        m, n = x.shape
        energies = subspace.projected_energies(
            x.stored_source, x.stored_delta, x.source_factors, ranks
        )
        out = {}
        for i, (p, rank) in enumerate(zip(FRACTIONS, ranks, strict=True)):
            defined = x.source_defined(rank)
            chances = (rank**2 / (m * n), rank / m, rank / n)
            for side, part, chance in zip(sides, energies, chances, strict=True):
                share = jnp.where(defined, part[:, i] / x.delta_energy, jnp.nan)
                out[f"{side}_energy_{p:.2f}"] = share
                out[f"{side}_energy_{p:.2f}_chance"] = jnp.full_like(share, chance)
        return out

    columns = [Column(c, Pool.ENERGY, of_update=True) for c in names]
    columns += [Column(f"{c}_chance", Pool.ENERGY, of_update=True) for c in names]
    return Metric("projection", kernel, tuple(columns), "matrix", _fifth)


def rotation() -> Metric:
    """P1's mean sine between the leading left subspaces of W and of W'."""
    names = tuple(f"subspace_rotation_{p:.2f}" for p in FRACTIONS)

    def kernel(x: Operands) -> dict[str, Array]:
        ranks = [spectrum.leading_rank(p, x.r) for p in FRACTIONS]
        return {
            name: jnp.where(x.both_defined(k), jnp.mean(sines, axis=-1), jnp.nan)
            for name, k, sines in zip(names, ranks, x.sines("left", ranks), strict=True)
        }

    columns = tuple(Column(c, Pool.MATRIX, of_update=True) for c in names)
    return Metric("rotation", kernel, columns, "matrix", _fifth)


def principal_angles(angle_rank: int | None) -> Metric:
    """P2's principal angles between leading subspaces, in degrees."""
    names = tuple(
        f"principal_angle_{what}_{side}_deg"
        for what in ("max", "mean")
        for side in ("left", "right")
    )

    def rank(r: int) -> int:
        wanted = spectrum.default_angle_rank(r) if angle_rank is None else angle_rank
        return wanted if wanted < r else r // 2

    def kernel(x: Operands) -> dict[str, Array]:
        k = rank(x.r)
        if k == 0:
            return {name: jnp.full(len(x.source), jnp.nan, x.dtype) for name in names}
        defined = x.both_defined(k)
        out = {}
        for side in ("left", "right"):
            angles = subspace.angles(x.sines(side, [k])[0])
            degrees = jnp.where(defined[:, None], jnp.rad2deg(angles), jnp.nan)
            out[f"principal_angle_max_{side}_deg"] = degrees[:, 0]
            out[f"principal_angle_mean_{side}_deg"] = jnp.mean(degrees, axis=-1)
        return out

    columns = tuple(Column(c, Pool.MATRIX, of_update=True) for c in names)
    return Metric("principal_angles", kernel, columns, "matrix", rank)


def spectral_shift() -> Metric:
    """How far the singular values of W moved."""

    def kernel(x: Operands) -> dict[str, Array]:
        source = x.source_factors.values
        moved = spectrum.shift(source, x.tuned_factors.values)
        return {
            "normalized_spectral_shift": moved / jnp.sqrt(x.source_energy),
            "spectral_shift_to_delta": moved / jnp.sqrt(x.delta_energy),
        }

    columns = ("normalized_spectral_shift", "spectral_shift_to_delta")
    return Metric(
        "spectral_shift",
        kernel,
        tuple(Column(c, Pool.MATRIX, of_update=True) for c in columns),
        "matrix",
    )


def update_density() -> Metric:
    """Size of the update's two supports."""

    def kernel(x: Operands) -> dict[str, Array]:
        delta = x.flat(x.delta)
        # float32(1e-5) is just below 1e-5: the comparisons agree on float32 values.
        beyond = jnp.abs(delta) > jnp.float32(SUPPORT_ATOL)
        return {
            "update_density": sparsity.fraction(delta != 0),
            "update_density_atol_1e-05": sparsity.fraction(beyond),
        }

    names = ("update_density", "update_density_atol_1e-05")
    columns = tuple(Column(name, Pool.NUMEL) for name in names)
    return Metric("update_density", kernel, columns)


def mask_coverage(mask_rank: int | None, mask_density: float | None) -> Metric:
    """How much of the update's support lies in masks that W alone defines."""
    labels = [f"{p:.2f}" for p in FRACTIONS]
    extra = (mask_rank, mask_density) if mask_rank and mask_density else None
    if extra is not None:
        labels.append(f"r{mask_rank}_{mask_density:.2f}")

    def chosen(r: int) -> list[SourceMask]:
        pairs = [SourceMask(spectrum.leading_rank(p, r), p) for p in FRACTIONS]
        if extra is not None:
            pairs.append(SourceMask(min(extra[0], r), extra[1]))
        return pairs

    def kernel(x: Operands) -> dict[str, Array]:
        pairs = chosen(x.r)
        factors = x.source_factors
        k = max(pair.rank for pair in pairs)
        result = masks.coverage(
            x.stored_source,
            x.stored_delta,
            factors._replace(short=factors.short[:, :k], scale=factors.scale[:, :k]),
            pairs,
            atol=SUPPORT_ATOL,
            low_bits=not x.source_is_bf16,
        )
        out = {}
        for i, (label, pair) in enumerate(zip(labels, pairs, strict=True)):
            defined = is_defined(factors.values, pair.rank)
            for support, part in (
                ("", result.changed),
                ("_atol_1e-05", result.changed_beyond),
            ):
                for name, attribute, is_chance in _coverage_columns(label, support):
                    value = getattr(result.chance if is_chance else part, attribute)
                    by_rank = not attribute.startswith("low")
                    known = defined if by_rank else True
                    out[name] = jnp.where(known, value[:, i], jnp.nan)
        return out

    columns = [
        Column(name, pool, of_update=True)
        for label in labels
        for support, pool in (
            ("", Pool.SUPPORT),
            ("_atol_1e-05", Pool.SUPPORT_ATOL),
        )
        for name, _, _ in _coverage_columns(label, support)
    ]
    return Metric(
        "mask_coverage",
        kernel,
        tuple(columns),
        "matrix",
        lambda r: max(pair.rank for pair in chosen(r)),
    )


def _coverage_columns(label: str, support: str) -> list[tuple[str, str, bool]]:
    """Column, attribute of `Coverage`, and whether it is the chance level."""
    columns = []
    for stem, attribute in (
        ("principal_coverage", "principal"),
        ("low_magnitude_coverage", "low"),
        ("nonprincipal_or_low_coverage", "nonprincipal_or_low"),
    ):
        name = f"{stem}_{label}{support}"
        columns += [(name, attribute, False), (f"{name}_chance", attribute, True)]
        if attribute != "principal":
            columns.append((f"{name}_min", f"{attribute}_min", False))
            columns.append((f"{name}_max", f"{attribute}_max", False))
    return columns


def _fifth(r: int) -> int:
    return spectrum.leading_rank(max(FRACTIONS), r)


@lru_cache
def default_metrics(
    *,
    hill_rank: int | None = None,
    angle_rank: int | None = None,
    mask_rank: int | None = None,
    mask_density: float | None = None,
) -> tuple[Metric, ...]:
    """Every metric of both papers.

    Equal arguments give the same table, so that compiled programs are found again.

    Args:
        hill_rank: K of the Hill exponent, max(2, r // 10) by default.
        angle_rank: k of the principal angles, 512 where r >= 1024, else r // 2.
        mask_rank: rank of P2's additional pair of masks (64 in its appendix).
        mask_density: density of them (0.5 in its appendix, 0.3 in its figure).

    Returns:
        The table.

    Raises:
        ValueError: one of mask_rank and mask_density is given without the other.
    """
    if (mask_rank is None) != (mask_density is None):
        raise ValueError(
            f"mask_rank={mask_rank}, mask_density={mask_density}: give both or neither"
        )
    return (
        norms(),
        unchanged(),
        bf16_unchanged(),
        coordinate_energy(),
        update_density(),
        delta_spectrum(hill_rank),
        projection(),
        rotation(),
        principal_angles(angle_rank),
        spectral_shift(),
        mask_coverage(mask_rank, mask_density),
    )


DEFAULT = default_metrics()
"""The metrics of both papers at their default parameters."""
