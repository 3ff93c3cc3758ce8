"""Geometry of a study's runs, seed by seed, through the analysis of checkpoints."""

import re
from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np

from experiments.common.arm_geometry import CONVERT, mean_of
from experiments.common.outcome import Outcome, late
from experiments.studies.study import Study
from experiments.studies.verdict import differences
from geomjax.analysis import Metric, default_metrics, measure, summarize
from geomjax.analysis.trajectory import average, trajectory
from geomjax.checkpoints import DictSource, SafetensorsSource
from geomjax.models import hf
from geomjax.typing import Params
from geomjax.update import Delta

MASK_DENSITY = 0.3
"""Density of P2's own masks, of its Figure 3."""


@cache
def study_metrics(width: int) -> tuple[Metric, ...]:
    """What is measured of a model's update.

    Args:
      width: Of its residual stream. P2's masks are of rank 64 at width 4,096: here of
        one in 64 too.
    """
    metrics = default_metrics(mask_rank=max(1, width // 64), mask_density=MASK_DENSITY)
    # In the tables of neither paper.
    return tuple(metric for metric in metrics if metric.name != "rotation")


GROUP_COLUMNS = ("relative_frobenius", "energy_share", "bf16_unchanged_fraction")
"""What results.json holds of each module group (P1, Table 3)."""

Summary = dict[str, Any]


class Measured(NamedTuple):
    """An arm: its runs and what they did to the weights.

    Attributes:
      runs: One a seed.
      summaries: By `stored` and `master`, the summary of each seed's final update.
      trajectories: For each seed, the means of `geomjax.analysis.trajectory` over the
        attention matrices (P2's set), a dict a snapshot.
      progress: The snapshots' places in the run, in (0, 1].
      first_step: Step of the schedule at which the runs start; 0 but for restarts.
    """

    runs: list[Outcome]
    summaries: dict[Delta, list[Summary]]
    trajectories: list[list[dict[str, Any]]]
    progress: tuple[float, ...]
    first_step: int = 0

    def steps(self) -> np.ndarray:
        """Steps of the schedule at which the runs were evaluated, `[T]`."""
        return self.first_step + self.runs[0].steps()

    def value(self, column: str, kind: Delta = "stored") -> list[float | None]:
        """A pooled column of the whole model, one a seed."""
        return [s["global"].get(column) for s in self.summaries[kind]]

    def mask_coverage(self, mask: str) -> tuple[float | None, ...]:
        """Share of the stored changes on one of P2's own masks, less chance.

        Args:
          mask: `principal` or `low_magnitude`.
        """
        (column,) = (
            name
            for name in self.summaries["stored"][0]["global"]
            if re.fullmatch(rf"{mask}_coverage_r\d+_{MASK_DENSITY:.2f}", name)
        )
        return differences(self.value(column), self.value(f"{column}_chance"))

    def median(self, column: str, kind: Delta = "stored") -> list[float | None]:
        """A column's median over matrices, one a seed."""
        return [s["global"]["median"].get(column) for s in self.summaries[kind]]

    def mean(self, column: str, kind: Delta = "stored") -> list[float | None]:
        """A column's mean over matrices, one a seed."""
        return [s["global"]["mean"].get(column) for s in self.summaries[kind]]

    def path(self, column: str) -> np.ndarray:
        """A trajectory, `[S, T]`, NaN where it is undefined."""
        return np.array(
            [[row[column] for row in rows] for rows in self.trajectories], np.float64
        )

    def accuracy(self) -> np.ndarray:
        """Test accuracy along training, `[S, T]`."""
        return np.stack([run.curve("test_accuracy") for run in self.runs])

    def gain(self) -> list[float]:
        """Late test accuracy less that at the start, one a seed."""
        curves = self.accuracy()
        return (late(curves) - curves[:, 0]).tolist()

    def record(self) -> dict[str, Any]:
        """Its entry in results.json."""
        accuracy = self.accuracy()
        return {
            "learning_rate": self.runs[0].learning_rate,
            "first_step": self.first_step,
            "seeds": [
                {
                    "seed": run.seed,
                    "accuracy_start": float(curve[0]),
                    "accuracy_late": float(late(curve)),
                    "reverse_kl_final": float(run.curve("validation_reverse_kl")[-1]),
                }
                for run, curve in zip(self.runs, accuracy, strict=True)
            ],
            "geometry": {
                kind: mean_of([s["global"] for s in summaries])
                for kind, summaries in self.summaries.items()
            },
            "groups": {
                kind: mean_of([_of_groups(s) for s in summaries])
                for kind, summaries in self.summaries.items()
            },
            "progress": list(self.progress),
            "trajectories": self.trajectories,
        }


def _of_groups(summary: Summary) -> dict[str, dict[str, float | None]]:
    return {
        group: {column: part[column] for column in GROUP_COLUMNS}
        for group, part in summary["groups"].items()
    }


def measure_runs(
    study: Study, origin: Params, runs: list[Outcome], first_step: int = 0
) -> Measured:
    """Measures the updates from the origin to each snapshot and end of some runs.

    `stored` and `master` as in `measure_arm`; trajectories are of the stored update,
    subtracted in float32 as P2 does.

    Args:
      study: Where the runs were made.
      origin: Parameters that the update counts from.
      runs: One a seed.
      first_step: Step of the schedule at which they start.
    """
    config = study.world.student.model.config
    metrics = study_metrics(config.text.hidden_size)
    source = {
        kind: DictSource(dict(hf.to_hf(origin, config, convert)))
        for kind, convert in CONVERT.items()
    }
    summaries: dict[Delta, list[Summary]] = {"stored": [], "master": []}
    paths = []
    for run in runs:
        params = run.params(config)
        for kind, convert in CONVERT.items():
            tuned = DictSource(dict(hf.to_hf(params, config, convert)))
            rows = measure(source[kind], tuned, delta=kind, metrics=metrics)
            summaries[kind].append(summarize(rows, metrics))
        steps = kept_steps(study, run)
        paths.append(_path(source["master"], study, run, steps))
    progress = tuple(step / study.config.num_steps for step in steps)
    return Measured(runs, summaries, paths, progress, first_step)


def kept_steps(study: Study, run: Outcome) -> list[int]:
    """Steps of which a run keeps its parameters."""
    return [step for step in study.snapshots if study.snapshot(run, step).exists()]


def _path(
    source: DictSource, study: Study, run: Outcome, steps: Sequence[int]
) -> list[dict[str, Any]]:
    checkpoints = [SafetensorsSource(study.snapshot(run, step)) for step in steps]
    labels = [str(step) for step in steps]
    rows = trajectory(source, checkpoints, labels, subtract="float32")
    return average(rows)["attention"]
