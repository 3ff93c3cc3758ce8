"""What a finished study found, in one form whatever study it is."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments.common import provenance
from experiments.common.arm_geometry import mean_of
from experiments.common.outcome import late
from experiments.common.workdir import WorkdirError
from experiments.published.tables import PublishedColumn
from experiments.studies.verdict import Verdict
from geomjax.analysis.report import Claim
from geomjax.train.log import read_rows

EARLY = 0.2
"""Share of a run at which P2 looks for the final directions."""


class Results(NamedTuple):
    """A finished study.

    Attributes:
      folder: Its folder.
      record: Its results.json.
    """

    folder: Path
    record: Mapping[str, Any]

    def code(self) -> str:
        """The commits of its starts, shortened; `+` marks files that differed.

        Raises:
          WorkdirError: The record of its starts is missing or damaged.
        """
        found = [start["git"] for start in provenance.read(self.folder)["starts"]]
        commits = [
            git["commit"][:7] + ("+" if git["changed"] else "") for git in found if git
        ]
        return ", ".join(dict.fromkeys(commits))

    def claims(self) -> list[Claim]:
        """Its claims with their verdicts."""
        return [_claim(record) for record in self.record["claims"]]

    def values(self, at: str, kind: str) -> Mapping[str, Any] | None:
        """A part of the record, with what is derived of it if it is an arm.

        Args:
          at: Where it is, keys joined by slashes.
          kind: Of which update the geometry is taken, `stored` or `master`.

        Returns:
          The part, of a list the mean over its seeds, and of an arm also `global` and
          `groups` (as in summary.json), `accuracy`, `trajectory` and `state`. None
          where the record has no such part.
        """
        found = look_up(self.record, at)
        if isinstance(found, list) and found:
            found = mean_of(found)  # One a seed.
        if not isinstance(found, Mapping):
            return None
        if at.startswith("runs/"):
            return _of_runs(found)
        if not at.startswith("arms/"):
            return found
        rows = self._rows(at.removeprefix("arms/"))
        return {
            **found,
            **_geometry(found, kind),
            "accuracy": _accuracy(rows),
            "trajectory": _trajectory(found),
            # Before the first update there is no momentum.
            "state": {
                "cosine": _curve(rows, "momentum_gradient_cosine", first=1),
                "variation": _curve(rows, "root_second_moment_variation"),
            },
        }

    def _rows(self, arm: str) -> list[list[dict[str, Any]]]:
        """Rows of the reported runs of an arm, a list a seed."""
        joined = self.folder / "metrics.jsonl"
        if not joined.exists():
            folders = (self.folder / "arms" / arm).glob("seed_*")
            return [read_rows(folder) for folder in sorted(folders)]
        by_seed: dict[int, list[dict[str, Any]]] = {}
        for row in read_rows(self.folder):
            if row["arm"] == arm:
                by_seed.setdefault(row["seed"], []).append(row)
        return list(by_seed.values())


def read_results(folder: Path) -> Results:
    """Reads a finished study.

    Raises:
      WorkdirError: Its results.json is damaged.
    """
    path = folder / "results.json"
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(record["claims"], list):
            raise ValueError("its claims are no list")
    except (ValueError, KeyError, TypeError) as error:
        raise WorkdirError(f"{path} is damaged: {error}") from None
    return Results(folder, record)


def look_up(values: Any, path: str) -> Any:
    """What lies at keys joined by slashes; None where a key is missing."""
    for key in path.split("/"):
        if not isinstance(values, Mapping) or key not in values:
            return None
        values = values[key]
    return values


def measured(column: PublishedColumn, values: Mapping[str, Any]) -> float | None:
    """A column's value in its unit; None where the study has none."""
    found = [look_up(values, path) for path in column.value]
    known = [float(value) for value in found if value is not None]
    if not known:
        return None
    return sum(known) * (100 if column.percent else 1)


def _claim(record: Mapping[str, Any]) -> Claim:
    if "evidence" in record:
        return Claim(record["claim"], record["holds"], record["evidence"])
    fields = {name: record[name] for name in Verdict._fields}
    return Verdict(**fields | {"samples": tuple(fields["samples"])}).shown()


def _of_runs(runs: Mapping[str, Any]) -> dict[str, Any]:
    """Runs without measured geometry, as `experiments.subnetwork` records them."""
    late_value, gain, trained = (
        float(np.mean(runs[name])) for name in ("accuracy_late", "gain", "trained")
    )
    return {"accuracy": {"late": late_value, "gain": gain}, "mask_density": trained}


def _geometry(arm: Mapping[str, Any], kind: str) -> dict[str, Any]:
    geometry = look_up(arm, f"geometry/{kind}") or {}
    if "global" in geometry:
        return {"global": geometry["global"], "groups": geometry["groups"]}
    return {"global": geometry, "groups": look_up(arm, f"groups/{kind}") or {}}


def _accuracy(rows: list[list[dict[str, Any]]]) -> dict[str, float]:
    name = "test_accuracy"
    curves = [[row[name] for row in run if name in row] for run in rows]
    if not curves or not all(len(curve) > 1 for curve in curves):
        return {}
    values = np.array(curves, np.float64)
    last = late(values)
    return {
        "start": float(values[:, 0].mean()),
        "peak": float(values.max(axis=1).mean()),
        "final": float(values[:, -1].mean()),
        "late": float(last.mean()),
        "gain": float((last - values[:, 0]).mean()),
    }


def _trajectory(arm: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """First, early and last of every column, means over the seeds."""
    paths = arm.get("trajectories")
    if not paths:
        return {}
    early = int(np.argmin(np.abs(np.array(arm["progress"]) - EARLY)))
    places = {"first": 0, "early": early, "end": -1}
    found: dict[str, dict[str, float]] = {}
    for column in paths[0][0]:
        for name, index in places.items():
            values = [rows[index][column] for rows in paths]
            if all(isinstance(value, (int, float)) for value in values):
                mean = float(np.mean(values))
                found.setdefault(column, {})[name] = mean
    return found


def _curve(
    rows: list[list[dict[str, Any]]], name: str, *, first: int = 0
) -> dict[str, float]:
    """Start, mean, end and least of a figure along training, means over the seeds."""
    curves = [[row[name] for row in run if name in row][first:] for run in rows]
    if not curves or not all(curves):
        return {}
    values = np.array(curves, np.float64)
    return {
        "start": float(values[:, 0].mean()),
        "mean": float(values.mean()),
        "end": float(values[:, -1].mean()),
        "min": float(values.min(axis=1).mean()),
    }
