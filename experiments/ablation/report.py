"""Results of the ablation as a record, a table on screen, and a report with figures."""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments.ablation import rates as rates_module
from experiments.common.arm_geometry import ArmGeometry
from experiments.common.outcome import INTERVALS, LATE, Outcome, late
from geomjax.analysis import plots
from geomjax.analysis import report as reports
from geomjax.analysis.report import Cell, Claim, Column, Estimate, Table
from geomjax.update import Delta

Curves = dict[str, plots.Curve]


class ArmResult(NamedTuple):
    """One arm with its reported runs.

    Attributes:
      runs: One a seed.
      geometry: Of its updates.
    """

    runs: list[Outcome]
    geometry: ArmGeometry

    @property
    def mask_density(self) -> float:
        """Share of the model's coordinates that the first seed trained."""
        return self.runs[0].trained

    def curves(self, name: str, kind: str = "eval") -> np.ndarray:
        """A metric along training, `[S, T]`."""
        return np.stack([run.curve(name, kind) for run in self.runs])

    def has(self, name: str, kind: str = "eval") -> bool:
        """Whether the runs logged a metric."""
        return any(name in row for row in self.runs[0].rows if row["kind"] == kind)

    def accuracy_start_and_late(self) -> tuple[float, np.ndarray]:
        """Test accuracy at the start, and late `[S]`."""
        accuracy = self.curves("test_accuracy")
        return float(accuracy[:, 0].mean()), late(accuracy)

    def record(self) -> dict[str, Any]:
        """The arm's entry in results.json, means over seeds."""
        loss = self.curves("validation_reverse_kl")
        record: dict[str, Any] = dict.fromkeys(
            ("accuracy_start", "accuracy_peak", "accuracy_final", "accuracy_late")
        )
        seeds: list[dict[str, Any]] = [{"seed": run.seed} for run in self.runs]
        if self.has("test_accuracy"):
            accuracy = self.curves("test_accuracy")
            values = {
                "accuracy_start": accuracy[:, 0],
                "accuracy_peak": accuracy.max(axis=1),
                "accuracy_final": accuracy[:, -1],
                "accuracy_late": late(accuracy),
            }
            record |= {name: float(value.mean()) for name, value in values.items()}
            for i, seed in enumerate(seeds):
                seed |= {name: float(value[i]) for name, value in values.items()}
        for i, seed in enumerate(seeds):
            seed |= {"loss_first": float(loss[i, 0]), "loss_final": float(loss[i, -1])}
        return record | {
            "loss_first": float(loss[:, 0].mean()),
            "loss_final": float(loss[:, -1].mean()),
            "learning_rate": self.runs[0].learning_rate,
            "mask_density": self.mask_density,
            "mask_threshold": self.runs[0].mask_threshold,
            "seeds": seeds,
            "geometry": {
                kind: {part: summary[part] for part in ("global", "groups")}
                for kind, summary in self.geometry.summaries.items()
            },
        }

    def estimates(self) -> dict[str, Estimate | None]:
        """Means over seeds with 95 % intervals, for tables."""
        loss = self.curves("validation_reverse_kl")
        out: dict[str, Estimate | None] = {
            "loss": Estimate.from_samples(loss[:, -1].tolist())
        }
        if self.has("test_accuracy"):
            accuracy = self.curves("test_accuracy")
            out |= {
                "start": Estimate(float(accuracy[:, 0].mean()), None),
                "peak": Estimate.from_samples(accuracy.max(axis=1).tolist()),
                "final": Estimate.from_samples(accuracy[:, -1].tolist()),
                "late": Estimate.from_samples(late(accuracy).tolist()),
            }
        return out


def _arms_table(results: Mapping[str, ArmResult]) -> Table:
    columns = [
        Column("arm"),
        Column("learning rate", align="right", spec="g"),
        Column("trained", align="right", spec=".1%"),
        Column("accuracy at start", align="right", spec=".1%"),
        Column("peak", align="right", spec=".1%", best="max"),
        Column("final", align="right", spec=".1%", best="max"),
        Column("late", align="right", spec=".1%", best="max"),
        Column("reverse KL at end (nats)", align="right", spec=".3f", best="min"),
    ]
    rows = []
    for name, result in results.items():
        estimates = result.estimates()
        rows.append(
            [
                name,
                result.runs[0].learning_rate,
                result.mask_density,
                *(estimates.get(k) for k in ("start", "peak", "final", "late", "loss")),
            ]
        )
    seeds = len(next(iter(results.values())).runs)
    caption = (
        f"Mean over {seeds} seeds ± half width of the 95 % Student interval. "
        "Accuracy: exact match of greedy completions on the test split; late: mean of "
        f"the last {LATE} evaluations. Reverse KL: whole vocabulary, completions of "
        "validation prompts sampled anew. Bold: the best mean, and every arm whose "
        "interval overlaps the best one's. The claims compare arms seed by seed, which "
        "tells them apart better than these intervals do."
    )
    return Table(columns, rows, caption)


