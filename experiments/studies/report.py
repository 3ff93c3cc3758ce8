"""Tables and figures that the reports of studies share, and how they are written."""

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import ml_collections
import numpy as np

from experiments.common import workdir as workdirs
from experiments.common.environment import command, environment
from experiments.common.outcome import INTERVALS, LATE
from experiments.studies.measured import Measured
from experiments.studies.verdict import Spread, Verdict
from geomjax.analysis import plots
from geomjax.analysis import report as reports
from geomjax.analysis.journal import write_atomically
from geomjax.analysis.report import Cell, Column, Estimate, Table

Arms = Mapping[str, Measured]


class Ran(Protocol):
    """What a report says of how its runs were made: a `Study`, or several."""

    @property
    def config(self) -> ml_collections.ConfigDict:
        """Their configuration."""

    @property
    def workdir(self) -> Path:
        """Where results and report are written."""

    def compilations(self) -> dict[str, int]:
        """How often each program was compiled, by name."""

    def seconds(self) -> float:
        """How long all of them trained."""


def arms_table(arms: Arms) -> Table:
    """Accuracy and divergence of each arm."""
    columns = [
        Column("arm", align="left"),
        Column("learning rate", spec="g"),
        Column("accuracy at start", spec=".1%"),
        Column("late accuracy", spec=".1%", best="max"),
        Column("gain", spec=".1%"),
        Column("reverse KL at end (nats)", spec=".3f", best="min"),
    ]
    rows: list[list[Cell]] = []
    for name, arm in arms.items():
        curves = arm.accuracy()
        kl = [float(run.curve("validation_reverse_kl")[-1]) for run in arm.runs]
        rows.append(
            [
                name,
                arm.runs[0].learning_rate,
                float(curves[:, 0].mean()),
                Estimate.from_samples((np.array(arm.gain()) + curves[:, 0]).tolist()),
                Estimate.from_samples(arm.gain()),
                Estimate.from_samples(kl),
            ]
        )
    seeds = len(next(iter(arms.values())).runs)
    return Table(
        columns,
        rows,
        f"Mean over {seeds} seeds ± half width of the 95 % Student interval. Accuracy: "
        "exact match of greedy completions on the test split; late: mean of the last "
        f"{LATE} evaluations. Reverse KL: KL(student || teacher), whole vocabulary, on "
        f"completions of validation prompts sampled anew.{_restarts(arms)}",
    )


def accuracy_plot(arms: Arms, styles: Mapping[str, Any]) -> reports.Plot:
    """Test accuracy along training."""
    band, shown = _band(arms)
    curves = {
        name: plots.Curve(arm.steps(), arm.accuracy()) for name, arm in arms.items()
    }
    return reports.Plot(
        "accuracy",
        plots.learning_curves(
            curves, y_label="test accuracy", band=band, y_percent=True, styles=styles
        ),
        f"Greedy accuracy on the test split along training. {shown}{_restarts(arms)}",
    )


def _restarts(arms: Arms) -> str:
    """A sentence on the arms that do not start at step 0; empty where all do."""
    later = [f"{n} from {arm.first_step}" for n, arm in arms.items() if arm.first_step]
    if not later:
        return ""
    return (
        f" Restarts, shown and counted from the step they start at: {', '.join(later)}."
    )


TRAJECTORY = {
    "stable rank": "stable_rank",
    "Frobenius norm": "delta_frobenius",
    "Hill exponent": "hill_exponent_K",
    "similarity to the end": "subspace_similarity_16",
}
"""Axis label -> column of `geomjax.analysis.trajectory`."""


def trajectory_plot(arms: Arms, styles: Mapping[str, Any]) -> reports.Plot:
    """P2's Figures 4 and 5: the update along the run."""
    band, shown = _band(arms)
    quantities: dict[str, dict[str, plots.Curve]] = {}
    for label, column in TRAJECTORY.items():
        found = {
            name: plots.Curve(np.array(arm.progress), arm.path(column))
            for name, arm in arms.items()
            if np.isfinite(arm.path(column)).any()
        }
        if found:
            quantities[label] = found
    chance = float(np.nanmean(_chance(arms)))
    references = {}
    if "similarity to the end" in quantities:
        references = {"similarity to the end": [plots.Reference("chance", chance)]}
    return reports.Plot(
        "trajectories",
        plots.trajectory_curves(
            quantities,
            references=references,
            log=[name for name in quantities if name == "Frobenius norm"],
            band=band,
            styles=styles,
        ),
        "The stored update from its origin at each snapshot, means over the attention "
        f"matrices (P2, Figures 4 and 5). {shown}",
    )


def _chance(arms: Arms) -> np.ndarray:
    return np.concatenate(
        [arm.path("subspace_similarity_16_chance").ravel() for arm in arms.values()]
    )


def _band(arms: Arms) -> tuple[plots.BandKind, str]:
    seeds = len(next(iter(arms.values())).runs)
    band: plots.BandKind = "ci95" if seeds >= 3 else "range"
    return band, plots.describe_band(band, seeds)


def write_results(
    study: Ran,
    arms: Arms,
    claims: Sequence[Verdict | Spread],
    title: str,
    lead: str,
    sections: Mapping[str, Sequence[Any]],
    extra: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Writes results.json and the report, and prints the claims.

    Args:
      study: Where the runs were made.
      arms: What was measured.
      claims: What was tested.
      title: Of the report.
      lead: Its first paragraph.
      sections: Further sections: heading -> blocks.
      extra: Further entries of results.json.

    Returns:
      What results.json holds.
    """
    record = {
        "arms": {name: arm.record() for name, arm in arms.items()},
        "claims": [claim.record() for claim in claims],
        "compilations": study.compilations(),
        "train_s": round(study.seconds(), 1),
        **(extra or {}),
        "config": workdirs.resolved(study.config),
        "environment": environment(),
    }
    text = json.dumps(record, indent=2, allow_nan=False) + "\n"
    write_atomically(study.workdir / "results.json", text)
    styles = plots.assign_styles(list(arms))
    report = reports.Report(title, lead)
    shown = [claim.shown() for claim in claims]
    report.section("Claims", reports.Claims(shown), INTERVALS)
    report.section("Arms", arms_table(arms), accuracy_plot(arms, styles))
    for heading, blocks in sections.items():
        report.section(heading, *blocks)
    report.section(
        "How it was run",
        reports.Code(command()),
        reports.Facts("Configuration", record["config"], collapsed=True),
        reports.Facts("Programs and how often each was compiled", study.compilations()),
        reports.Facts("Environment", record["environment"]),
        f"Training took {record['train_s']:.0f} s.",
    )
    files = reports.write_report(report, study.workdir)
    _print_claims(shown)
    print(f"\nreport: {files.page}")
    return record


def _print_claims(claims: Sequence[reports.Claim]) -> None:
    width = min(shutil.get_terminal_size().columns, 100)
    verdict = {True: "holds", False: "does not hold", None: "undecided"}
    for claim in claims:
        print(f"{verdict[claim.holds]:>14}: {claim.claim}"[:width])
        print(f"{'':16}{claim.evidence}")
