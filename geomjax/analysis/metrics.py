"""The table of metrics: one row for each, with its kernel and its columns.

A metric of your own is one more row:

    def sign_flips(x: Operands) -> dict[str, Array]:
        flipped = x.flat(x.source) * x.flat(x.tuned) < 0
        return {"sign_flips": jnp.mean(flipped, axis=-1, dtype=x.dtype)}

    rows = measure(a, b, metrics=(*DEFAULT, Metric(
        "sign_flips", sign_flips, (Column("sign_flips", Pool.NUMEL),))))
"""

from functools import lru_cache

import ml_dtypes
import numpy as np
from jaxtyping import Float

from geomjax.analysis.metric import Column as Column
from geomjax.analysis.metric import Metric as Metric
from geomjax.analysis.metric import Pool as Pool
from geomjax.analysis.needs import Needs
from geomjax.analysis.reductions import Reductions
from geomjax.geometry import spectrum, subspace
from geomjax.geometry.masks import SourceMask

Columns = dict[str, Float[np.ndarray, " p"]]

ATOLS = (1e-8, 1e-7, 1e-6, 1e-5, 1e-4)
RMS_TOLERANCES = (1e-4, 1e-3, 1e-2)
COORDINATE_FRACTIONS = (0.001, 0.01, 0.05)
RANK_THRESHOLDS = (1e-6, 1e-5, 1e-4)
TOP_RANKS = (1, 2, 4, 8, 16, 32, 64)
FRACTIONS = (0.01, 0.05, 0.10, 0.20)
SUPPORT_ATOL = 1e-5


