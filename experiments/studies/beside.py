"""Geometry of a study's arms beside the numbers that the papers print."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from experiments.studies.measured import Measured
from geomjax.analysis.report import Cell, Column, Estimate, Table


class Quantity(NamedTuple):
    """A row of the table.

    Attributes:
      title: What it is.
      column: Its name in the analysis.
      how: `pooled` over the model, or `median` or `mean` over its matrices.
      percent: Whether it is a share.
      chance: Whether a column of chance levels goes with it.
    """

    title: str
    column: str
    how: str
    percent: bool = False
    chance: bool = False

    def samples(self, arm: Measured, kind: Any) -> list[float | None]:
        """The quantity of each seed."""
        take = {"pooled": arm.value, "median": arm.median, "mean": arm.mean}[self.how]
        return take(self.column, kind)


QUANTITIES = {
    "relative norm": Quantity("relative norm", "relative_frobenius", "pooled", True),
    "bf16": Quantity(
        "unchanged in bfloat16", "bf16_unchanged_fraction", "pooled", True
    ),
    "atol": Quantity("unchanged at 1e-5", "unchanged_atol_1e-05", "pooled", True),
    "top16": Quantity("top-16 energy", "top_energy_16", "median", True),
    "stable rank": Quantity("stable rank", "stable_rank", "median"),
    "angle": Quantity(
        "largest principal angle (deg)", "principal_angle_max_right_deg", "mean"
    ),
    "nss": Quantity(
        "normalized spectral shift", "normalized_spectral_shift", "mean", True
    ),
    "principal": Quantity(
        "principal 10 % coverage", "principal_coverage_0.10", "pooled", True, True
    ),
    "low": Quantity(
        "low-magnitude 10 % coverage",
        "low_magnitude_coverage_0.10",
        "pooled",
        True,
        True,
    ),
}

PAPERS: Mapping[str, Mapping[str, float]] = {
    # P2 = arXiv 2606.07082, Table 1 and Figure 2; 8B models.
    "P2 SFT, 8B": {"bf16": 0.081, "nss": 1e-3},
    "P2 OPD, 8B from 32B": {"bf16": 0.516, "nss": 1e-4},
    "P2 RLVR, 8B": {"bf16": 0.772, "nss": 1e-5},
    # P1 = arXiv 2606.13657v2, Tables 2 and 9.
    "P1 offline distillation": {
        "relative norm": 0.11936,
        "atol": 0.0306,
        "top16": 0.0857,
        "stable rank": 82.74,
        "principal": 0.0995,
        "low": 0.1010,
    },
    "P1 OPD (DS-Qwen)": {
        "relative norm": 0.00047,
        "atol": 0.8258,
        "top16": 0.2692,
        "stable rank": 9.97,
        "principal": 0.0481,
        "low": 0.3804,
    },
    "P1 RLVR (DeepScaleR)": {
        "relative norm": 0.00073,
        "atol": 0.7789,
        "top16": 0.1962,
        "stable rank": 16.07,
        "principal": 0.0529,
        "low": 0.3126,
    },
}
"""What the papers print of single runs; P2's spectral shifts are orders of magnitude
read from its text."""


VISION_PAPERS: Mapping[str, Mapping[str, float]] = {
    # P1, Tables 2 and 9.
    "P1 OPD (Qwen2.5-VL)": {
        "relative norm": 0.00142,
        "atol": 0.6672,
        "top16": 0.3052,
        "stable rank": 12.58,
        "principal": 0.0523,
        "low": 0.2499,
    },
    "P1 GRPO (Qwen2.5-VL)": {
        "relative norm": 0.00045,
        "atol": 0.8656,
        "top16": 0.2175,
        "stable rank": 16.57,
        "principal": 0.0458,
        "low": 0.4446,
    },
}
"""What P1 prints of its vision-language runs, at 3B."""


def beside_table(
    arms: Mapping[str, Measured],
    papers: Mapping[str, Mapping[str, float]] = PAPERS,
) -> Table:
    """One row a quantity and kind of update; a column an arm, then the papers'."""
    columns = [Column("quantity", align="left")]
    columns += [Column(name, spec=".3g") for name in (*arms, *papers)]
    rows: list[list[Cell]] = []
    for key, quantity in QUANTITIES.items():
        scale, unit = (100.0, " (%)") if quantity.percent else (1.0, "")
        for kind in ("stored", "master"):
            cells: list[Cell] = [
                _scaled(quantity.samples(arm, kind), scale) for arm in arms.values()
            ]
            if kind == "stored":
                cells += [
                    None if (found := row.get(key)) is None else scale * found
                    for row in papers.values()
                ]
            else:
                cells += [None] * len(papers)
            rows.append([f"{quantity.title}{unit}, {kind}", *cells])
            if quantity.chance:
                level = quantity._replace(column=f"{quantity.column}_chance")
                cells = [
                    _scaled(level.samples(arm, kind), scale) for arm in arms.values()
                ]
                rows.append(
                    [f"its chance level{unit}, {kind}", *cells, *[None] * len(papers)]
                )
    return Table(
        columns,
        rows,
        "Mean over seeds ± half width of the 95 % Student interval. Updates as "
        "bfloat16 checkpoints store them, and of the float32 masters. The papers' "
        "columns are their single runs at 1.5B to 8B, from stored checkpoints. Angles "
        "here are of the leading half of the directions, P2's of 512.",
    )


def _scaled(samples: list[float | None], scale: float) -> Estimate:
    return Estimate.from_samples([scale * s for s in samples if s is not None])
