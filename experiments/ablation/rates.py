"""The choice of a learning rate, on the validation split."""

import math
from typing import Any, NamedTuple

import numpy as np

from experiments.common.outcome import Outcome, late
from geomjax.analysis.report import Cell, Column, Estimate, Table
from geomjax.train.errors import NonFiniteError


class Rate(NamedTuple):
    """All runs of one arm at one learning rate.

    Attributes:
      learning_rate: The rate.
      runs: One a seed; empty if one of them diverged.
      error: What a diverged run said.
    """

    learning_rate: float
    runs: list[Outcome]
    error: str | None = None

    def late(self, name: str) -> list[float]:
        """A metric's mean over the last evaluations, one a seed."""
        return [float(late(run.curve(name))) for run in self.runs]


def choose(name: str, rates: list[Rate], *, accuracy: bool) -> Rate:
    """The rate that is best on the validation split.

    By late accuracy, mean over seeds; by late divergence where there are no answers, or
    where no rate answers anything right. A score that is not a number is the worst.

    Args:
      name: The arm's, for errors.
      rates: What was tried.
      accuracy: Whether the runs measured it.

    Raises:
      NonFiniteError: Every rate diverged.
    """
    finished = [rate for rate in rates if rate.runs]
    if not finished:
        raise NonFiniteError(
            f"arm {name}: every learning rate diverged:\n"
            + "\n".join(f"  {rate.learning_rate:g}: {rate.error}" for rate in rates)
        )

    def quality(rate: Rate) -> tuple[float, ...]:
        right = np.mean(rate.late("validation_accuracy")) if accuracy else 0.0
        near = -np.mean(rate.late("validation_reverse_kl"))
        # Every comparison with NaN is false, so that it would keep the first place.
        return tuple(-math.inf if np.isnan(x) else float(x) for x in (right, near))

    return max(finished, key=quality)


def at_edge(rates: list[Rate], chosen: Rate) -> bool:
    """Whether the best of several rates is the lowest or highest that did not diverge.

    A better one may then lie beyond it.
    """
    tried = [rate.learning_rate for rate in rates if rate.runs]
    return len(rates) > 1 and chosen.learning_rate in (min(tried), max(tried))


def record(rates: list[Rate], chosen: Rate) -> list[dict[str, Any]]:
    """The arm's entry in the `sweep` of results.json: every rate, every seed."""
    entries = []
    for rate in rates:
        entry: dict[str, Any] = {
            "learning_rate": rate.learning_rate,
            "chosen": rate.learning_rate == chosen.learning_rate,
            "diverged": rate.error,
        }
        for name in ("validation_accuracy", "test_accuracy", "validation_reverse_kl"):
            measured = rate.runs and name in rate.runs[0].rows[0]
            entry[name] = rate.late(name) if measured else None
        entries.append(entry)
    return entries


def table(sweep: dict[str, list[dict[str, Any]]]) -> Table:
    """Every arm at every rate, from the `sweep` of results.json."""
    columns = [
        Column("arm"),
        Column("learning rate", align="right", spec="g"),
        Column("late validation accuracy", align="right", spec=".1%"),
        Column("late test accuracy", align="right", spec=".1%"),
        Column("late reverse KL (nats)", align="right", spec=".3f"),
        Column(""),
    ]
    rows: list[list[Cell]] = []
    for name, entries in sweep.items():
        for entry in entries:
            values = [
                Estimate.from_samples(entry[key]) if entry[key] else None
                for key in (
                    "validation_accuracy",
                    "test_accuracy",
                    "validation_reverse_kl",
                )
            ]
            verdict = "chosen" if entry["chosen"] else ""
            verdict = "diverged" if entry["diverged"] else verdict
            rows.append([name, entry["learning_rate"], *values, verdict])
    return Table(
        columns,
        rows,
        "Mean over seeds ± half width of the 95 % Student interval, of the last "
        "evaluations. Chosen by the validation split.",
    )
