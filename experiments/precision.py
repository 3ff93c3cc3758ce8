"""How much of a sparse update is the number format's?

Both papers count the weights that did not change between two bfloat16 checkpoints. Such
a weight may have had no gradient, may have moved by less than half a unit in the last
place, or may have been held in place by rounding during training. The three are told
apart here, for on-policy distillation at several learning rates:

- with float32 masters, what is unchanged in the masters against what is unchanged once
  both sides are rounded to bfloat16;
- without masters, with the weights rounded to bfloat16 after every update, to nearest
  or stochastically (`geomjax.optim.stored_bfloat16`);
- beside updates of the same norm without structure (`experiments.studies.nulls`): a
  dense Gaussian one, and the run's own with its entries shuffled.

SFT and RLVR are trained at one of these rates, from the same start and for as many
steps, so that their sparsity is compared at equal step size.

    python -m experiments.precision --workdir=runs/precision

Moments and gradients are float32 throughout, and so is the arithmetic of the models:
what varies is how weights are stored. An interrupted run continues when it is started
again.
"""

from pathlib import Path
from typing import Any, NamedTuple

import ml_collections
import numpy as np

from experiments.common.outcome import Outcome, late
from experiments.studies.arms import arm_runs, train_arms
from experiments.studies.begin import begin
from experiments.studies.launch import launch
from experiments.studies.measured import Measured, measure_runs
from experiments.studies.nulls import (
    DENSE,
    LOW,
    NULLS,
    SHUFFLED,
    UNCHANGED,
    Figures,
    measure_nulls,
)
from experiments.studies.report import write_results
from experiments.studies.run import FLOAT32
from experiments.studies.study import Start, Study
from experiments.studies.verdict import Side, Verdict, differences
from geomjax import hosts
from geomjax.analysis import plots
from geomjax.analysis import report as reports
from geomjax.analysis.report import Cell, Column, Estimate, Table
from geomjax.typing import Params

NAME = "precision"
NEAREST, STOCHASTIC = "nearest", "stochastic"
ZERO = "exact_zero_fraction"
P2_RATE = "1e-06"
TOLERANCE_POINTS = 0.02
"""Accuracy that stochastic rounding may lose and still count as kept."""

Samples = list[float | None]


class Arm(NamedTuple):
    """An arm with the nulls of its updates.

    Attributes:
      regime: `opd`, `sft` or `rlvr`.
      rate: Its learning rate.
      stored: How its weights are kept between updates.
      measured: Its runs.
      nulls: By null, its figures for each seed.
    """

    regime: str
    rate: float
    stored: str
    measured: Measured
    nulls: dict[str, list[Figures]]

    def null(self, how: str, column: str = UNCHANGED) -> Samples:
        """A figure of a null, one a seed."""
        return [figures[column] for figures in self.nulls[how]]

    def unchanged(self) -> Samples:
        """The share of weights that a bfloat16 checkpoint shows unchanged."""
        return self.measured.value(UNCHANGED)

    def unmoved(self) -> Samples:
        """The share that did not move in what training kept."""
        return self.measured.value(ZERO, "master")

    def hidden(self) -> Samples:
        """Of the weights that look unchanged, the share that did move.

        None where no weight looks unchanged.
        """
        return [
            None if not seen or still is None else (seen - still) / seen
            for seen, still in zip(self.unchanged(), self.unmoved(), strict=True)
        ]

    def excess(self) -> tuple[float | None, ...]:
        """Sparsity beyond that of a dense update of the same norm."""
        return differences(self.unchanged(), self.null(DENSE))

    def late(self) -> list[float | None]:
        """Late test accuracy, one a seed."""
        return late(self.measured.accuracy()).tolist()

    def lost(self, other: "Arm") -> tuple[float | None, ...]:
        """Late accuracy that another arm is short of, one a seed.

        None where this arm gained no more than `TOLERANCE_POINTS`: what never trained
        would be within them too.
        """
        gained = [gain > TOLERANCE_POINTS for gain in self.measured.gain()]
        return tuple(
            loss if enough else None
            for loss, enough in zip(
                differences(self.late(), other.late()), gained, strict=True
            )
        )


def run(config: ml_collections.ConfigDict, workdir: Path) -> dict[str, Any]:
    """Runs all arms, measures them and their nulls, and writes results and report."""
    with begin(config, workdir, NAME) as (study, origins):
        return _run(config, study, origins)


def _run(
    config: ml_collections.ConfigDict, study: Study, origins: dict[str, Params]
) -> dict[str, Any]:
    anchors = {name: origins[arm.start] for name, arm in config.arms.items()}
    starts = {name: Start(params) for name, params in anchors.items()}
    outcomes = train_arms(study, arm_runs(config), starts)
    return hosts.on_main(lambda: _conclude(config, study, anchors, outcomes))