GEOMETRY = {
    "relative norm": ("relative_frobenius", False, True),
    "exact zero": ("exact_zero_fraction", False, True),
    "unchanged at 1e-5": ("unchanged_atol_1e-05", False, True),
    "top-1 energy": ("top_energy_1", True, True),
    "top-8 energy": ("top_energy_8", True, True),
    "top-16 energy": ("top_energy_16", True, True),
    "stable rank": ("stable_rank", True, False),
    "principal 10 % coverage": ("principal_coverage_0.10", False, True),
    "low-magnitude 10 % coverage": ("low_magnitude_coverage_0.10", False, True),
}
"""Title -> (column, whether it is the median over matrices, whether a percentage)."""


def _value(summary: Mapping[str, Any], title: str) -> float | None:
    column, median, _ = GEOMETRY[title]
    part = summary["median"] if median else summary
    return part.get(column)


def _geometry_table(results: Mapping[str, ArmResult], kind: Delta) -> Table:
    columns = [Column("arm")] + [
        Column(title, align="right", spec=".2%" if percent else ".2f")
        for title, (_, _, percent) in GEOMETRY.items()
    ]
    rows: list[list[Cell]] = [
        [name]
        + [
            _value(result.geometry.summaries[kind]["global"], title)
            for title in GEOMETRY
        ]
        for name, result in results.items()
    ]
    captions = {
        "stored": "Updates as bfloat16 checkpoints store them, subtracted in bfloat16.",
        "master": "Updates of the float32 parameters, as trained.",
    }
    return Table(
        columns,
        rows,
        f"{captions[kind]} Fractions pooled over the model; energies and stable rank "
        "are medians over matrices. Chance level of a coverage: 10 %.",
    )


def _figures(
    results: Mapping[str, ArmResult],
    styles: Mapping[str, Any],
    teacher_accuracy: float | None,
) -> dict[str, reports.Plot]:
    seeds = len(next(iter(results.values())).runs)
    band: plots.BandKind = "ci95" if seeds >= 3 else "range"
    shown = plots.describe_band(band, seeds)
    out = {}

    def curves(name: str, kind: str = "eval") -> Curves:
        return {
            arm: plots.Curve(_abscissa(result, name, kind), result.curves(name, kind))
            for arm, result in results.items()
            if result.has(name, kind)
        }

    if accuracy := curves("test_accuracy"):
        references = (
            [plots.Reference("teacher", teacher_accuracy)] if teacher_accuracy else []
        )
        out["accuracy"] = reports.Plot(
            "accuracy",
            plots.learning_curves(
                accuracy,
                y_label="test accuracy",
                band=band,
                y_percent=True,
                styles=styles,
            ),
            f"Greedy accuracy on the test split along training. {shown}"
            + (f" The teacher's: {teacher_accuracy:.1%}." if references else ""),
        )
    out["divergence"] = reports.Plot(
        "divergence",
        plots.learning_curves(
            curves("validation_reverse_kl"),
            y_label="reverse KL (nats a token)",
            band=band,
            styles=styles,
        ),
        f"KL(student || teacher) on completions of validation prompts. {shown}",
    )
    # Before the first update there is no momentum.
    cosine = {
        arm: plots.Curve(x[1:], y[:, 1:])
        for arm, (x, y) in curves("momentum_gradient_cosine", "train").items()
    }
    if cosine:
        variation = curves("root_second_moment_variation", "train")
        out["adamw_state"] = reports.Plot(
            "adamw_state",
            plots.optimizer_state_curves(
                cosine, variation, x_label="optimizer update", band=band, styles=styles
            ),
            "Cosine of the gradient and the momentum before it, and variation of the "
            "root second moment (P1, Appendix A.8), over trained coordinates. "
            f"{shown}",
        )
    out["geometry"] = reports.Plot(
        "geometry",
        plots.bar_panels(
            [_panel(results, title) for title in GEOMETRY], columns=3, styles=styles
        ),
        "Geometry of each arm's update, as stored in bfloat16 and as trained in "
        "float32; dashed: chance level.",
    )
    first, result = next(iter(results.items()))
    cells = {
        (row["layer"], row["module"]): row["unchanged_atol_1e-05"]
        for row in result.geometry.rows["stored"]
        if len(row["shape"]) == 2
    }
    out["sparsity_map"] = reports.Plot(
        "sparsity_map",
        plots.layer_module_map(
            cells, label="unchanged at 1e-5", percent=True, title=first
        ),
        f"Share of coordinates that moved by at most 1e-5 in the stored update of "
        f"{first}, seed {result.runs[0].seed}, by layer and module.",
    )
    return out


