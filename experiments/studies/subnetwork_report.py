"""Tables and figures of the study of subnetworks."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from experiments.common.outcome import Outcome, late
from geomjax.analysis import plots
from geomjax.analysis import report as reports
from geomjax.analysis.report import Cell, Column, Estimate, Table

PAIRS = {
    "RLVR, by OPD": ("rlvr", "opd"),
    "OPD, by OPD of another teacher": ("opd", "opd_other_teacher"),
    "OPD, by OPD of another seed": ("opd", "opd_other_seed"),
}
"""Whose support is covered by whose."""

PAPERS: Mapping[str, Mapping[str, tuple[float, float, float]]] = {
    # P1 = arXiv 2606.13657v2, Table 4; arXiv 2505.11711 for seeds of RL.
    "": {
        "RLVR, by OPD": (0.1750, 0.5321, 3.04),
        "OPD, by OPD of another teacher": (0.2957, 0.8017, 2.71),
        "OPD, by OPD of another seed": (0.367, 0.605, 0.605 / 0.367),
    },
    "vision": {"RLVR, by OPD": (0.3328, 0.7353, 2.21)},
}
"""By world, chance level, coverage and lift that the papers print."""

FIGURES = {
    "": "P1 (Figure 3, peak of mean@16 on AIME): full 35.5 %, OPD mask 35.1 %, RLVR "
    "mask 34.7 %, random mask 32.9 %.",
    "vision": "P1 (Figure 7, peak on Geometry3K): full 55.7 %, OPD mask 54.2 %, random "
    "mask of its density 52.3 %, GRPO mask 50.0 %, random mask of its density 47.4 %.",
}
"""What P1 prints of its masked runs."""


class Found(NamedTuple):
    """What the study measured; every list has one entry a seed.

    Attributes:
      outcomes: Runs by arm.
      supports: Overlaps of the full runs' supports, by pair.
      masks: Overlaps of the own mask with each other kind's, by arm.
      agreement: How near each arm ended to its full run.
    """

    outcomes: dict[str, list[Outcome]]
    supports: dict[str, list[dict[str, Any]]]
    masks: dict[str, list[dict[str, Any]]]
    agreement: dict[str, list[dict[str, float]]]

    def accuracy(self, arm: str) -> list[float]:
        """Late test accuracy."""
        return [float(late(r.curve("test_accuracy"))) for r in self.outcomes[arm]]

    def gain(self, arm: str) -> list[float]:
        """Late test accuracy less that at the start."""
        starts = [r.curve("test_accuracy")[0] for r in self.outcomes[arm]]
        return [
            a - float(start)
            for a, start in zip(self.accuracy(arm), starts, strict=True)
        ]

    def divergence(self, arm: str) -> list[float]:
        """Late reverse KL to the teacher, in nats, on validation prompts."""
        return [
            float(late(r.curve("validation_reverse_kl"))) for r in self.outcomes[arm]
        ]

    def record(self) -> dict[str, Any]:
        """The entry `runs` of results.json."""
        return {
            arm: {
                "trained": [run.trained for run in runs],
                "accuracy_late": self.accuracy(arm),
                "gain": self.gain(arm),
                "reverse_kl_late": self.divergence(arm),
            }
            for arm, runs in self.outcomes.items()
        }


def density_plot(
    found: Found, curves: Mapping[str, Mapping[float, str]]
) -> reports.Plot:
    """Accuracy and divergence against the share of coordinates that is trained.

    Args:
      found: The runs.
      curves: For each kind of mask, arms by density; all end at the full run.
    """
    seeds = len(found.outcomes["opd"])
    band: plots.BandKind = "ci95" if seeds >= 3 else "range"

    def panel(label: str, of: Any, start: str, percent: bool) -> plots.Panel:
        lines = {}
        for rule, arms in curves.items():
            x = [*arms, 1.0]
            values = [of(arm) for arm in (*arms.values(), "opd")]
            lines[rule] = plots.Curve(np.array(x), np.array(values).T)
        before = np.mean([r.curve(start)[0] for r in found.outcomes["opd"]])
        return plots.Panel(
            label,
            lines,
            references=[plots.Reference("before training", float(before))],
            y_percent=percent,
        )

    figure = plots.line_figure(
        [
            panel("late test accuracy", found.accuracy, "test_accuracy", True),
            panel(
                "late reverse KL (nats)",
                found.divergence,
                "validation_reverse_kl",
                False,
            ),
        ],
        x_label="share of the coordinates that is trained",
        x_log=True,
        x_percent=True,
        band=band,
    )
    return reports.Plot(
        "density",
        figure,
        "Late accuracy and divergence from the teacher against density, to full "
        f"training at 100 %. {plots.describe_band(band, seeds)}",
    )


def runs_table(found: Found, world: str) -> Table:
    """Every arm's density, accuracy and divergence."""
    columns = [
        Column("arm", align="left"),
        Column("trained", spec=".1%"),
        Column("late accuracy", spec=".1%", best="max"),
        Column("gain", spec=".1%"),
        Column("late reverse KL (nats)", spec=".3f", best="min"),
    ]
    rows: list[list[Cell]] = [
        [
            arm,
            float(np.mean([run.trained for run in runs])),
            Estimate.from_samples(found.accuracy(arm)),
            Estimate.from_samples(found.gain(arm)),
            Estimate.from_samples(found.divergence(arm)),
        ]
        for arm, runs in found.outcomes.items()
    ]
    return Table(
        columns,
        rows,
        "Mean over seeds ± half width of the 95 % Student interval. The divergence is "
        f"from the first teacher in every row. {FIGURES[world]}",
    )