def norms() -> Metric:
    """Norms of W, W' and D."""

    def kernel(x: Reductions) -> Columns:
        source, delta = np.sqrt(x.source_energy), np.sqrt(x.delta_energy)
        return {
            "source_frobenius": source,
            "tuned_frobenius": np.sqrt(x.tuned_energy),
            "delta_frobenius": delta,
            "delta_max_abs": x.delta_max_abs,
            "source_rms": source / np.sqrt(x.numel),
            "delta_rms": delta / np.sqrt(x.numel),
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
    columns = tuple(Column(name, Pool.NONE) for name in names)
    return Metric("norms", kernel, columns, needs=lambda r, rounded: Needs())


def unchanged() -> Metric:
    """Shares of coordinates that did not move, by every published threshold.

    P1 compares bfloat16 differences in bfloat16, so that its tolerances, absolute and
    relative, are rounded to bfloat16 as well; here that is done where D is rounded.
    """
    atols = tuple(f"unchanged_atol_{a:.0e}" for a in ATOLS)
    relative = tuple(f"unchanged_rms_{t:.0e}" for t in RMS_TOLERANCES)

    def limits(rounded: bool) -> tuple[float, ...]:
        if not rounded:
            return ATOLS
        return tuple(float(ml_dtypes.bfloat16(a)) for a in ATOLS)

    def needs(r: int, rounded: bool) -> Needs:
        return Needs(
            atols=(0.0, *limits(rounded)),
            rms_tolerances=RMS_TOLERANCES,
            rms_in_bfloat16=rounded,
        )

    def kernel(x: Reductions) -> Columns:
        return {
            "exact_zero_fraction": x.within(0.0),
            **{c: x.within(a) for c, a in zip(atols, limits(x.rounded), strict=True)},
            **{
                c: x.below_rms(t) for c, t in zip(relative, RMS_TOLERANCES, strict=True)
            },
        }

    columns = ("exact_zero_fraction", *atols, *relative)
    pooled = tuple(Column(c, Pool.NUMEL) for c in columns)
    return Metric("unchanged", kernel, pooled, needs=needs)


def bf16_unchanged() -> Metric:
    """P2's share of coordinates whose bfloat16 value did not move."""
    column = Column("bf16_unchanged_fraction", Pool.NUMEL)
    return Metric(
        "bf16_unchanged",
        lambda x: {column.name: x.bf16_unchanged},
        (column,),
        needs=lambda r, rounded: Needs(bf16_unchanged=True),
    )


def coordinate_energy() -> Metric:
    """P1's share of the energy in the largest coordinates."""
    columns = {f"coordinate_energy_{p:g}": p for p in COORDINATE_FRACTIONS}
    return Metric(
        "coordinate_energy",
        lambda x: {c: x.coordinate_energy(p) for c, p in columns.items()},
        tuple(Column(c, Pool.ENERGY, of_update=True) for c in columns),
        needs=lambda r, rounded: Needs(coordinate_fractions=COORDINATE_FRACTIONS),
    )


def delta_spectrum(hill_rank: int | None) -> Metric:
    """Functions of the singular values of D."""
    ranks = tuple(f"rank_fraction_{t:.0e}" for t in RANK_THRESHOLDS)
    tops = tuple(f"top_energy_{k}" for k in TOP_RANKS)
    hills = ("hill_exponent_K", "hill_exponent_K_halved", "hill_exponent_K_doubled")

    def kernel(x: Reductions) -> Columns:
        values = x.delta_values
        k = spectrum.default_hill_rank(x.r) if hill_rank is None else hill_rank
        out = {
            "spectral_norm": values[:, 0],
            "stable_rank": x.delta_energy / values[:, 0] ** 2,
            "entropy_rank": spectrum.entropy_rank(values),
        }
        for name, threshold in zip(ranks, RANK_THRESHOLDS, strict=True):
            out[name] = spectrum.rank_fraction(values, threshold)
        for name, top in zip(tops, TOP_RANKS, strict=True):
            out[name] = spectrum.top_energy(values, top)
        for name, size in zip(hills, (k, max(2, k // 2), 2 * k), strict=True):
            size = min(size, x.r)
            undefined = np.full_like(values[:, 0], np.nan)
            out[name] = spectrum.hill_exponent(values, size) if size > 1 else undefined
        return out

    shapes = ("spectral_norm", "stable_rank", "entropy_rank", *ranks)
    columns = (
        *(Column(c, Pool.MATRIX, of_update=True) for c in shapes),
        *(Column(c, Pool.ENERGY, of_update=True) for c in tops),
        *(Column(c, Pool.MATRIX, of_update=True) for c in hills),
    )
    return Metric(
        "delta_spectrum",
        kernel,
        columns,
        "matrix",
        needs=lambda r, rounded: Needs(delta_values=True),
        settings=(hill_rank,),
    )


def projection() -> Metric:
    """Energy of D in the leading subspaces of W, with its chance level."""
    sides = ("principal", "left", "right")
    names = [f"{s}_energy_{p:.2f}" for s in sides for p in FRACTIONS]

    def kernel(x: Reductions) -> Columns:
        out = {}
        for p, rank in zip(FRACTIONS, _ranks(x.r), strict=True):
            defined = x.source_defined(rank)
            chances = (rank**2 / x.numel, rank / x.m, rank / x.n)
            parts = zip(sides, x.projected(rank), chances, strict=True)
            for side, part, chance in parts:
                share = np.where(defined, part / x.delta_energy, np.nan)
                out[f"{side}_energy_{p:.2f}"] = share
                out[f"{side}_energy_{p:.2f}_chance"] = chance
        return out

    def needs(r: int, rounded: bool) -> Needs:
        ranks = _ranks(r)
        return Needs(source_directions=max(ranks), energy_ranks=ranks)

    columns = [Column(c, Pool.ENERGY, of_update=True) for c in names]
    columns += [Column(f"{c}_chance", Pool.ENERGY, of_update=True) for c in names]
    return Metric("projection", kernel, tuple(columns), "matrix", needs=needs)


def rotation() -> Metric:
    """P1's mean sine between the leading left subspaces of W and of W'."""
    names = tuple(f"subspace_rotation_{p:.2f}" for p in FRACTIONS)

    def kernel(x: Reductions) -> Columns:
        return {
            name: np.where(x.both_defined(k), x.sines("left", k).mean(axis=-1), np.nan)
            for name, k in zip(names, _ranks(x.r), strict=True)
        }

    columns = tuple(Column(c, Pool.MATRIX, of_update=True) for c in names)
    return Metric(
        "rotation",
        kernel,
        columns,
        "matrix",
        needs=lambda r, rounded: _angles_of(_ranks(r)),
    )


def principal_angles(angle_rank: int | None) -> Metric:
    """P2's principal angles between leading subspaces, in degrees."""
    names = tuple(
        f"principal_angle_{what}_{side}_deg"
        for what in ("max", "mean")
        for side in ("left", "right")
    )

    def kernel(x: Reductions) -> Columns:
        k = rank_of_angles(x.r, angle_rank)
        if k == 0:
            return {name: np.full_like(x.numel, np.nan) for name in names}
        defined = x.both_defined(k)
        out = {}
        for side in ("left", "right"):
            angles = subspace.angles(x.sines(side, k))
            degrees = np.where(defined[:, None], np.rad2deg(angles), np.nan)
            out[f"principal_angle_max_{side}_deg"] = degrees[:, 0]
            out[f"principal_angle_mean_{side}_deg"] = degrees.mean(axis=-1)
        return out

    def needs(r: int, rounded: bool) -> Needs:
        k = rank_of_angles(r, angle_rank)
        return _angles_of((k,)) if k else Needs()

    columns = tuple(Column(c, Pool.MATRIX, of_update=True) for c in names)
    return Metric(
        "principal_angles",
        kernel,
        columns,
        "matrix",
        needs=needs,
        settings=(angle_rank,),
    )


def rank_of_angles(r: int, wanted: int | None) -> int:
    """Dimensions of the subspaces whose principal angles are tabulated."""
    k = spectrum.default_angle_rank(r) if wanted is None else wanted
    return k if k < r else r // 2


def spectral_shift() -> Metric:
    """How far the singular values of W moved."""

    def kernel(x: Reductions) -> Columns:
        moved = spectrum.shift(x.source_values, x.tuned_values)
        return {
            "normalized_spectral_shift": moved / np.sqrt(x.source_energy),
            "spectral_shift_to_delta": moved / np.sqrt(x.delta_energy),
        }

    columns = ("normalized_spectral_shift", "spectral_shift_to_delta")
    return Metric(
        "spectral_shift",
        kernel,
        tuple(Column(c, Pool.MATRIX, of_update=True) for c in columns),
        "matrix",
        needs=lambda r, rounded: Needs(source_directions=0, tuned_directions=0),
    )


def update_density() -> Metric:
    """Size of the update's two supports."""

    def kernel(x: Reductions) -> Columns:
        return {
            "update_density": x.beyond(0.0),
            "update_density_atol_1e-05": x.beyond(SUPPORT_ATOL),
        }

    names = ("update_density", "update_density_atol_1e-05")
    columns = tuple(Column(name, Pool.NUMEL) for name in names)
    return Metric(
        "update_density",
        kernel,
        columns,
        needs=lambda r, rounded: Needs(atols=(0.0, SUPPORT_ATOL)),
    )


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

    def kernel(x: Reductions) -> Columns:
        out = {}
        for label, mask in zip(labels, chosen(x.r), strict=True):
            result, defined = x.coverage(mask), x.source_defined(mask.rank)
            for support, part in (
                ("", result.changed),
                ("_atol_1e-05", result.changed_beyond),
            ):
                for name, attribute, is_chance in _coverage_columns(label, support):
                    value = getattr(result.chance if is_chance else part, attribute)
                    known = True if attribute.startswith("low") else defined
                    out[name] = np.where(known, value, np.nan)
        return out

    def needs(r: int, rounded: bool) -> Needs:
        pairs = tuple(chosen(r))
        directions = max(pair.rank for pair in pairs)
        return Needs(
            source_directions=directions, masks=pairs, support_atol=SUPPORT_ATOL
        )

    columns = [
        Column(name, pool, of_update=True)
        for label in labels
        for support, pool in (
            ("", Pool.SUPPORT),
            ("_atol_1e-05", Pool.SUPPORT_ATOL),
        )
        for name, _, _ in _coverage_columns(label, support)
    ]
    return Metric("mask_coverage", kernel, tuple(columns), "matrix", needs=needs)


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


def _ranks(r: int) -> tuple[int, ...]:
    return tuple(spectrum.leading_rank(p, r) for p in FRACTIONS)


def _angles_of(ranks: tuple[int, ...]) -> Needs:
    largest = max(ranks)
    return Needs(source_directions=largest, tuned_directions=largest, sine_ranks=ranks)


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


def with_norms(metrics: tuple[Metric, ...]) -> tuple[Metric, ...]:
    """The table, led by the norms if it lacks them: every aggregate is made of them."""
    if any(metric.name == "norms" for metric in metrics):
        return metrics
    return (norms(), *metrics)