def _abscissa(result: ArmResult, name: str, kind: str) -> np.ndarray:
    if kind == "eval":
        return result.runs[0].steps()
    return result.runs[0].curve("update", "train")


def _panel(results: Mapping[str, ArmResult], title: str) -> plots.BarPanel:
    column, _, percent = GEOMETRY[title]
    values = {
        kind: {
            name: _value(result.geometry.summaries[kind]["global"], title)
            for name, result in results.items()
        }
        for kind in ("stored", "master")
    }
    chance = None
    if "coverage" in column:
        chance = {
            kind: {
                name: result.geometry.summaries[kind]["global"].get(f"{column}_chance")
                for name, result in results.items()
            }
            for kind in ("stored", "master")
        }
    return plots.BarPanel(title, values, chance=chance, percent=percent)


def write(
    workdir: Path,
    results: Mapping[str, ArmResult],
    record: Mapping[str, Any],
    claims: Sequence[Claim],
    command: str,
    teacher_accuracy: float | None = None,
) -> reports.ReportFiles:
    """Writes report.html, report.md and the figures.

    Args:
      workdir: The run's folder.
      results: By arm.
      record: What results.json holds.
      claims: The verdicts.
      command: The command line that made the run.
      teacher_accuracy: The teacher's accuracy on the test split.

    Returns:
      Paths of the files.
    """
    styles = plots.assign_styles(list(results))
    figures = _figures(results, styles, teacher_accuracy)
    report = reports.Report(
        "Optimizer ablation of on-policy distillation",
        "One teacher, one anchor, the same prompts and seeds: which optimizer, and "
        "which coordinates, does distillation need? Claims are those of "
        "arXiv 2606.13657, with thresholds that were fixed before the runs.",
    )
    report.section("Claims", reports.Claims(claims), INTERVALS)
    arms = report.section("Arms", _arms_table(results))
    for name, why in record["skipped"].items():
        arms.add(f"{name} was not run: {why}.")
    for name in ("accuracy", "divergence"):
        if name in figures:
            arms.add(figures[name])
    if any(len(entries) > 1 for entries in record["sweep"].values()):
        report.section("Learning rates", rates_module.table(record["sweep"]))
    report.section(
        "Geometry of the updates",
        figures["geometry"],
        _geometry_table(results, "stored"),
        _geometry_table(results, "master"),
        figures["sparsity_map"],
    )
    if "adamw_state" in figures:
        report.section("Optimizer state", figures["adamw_state"])
    report.section(
        "How it was run",
        reports.Code(command),
        reports.Facts("Configuration", record["config"], collapsed=True),
        reports.Facts(
            "Programs and how often each was compiled", record["compilations"]
        ),
        reports.Facts("Environment", record["environment"]),
        f"Wall time: {record['wall_s']:.0f} s.",
    )
    return reports.write_report(report, workdir)


def print_table(results: Mapping[str, ArmResult], claims: Sequence[Claim]) -> None:
    """Prints arms and claims."""
    width = min(shutil.get_terminal_size().columns, 100)

    def show(estimate: Estimate | None, scale: float, digits: int) -> str:
        if estimate is None:
            return "-"
        text = f"{scale * estimate.mean:.{digits}f}"
        if estimate.half_width is None:
            return text
        return f"{text} ±{scale * estimate.half_width:.{digits}f}"

    head = ("arm", "lr", "trained %", "start %", "late %", "reverse KL")
    print(f"\n{head[0]:<28}" + "".join(f"{name:>13}" for name in head[1:]))
    for name, result in results.items():
        e = result.estimates()
        cells = (
            f"{result.runs[0].learning_rate:g}",
            f"{100 * result.mask_density:.1f}",
            show(e.get("start"), 100, 1),
            show(e.get("late"), 100, 1),
            show(e["loss"], 1, 3),
        )
        print(f"{name:<28}" + "".join(f"{cell:>13}" for cell in cells))
    print()
    for claim in claims:
        verdict = {True: "holds", False: "does not hold", None: "undecided"}
        print(f"{verdict[claim.holds]:>14}: {claim.claim}"[:width])
        print(f"{'':16}{claim.evidence}")