OVERLAP = {
    "covered_by_b_chance": Column("chance", spec=".1%"),
    "covered_by_b_chance_per_tensor": Column("chance within tensors", spec=".1%"),
    "covered_by_b": Column("covered", spec=".1%"),
    "lift": Column("lift", spec=".2f"),
    "jaccard": Column("Jaccard", spec=".3f"),
    "jaccard_chance": Column("its chance", spec=".3f"),
}
"""Figure of an overlap -> its column."""


def supports_table(found: Found, world: str) -> Table:
    """Overlap of the full runs' updates, beside the papers'."""
    columns = [
        Column("support", align="left"),
        Column("density", spec=".1%"),
        *OVERLAP.values(),
        Column("papers: chance", spec=".1%"),
        Column("papers: covered", spec=".1%"),
        Column("papers: lift", spec=".2f"),
    ]
    rows: list[list[Cell]] = [
        [
            pair,
            *(_estimate(seeds, key) for key in ("a_density", *OVERLAP)),
            *PAPERS[world].get(pair, (None, None, None)),
        ]
        for pair, seeds in found.supports.items()
    ]
    return Table(
        columns,
        rows,
        "P1's Table 4: coordinates that a full run moved by more than 1e-5, stored in "
        "bfloat16 and subtracted in it. Chance is the other support's density, so that "
        "two dense supports can exceed it by little; the lift is over it, as P1's is. "
        "Chance within tensors: were each support at random in every tensor, and as "
        "large there; claims are tested against it. Mean over seeds ± half width of "
        "the 95 % Student interval; pairs of seeds share runs, so that theirs is too "
        "narrow. The papers' figures are of single runs, and of RL for the seed (arXiv "
        "2505.11711).",
    )


def masks_table(found: Found, density: float) -> Table:
    """How much of the own mask each other kind holds, at one density."""
    columns = [Column("mask", align="left"), *OVERLAP.values()]
    rows: list[list[Cell]] = [
        [arm, *(_estimate(seeds, key) for key in OVERLAP)]
        for arm, seeds in found.masks.items()
    ]
    return Table(
        columns,
        rows,
        f"Share of the {density:.1%} of coordinates that OPD moved most, in float32, "
        "which each mask holds. Chance within tensors: had the mask its coordinates at "
        "random in every tensor, and as many of them there. Mean over seeds ± half "
        "width of the 95 % Student interval.",
    )


def agreement_table(found: Found) -> Table:
    """How near the arms end to full training, parameter by parameter."""
    columns = [
        Column("end", align="left"),
        Column("same float32", spec=".1%"),
        Column("same bfloat16", spec=".1%"),
        Column("within 1e-5", spec=".1%"),
        Column("within 1e-4", spec=".1%"),
        Column("distance", spec=".3f", best="min"),
    ]
    keys = (
        "master_equal",
        "stored_equal",
        "stored_within_1e-05",
        "stored_within_0.0001",
        "distance",
    )
    rows: list[list[Cell]] = [
        [arm, *(_estimate(seeds, key) for key in keys)]
        for arm, seeds in found.agreement.items()
    ]
    return Table(
        columns,
        rows,
        "Share of parameters that end as after full training of the same kind and "
        "seed: the same bits as trained, the same bits as stored, and stored within a "
        "tolerance. Distance: norm of the difference over that of the full update. "
        "arXiv 2505.11711 has 94.0 % and 90.5 % within 1e-5, and 100 % within 1e-4, "
        "for RL on bfloat16 weights. Mean over seeds ± half width of the 95 % Student "
        "interval.",
    )


def _estimate(seeds: Sequence[Mapping[str, Any]], key: str) -> Estimate:
    return Estimate.from_samples([s[key] for s in seeds])