def _conclude(
    config: ml_collections.ConfigDict,
    study: Study,
    anchors: dict[str, Params],
    outcomes: dict[str, list[Outcome]],
) -> dict[str, Any]:
    """Measures runs and nulls, and writes all results; in process 0 alone."""
    arms = {
        name: Arm(
            name.split("_")[0],
            arm.learning_rate,
            arm.stored,
            measure_runs(study, anchors[name], outcomes[name]),
            measure_nulls(study, anchors[name], outcomes[name]),
        )
        for name, arm in config.arms.items()
    }
    return write_results(
        study,
        {name: arm.measured for name, arm in arms.items()},
        claims(arms),
        "Sparsity and the number format",
        "A weight that a bfloat16 checkpoint shows unchanged may have moved. How much "
        "of the sparsity of an update is the format's, by learning rate, by how "
        "weights are stored during training, and beside dense updates of the same "
        "norm?",
        {"What is unchanged, and why": [format_table(arms), format_plot(arms)]},
        {"formats": {name: record(arm) for name, arm in arms.items()}},
    )


def record(arm: Arm) -> dict[str, Any]:
    """An arm's entry in results.json beside that of every study; lists by seed."""
    return {
        "regime": arm.regime,
        "learning_rate": arm.rate,
        "stored": arm.stored,
        "unchanged": arm.unchanged(),
        "unmoved": arm.unmoved(),
        "hidden_share_of_unchanged": arm.hidden(),
        "unchanged_atol_1e-05_master": arm.measured.value(
            "unchanged_atol_1e-05", "master"
        ),
        "nulls": {
            how: {column: arm.null(how, column) for column in (UNCHANGED, LOW)}
            for how in NULLS
        },
    }


def format_table(arms: dict[str, Arm]) -> Table:
    """Sparsity of each arm, split up, beside its nulls."""
    columns = [
        Column("arm", align="left"),
        Column("unchanged in bfloat16", spec=".1%"),
        Column("not moved at all", spec=".1%"),
        Column("of the unchanged, moved", spec=".1%"),
        Column("a dense null unchanged", spec=".1%"),
        Column("its own, shuffled", spec=".1%"),
        Column("within 1e-5 in float32", spec=".1%"),
        Column("small weights changed", spec=".1%"),
        Column("shuffled", spec=".1%"),
        Column("chance", spec=".1%"),
    ]
    rows: list[list[Cell]] = []
    for name, arm in arms.items():
        samples = (
            arm.unchanged(),
            arm.unmoved(),
            arm.hidden(),
            arm.null(DENSE),
            arm.null(SHUFFLED),
            arm.measured.value("unchanged_atol_1e-05", "master"),
            arm.measured.value(LOW),
            arm.null(SHUFFLED, LOW),
            arm.measured.value(f"{LOW}_chance"),
        )
        rows.append([name, *map(Estimate.from_samples, samples)])
    return Table(
        columns,
        rows,
        "Means over seeds ± 95 % Student half widths, of all weights. Not moved at "
        "all: equal in what training kept, float32 masters or rounded weights. Nulls "
        "have the norm of each tensor's float32 update. Small weights: the share of "
        "the changed weights that are among the smallest tenth of their matrix. arXiv "
        "2606.07082, Table 1, counts 51.6 % unchanged after OPD and 77.2 % after RLVR "
        "at 1e-6, and 8.1 % after SFT at 1e-5, of 8B models.",
    )


def format_plot(arms: dict[str, Arm]) -> reports.Plot:
    """Unchanged weights against the rate, by storage, beside the dense null."""
    curves: dict[str, plots.Curve] = {}
    for stored in (FLOAT32, NEAREST, STOCHASTIC):
        found = [a for a in arms.values() if (a.regime, a.stored) == ("opd", stored)]
        found.sort(key=lambda arm: arm.rate)
        if not found:
            continue
        rates = np.array([arm.rate for arm in found])
        label = "float32 masters" if stored == FLOAT32 else f"{stored} rounding"
        curves[label] = plots.Curve(rates, _by_rate([a.unchanged() for a in found]))
        if stored == FLOAT32:
            null = _by_rate([arm.null(DENSE) for arm in found])
            curves["dense null of the masters' norm"] = plots.Curve(rates, null)
    seeds = len(next(iter(arms.values())).measured.runs)
    band: plots.BandKind = "ci95" if seeds >= 3 else "range"
    panel = plots.Panel("unchanged in bfloat16", curves, y_percent=True)
    return reports.Plot(
        "formats",
        plots.line_figure([panel], x_label="learning rate", band=band, x_log=True),
        "OPD's weights that two bfloat16 checkpoints show unchanged, by learning rate "
        f"and storage. {plots.describe_band(band, seeds)}",
    )


def _by_rate(samples: list[Samples]) -> np.ndarray:
    """`[S, T]` from T lists of S."""
    return np.array(samples, np.float64).T


