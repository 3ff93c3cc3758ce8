"""Figures of the report."""

from collections.abc import Iterator, Mapping

import numpy as np

from experiments.geometry_report import tables
from experiments.geometry_report.columns import DENSITIES, MASKS, NULLS
from experiments.geometry_report.read import Results
from geomjax.analysis import plots
from geomjax.analysis.report import Plot

Runs = Mapping[str, Results]
Styles = Mapping[str, plots.SeriesStyle]


def overview(runs: Runs, styles: Styles) -> Plot:
    """Bar panels of the whole-model figures."""
    known = {null for results in runs.values() for null in results.nulls()}
    kinds = [None, *(null for null in NULLS if null in known)]
    panels = []
    for quantity in tables.measured(runs):
        if not quantity.panel:
            continue
        values = {
            "update" if null is None else NULLS[null]: {
                label: tables.value(results, quantity, null)
                for label, results in runs.items()
            }
            for null in kinds
            if null is None or null in quantity.nulls
        }
        levels = {
            label: level
            for label, results in runs.items()
            if (level := tables.chance(results, quantity)) is not None
        }
        # A level for each variant: a null of the same update has the same chance.
        chance = dict.fromkeys(values, levels) if levels else None
        panels.append(
            plots.BarPanel(
                quantity.title, values, chance=chance, percent=quantity.percent
            )
        )
    return Plot(
        "overview",
        plots.bar_panels(panels, columns=3, styles=styles),
        "Whole-model figures, in the manner of P1's Figure 1: pooled, or the median "
        "over matrices for spectral ones. Light bars: nulls, which have the norm of "
        "the update and nothing else of it. Dashed: chance level.",
    )


def maps(runs: Runs) -> Iterator[Plot]:
    """Layer-by-module maps of sparsity and relative norm, a figure a run."""
    for index, (label, results) in enumerate(runs.items()):
        for column, name, what, percent, log in (
            ("unchanged_atol_1e-05", "sparsity", "unchanged to 1e-5", True, False),
            ("relative_frobenius", "relative_norm", "‖D‖/‖W‖", False, True),
        ):
            cells = _cells(results, column)
            known = [v for v in cells.values() if v is not None]
            if not known or (log and max(known) <= 0.0):
                continue
            suffix = f"_{index + 1}" if len(runs) > 1 else ""
            yield Plot(
                f"{name}_map{suffix}",
                plots.layer_module_map(
                    cells,
                    label=what,
                    percent=percent,
                    log=log,
                    title=label if len(runs) > 1 else None,
                ),
                f"{what}, by layer and module of the matrices"
                + (f" of {label}" if len(runs) > 1 else "")
                + (", colours on a logarithmic scale." if log else "."),
            )


def _cells(results: Results, column: str) -> dict[tuple[int | None, str], float | None]:
    """A column of the matrices by place; experts of one place are averaged by size."""
    sums: dict[tuple[int | None, str], list[tuple[float, int]]] = {}
    for row in results.rows:
        # Blocks of a vision tower are numbered on their own.
        if len(row["shape"]) != 2 or row["group"] == "vision" or column not in row:
            continue
        cell = sums.setdefault((row["layer"], row["module"]), [])
        if row[column] is not None:
            cell.append((row[column], row["numel"]))
    return {key: _average(cell) if cell else None for key, cell in sums.items()}


def _average(cell: list[tuple[float, int]]) -> float:
    if len(cell) == 1:
        return cell[0][0]
    return sum(value * size for value, size in cell) / sum(size for _, size in cell)


def coverage(runs: Runs, styles: Styles) -> Plot | None:
    """Coverage of the update's support by masks of W; None if it was not measured."""
    families: dict[str, dict[str, plots.Curve]] = {}
    chances: dict[str, plots.Curve] = {}
    for family, stem in MASKS.items():
        columns = [f"{stem}_{density:.2f}" for density in DENSITIES]
        for label, results in runs.items():
            values = [results.total(column) for column in columns]
            levels = [results.total(f"{column}_chance") for column in columns]
            if None in values or None in levels:
                continue
            density = np.array(DENSITIES)
            curve = plots.Curve(density, np.array([values], np.float64))
            families.setdefault(family, {})[label] = curve
            level = plots.Curve(density, np.array([levels], np.float64))
            chances.setdefault(family, level)
    if not families:
        return None
    return Plot(
        "coverage",
        plots.coverage_against_density(families, chance=chances, styles=styles),
        "Share of the coordinates that moved which lie in a mask that W alone defines: "
        "the largest entries of W's leading singular directions, or the smallest "
        "weights. Dashed: chance, the density that the masks have in fact. Below it "
        "the update avoids the mask, above it the update prefers it.",
    )