def claims(arms: dict[str, Arm]) -> list[Verdict]:
    """The papers' claims on sparsity, each beside what the format alone would give."""
    opd = {(a.rate, a.stored): a for a in arms.values() if a.regime == "opd"}
    rates = sorted({rate for rate, stored in opd if stored == FLOAT32})
    found: list[Verdict] = []
    for rate in rates:
        found += _of_masters(f"{rate:g}", opd[rate, FLOAT32])
    if len(rates) > 1:
        least, most = (opd[rate, FLOAT32].unchanged() for rate in (rates[0], rates[-1]))
        found.append(
            Verdict(
                "Check: the lower the learning rate, the sparser OPD's update looks",
                "ours; expected of rounding alone; P2 compares regimes across rates",
                f"share unchanged in bfloat16, at {rates[0]:g} less at {rates[-1]:g}",
                "above",
                0.0,
                differences(least, most),
            )
        )
    for rate in rates:
        if {(rate, NEAREST), (rate, STOCHASTIC)} <= opd.keys():
            kinds = (opd[rate, stored] for stored in (FLOAT32, NEAREST, STOCHASTIC))
            found += _of_storage(f"{rate:g}", *kinds)
    return found + _of_regimes(arms)


def _of_masters(rate: str, arm: Arm) -> list[Verdict]:
    """What the papers say of sparse updates, against the format and the nulls."""
    cases: tuple[tuple[str, str, str, Side, float, Any], ...] = (
        (
            f"OPD at {rate} leaves half of the weights unchanged in bfloat16",
            "P2, Table 1" if rate == P2_RATE else f"ours; P2, Table 1 is at {P2_RATE}",
            "share unchanged, stored",
            "above",
            0.5,
            arm.unchanged(),
        ),
        (
            f"Check: most weights that look unchanged after OPD at {rate} moved",
            "ours; expected of any optimizer that moves all masters",
            "of the weights unchanged in bfloat16, the share that moved in float32",
            "above",
            0.5,
            arm.hidden(),
        ),
        (
            f"OPD's update at {rate} looks sparser than a dense one of its norm",
            "P1, Table 2; the null is ours",
            "share unchanged in bfloat16, run less dense null",
            "above",
            0.0,
            arm.excess(),
        ),
        (
            f"OPD at {rate} prefers small weights by more than the format does",
            "P1, Table 2, and P2, Figure 3; the null is ours",
            "coverage of the smallest tenth by changed weights, run less shuffled",
            "above",
            0.0,
            differences(arm.measured.value(LOW), arm.null(SHUFFLED, LOW)),
        ),
    )
    return [Verdict(*case[:5], tuple(case[5])) for case in cases]


def _of_storage(
    rate: str, masters: Arm, nearest: Arm, stochastic: Arm
) -> list[Verdict]:
    """What weights stored in bfloat16 during training do to sparsity and accuracy."""
    cases: tuple[tuple[str, str, Side, float, Any], ...] = (
        (
            f"Without masters, rounding to nearest makes the update at {rate} sparser",
            "share unchanged, nearest less float32 masters seen in bfloat16",
            "above",
            0.0,
            differences(nearest.unchanged(), masters.unchanged()),
        ),
        (
            f"Stochastic rounding leaves fewer weights unchanged at {rate}",
            "share unchanged, float32 masters seen in bfloat16 less stochastic",
            "above",
            0.0,
            differences(masters.unchanged(), stochastic.unchanged()),
        ),
        (
            f"Rounding to nearest costs accuracy at {rate}",
            "late accuracy, float32 masters less nearest",
            "above",
            0.0,
            differences(masters.late(), nearest.late()),
        ),
        (
            f"Stochastic rounding keeps the accuracy at {rate}",
            "late accuracy, float32 masters less stochastic; "
            f"{100 * TOLERANCE_POINTS:g} points may go, of a gain above that",
            "below",
            TOLERANCE_POINTS,
            masters.lost(stochastic),
        ),
    )
    ours = "ours; the papers do not compare"
    return [Verdict(case[0], ours, *case[1:]) for case in cases]


def _of_regimes(arms: dict[str, Arm]) -> list[Verdict]:
    """P2's order of the regimes, at one rate, with and without the size of updates."""
    found = []
    for more, less in (("rlvr", "opd"), ("opd", "sft")):
        pairs = [
            (first, second)
            for first in arms.values()
            for second in arms.values()
            if (first.regime, second.regime) == (more, less)
            and (first.rate, first.stored) == (second.rate, second.stored)
        ]
        for first, second in pairs:
            who = f"{more.upper()} at {first.rate:g}"
            found.append(
                Verdict(
                    f"{who} leaves more weights unchanged than {less.upper()}",
                    "P2, Table 1; rates, starts and steps are equal here",
                    f"share unchanged in bfloat16, {more.upper()} less {less.upper()}",
                    "above",
                    0.0,
                    differences(first.unchanged(), second.unchanged()),
                )
            )
            found.append(
                Verdict(
                    f"{who} is sparser than {less.upper()} beyond what their norms "
                    "explain",
                    "ours",
                    "share unchanged beyond that of a dense null, "
                    f"{more.upper()} less {less.upper()}",
                    "above",
                    0.0,
                    differences(list(first.excess()), list(second.excess())),
                )
            )
    return found


if __name__ == "__main__":
    launch(NAME, run)