def shares(runs: Runs) -> Plot | None:
    """Division of the energy between the groups; None if nothing moved."""
    found = {
        label: {
            g: part["energy_share"] for g, part in results.summary["groups"].items()
        }
        for label, results in runs.items()
        if results.summary["global"]["delta_frobenius"] > 0
    }
    if not found:
        return None
    return Plot(
        "energy_shares",
        plots.group_energy_shares(found),
        "How the energy of the update, the sum of ‖D‖² over tensors, is divided "
        "between the parts of the model.",
    )


def curves(runs: Runs, styles: Styles) -> Iterator[Plot]:
    """Near-zero bias, then spectra and principal angles of each matrix."""
    bias = _near_zero(runs, styles)
    if bias is not None:
        yield bias
    names = dict.fromkeys(c["name"] for r in runs.values() for c in r.curves)
    for index, name in enumerate(names, start=1):
        found = {
            label: curve
            for label, results in runs.items()
            for curve in results.curves
            if curve["name"] == name
        }
        for plot in (_spectra(index, name, found), _angles(index, name, found)):
            if plot is not None:
                yield plot(styles)


def _near_zero(runs: Runs, styles: Styles) -> Plot | None:
    size, changed = {}, {}
    null_size: list[plots.Curve] = []
    null_changed: list[plots.Curve] = []
    for label, results in runs.items():
        moved = [c for c in results.curves if c["update"]["size"] is not None]
        bins = [len(c["update"]["size"]) for c in moved]
        moved = [c for c in moved if len(c["update"]["size"]) == max(bins)]
        if not moved:
            continue
        centres = (np.arange(max(bins)) + 0.5) / max(bins)
        size[label] = plots.Curve(centres, _stack(moved, "update", "size"))
        changed[label] = plots.Curve(centres, _stack(moved, "update", "changed"))
        with_null = [c for c in moved if c["null"] is not None and c["null"]["size"]]
        if with_null and not null_size:
            null_size.append(plots.Curve(centres, _stack(with_null, "null", "size")))
            null_changed.append(
                plots.Curve(centres, _stack(with_null, "null", "changed"))
            )
    if not size:
        return None
    count = max(curve.values.shape[0] for curve in size.values())
    return Plot(
        "near_zero_bias",
        plots.update_against_magnitude(
            size,
            changed,
            size_null=null_size[0] if null_size else None,
            changed_null=null_changed[0] if null_changed else None,
            styles=styles,
        ),
        "Size of the update, and how often it moves an entry at all, against the "
        f"quantile of |W|. {plots.describe_band('range', count, 'matrices')} What the "
        f"rounding null of {next(iter(size))} shows too is the number format's doing.",
    )


def _stack(records: list[dict], side: str, key: str) -> np.ndarray:
    return np.array([record[side][key] for record in records], np.float64)


def _spectra(index: int, name: str, found: Mapping[str, dict]):
    """A function from styles to the plot of one matrix's spectra, None if all zero."""
    moved = {
        label: np.array(curve["update"]["delta"])
        for label, curve in found.items()
        if any(curve["update"]["delta"])
    }
    if not moved:
        return None
    first = found[next(iter(moved))]
    null = None if first["null"] is None else np.array([first["null"]["delta"]])

    def draw(styles: Styles) -> Plot:
        return Plot(
            f"spectra_{index}",
            plots.singular_value_spectra(
                moved,
                source=np.array(first["update"]["source"]),
                null=null,
                title=name,
                styles=styles,
            ),
            f"Singular values of the update and of W in {name}, {_shape(first)}, each "
            "over its Frobenius norm"
            + (", beside a Gaussian null." if null is not None else "."),
        )

    return draw


def _angles(index: int, name: str, found: Mapping[str, dict]):
    """As `_spectra`, for the principal angles; None where they are undefined."""
    sides: dict[str, dict[str, np.ndarray]] = {}
    nulls: dict[str, np.ndarray] = {}
    for side in ("left", "right"):
        for label, curve in found.items():
            if not curve["update"][side] or not any(curve["update"][side]):
                continue
            sides.setdefault(side, {})[label] = np.array([curve["update"][side]])
            if curve["null"] is not None and curve["null"][side]:
                nulls.setdefault(side, np.array([curve["null"][side]]))
    if not sides:
        return None
    k = max(v.shape[1] for runs in sides.values() for v in runs.values())

    def draw(styles: Styles) -> Plot:
        return Plot(
            f"angles_{index}",
            plots.principal_angle_curves(
                sides, null=nulls if nulls else None, title=name, styles=styles
            ),
            f"Principal angles between the leading {k} singular directions of W and W' "
            f"in {name}"
            + (", and those that a Gaussian null causes." if nulls else "."),
        )

    return draw


def _shape(curve: Mapping) -> str:
    return " × ".join(map(str, curve["shape"]))
