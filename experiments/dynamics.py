"""When does each layer's update enter its channel? All probes along training.

Follows the update of OPD, SFT and RLVR through a run, matrix by matrix, and says when
each enters the directions and the coordinates that it ends in
(`experiments.studies.channels` defines both, their chance levels, and the random walk
that stands beside them). Along the way `geomjax.train.probe` measures norm, sparsity
and spectrum of every group of modules at each evaluation. Both papers (P1, arXiv
2606.13657; P2, arXiv 2606.07082) leave this for future work.

    python -m experiments.dynamics --workdir=runs/dynamics

Channels are of the float32 masters: what bfloat16 hides of them is the subject of
`experiments.precision`. An interrupted run continues when it is started again.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_collections
import numpy as np

from experiments.common.outcome import Outcome
from experiments.studies.arms import arm_runs, train_arms
from experiments.studies.begin import begin
from experiments.studies.channels import DENSITY, Channel, follow
from experiments.studies.launch import launch
from experiments.studies.measured import Measured, kept_steps, measure_runs
from experiments.studies.report import trajectory_plot, write_results
from experiments.studies.study import Start, Study
from experiments.studies.verdict import Side, Verdict, differences
from geomjax import hosts
from geomjax.analysis import plots
from geomjax.analysis import report as reports
from geomjax.analysis.plots.maps import order_modules
from geomjax.analysis.report import Cell, Column, Estimate, Table
from geomjax.checkpoints import SafetensorsSource
from geomjax.models import hf
from geomjax.names import GROUPS
from geomjax.train.probe import make_probe
from geomjax.typing import Params

NAME = "dynamics"
QUANTITIES = ("directions", "coordinates")
LOCKED_BY = 0.2
"""Share of a run at which P2 takes the basis that training is then held to."""
PANELS = {
    "relative norm": "relative_frobenius",
    "unchanged in bfloat16": "exact_zero_fraction",
    "stable rank (median)": "stable_rank_median",
    "top-16 energy (median)": "top_energy_16_median",
    "Hill exponent (median)": "hill_exponent_K_median",
}
"""Axis label -> what the probe calls it."""

Followed = dict[str, list[list[Channel]]]
"""Arm -> seed -> matrices."""
Keep = Callable[[Channel], bool]


def run(config: ml_collections.ConfigDict, workdir: Path) -> dict[str, Any]:
    """Runs all regimes, follows their matrices, and writes results and report."""
    with begin(config, workdir, NAME) as (study, origins):
        return _run(config, study, origins)


def _run(
    config: ml_collections.ConfigDict, study: Study, origins: dict[str, Params]
) -> dict[str, Any]:
    probes = {
        name: make_probe(study.placed(params), study.roles)
        for name, params in origins.items()
    }
    starts = {
        name: Start(origins[arm.start], probe=probes[arm.start])
        for name, arm in config.arms.items()
    }
    outcomes = train_arms(study, arm_runs(config), starts)
    anchors = {name: start.params for name, start in starts.items()}
    return hosts.on_main(lambda: _conclude(study, anchors, outcomes))


def _conclude(
    study: Study, anchors: dict[str, Params], outcomes: dict[str, list[Outcome]]
) -> dict[str, Any]:
    """Measures and follows the runs, and writes all results; in process 0 alone."""
    arms: dict[str, Measured] = {}
    channels: Followed = {}
    for name, runs in outcomes.items():
        arms[name] = measure_runs(study, anchors[name], runs)
        channels[name] = [follow_run(study, anchors[name], end) for end in runs]
    progress = np.array(next(iter(arms.values())).progress)
    styles = plots.assign_styles(list(arms))
    return write_results(
        study,
        arms,
        claims(channels, progress),
        "Dynamics of updates",
        "When does the update of each matrix enter the directions and coordinates that "
        "it ends in, and how does its shape change on the way?",
        {
            "Entering the channel": [
                entry_table(channels, progress),
                *(entry_map(name, channels[name], progress) for name in channels),
            ],
            "The way there": [
                way_plot(channels, progress, styles),
                trajectory_plot(arms, styles),
            ],
            "Probes": [probe_plot(name, arm) for name, arm in arms.items()],
        },
        {"channels": record(channels, progress)},
    )


def follow_run(study: Study, origin: Params, outcome: Outcome) -> list[Channel]:
    """The channels of every matrix of a run."""
    steps = kept_steps(study, outcome)
    snapshots = [SafetensorsSource(study.snapshot(outcome, step)) for step in steps]
    return [
        follow(name, before, [s.read(name) for s in snapshots], outcome.seed)
        for name, before in hf.to_hf(origin, study.world.student.model.config)
        if before.ndim == 2
    ]


def record(channels: Followed, progress: np.ndarray) -> dict[str, Any]:
    """Entries of every matrix in results.json: by arm and matrix, one a seed."""
    return {
        arm: {
            matrices[0].name: {
                f"{quantity}{'_walk' if walk else ''}": [
                    _or_none(matrix.entry(quantity, progress, walk=walk))
                    for matrix in matrices
                ]
                for quantity in QUANTITIES
                for walk in (False, True)
            }
            | {"directions_chance": matrices[0].chance, "coordinates_chance": DENSITY}
            for matrices in zip(*seeds, strict=True)
        }
        for arm, seeds in channels.items()
    }


def _or_none(value: float) -> float | None:
    return value if math.isfinite(value) else None


def entries(
    seeds: Sequence[Sequence[Channel]],
    quantity: str,
    progress: np.ndarray,
    *,
    walk: bool = False,
    keep: Keep = lambda matrix: True,
) -> list[float | None]:
    """Mean entry over the matrices of each seed; None where there is none.

    Of those whose own way and whose walk are both defined: an embedding of which fewer
    rows moved than directions are compared has no way, and its walk is left out too.
    """
    found: list[float | None] = []
    for matrices in seeds:
        pairs = [
            (m.entry(quantity, progress), m.entry(quantity, progress, walk=True))
            for m in matrices
            if keep(m)
        ]
        known = [pair[walk] for pair in pairs if all(map(math.isfinite, pair))]
        found.append(math.fsum(known) / len(known) if known else None)
    return found


def entry_table(channels: Followed, progress: np.ndarray) -> Table:
    """When modules enter, by regime, beside random walks; means over layers."""
    columns = [Column("regime", align="left"), Column("module", align="left")]
    for quantity in QUANTITIES:
        columns += [Column(quantity, spec=".0%"), Column("random walk", spec=".0%")]
    rows: list[list[Cell]] = []
    for arm, seeds in channels.items():
        modules = order_modules(list(dict.fromkeys(m.place.module for m in seeds[0])))
        for module in modules:
            cells: list[Cell] = []
            for quantity in QUANTITIES:
                for walk in (False, True):
                    samples = entries(
                        seeds,
                        quantity,
                        progress,
                        walk=walk,
                        keep=_of_module(module),
                    )
                    known = [s for s in samples if s is not None]
                    cells.append(Estimate.from_samples(known) if known else None)
            rows.append([arm, module, *cells])
    return Table(
        columns,
        rows,
        "Share of the run from which on the update stays in its channel, mean over "
        "layers and seeds ± 95 % Student half width: at least half way from chance to "
        "the final leading 16 right singular directions, or to the final largest "
        f"{DENSITY:.1%} of entries. Random walk: independent Gaussian steps with the "
        "norms of the run's, of rows and columns too. "
        f"Snapshots at {', '.join(f'{share:.0%}' for share in progress)} of the run.",
    )


def _of_module(module: str) -> Keep:
    return lambda matrix: matrix.place.module == module


def entry_map(
    arm: str, seeds: Sequence[Sequence[Channel]], progress: np.ndarray
) -> reports.Plot:
    """When each layer's modules enter their final directions; means over seeds."""
    values = {}
    for matrices in zip(*seeds, strict=True):
        found = [matrix.entry("directions", progress) for matrix in matrices]
        place = matrices[0].place
        values[place.layer, place.module] = float(np.mean(found))
    return reports.Plot(
        f"entry_{arm}",
        plots.layer_module_map(
            values, label="enters its directions at", percent=True, limits=(0.0, 1.0)
        ),
        f"{arm}: share of the run at which each matrix enters its final directions.",
    )


def way_plot(
    channels: Followed, progress: np.ndarray, styles: Mapping[str, Any]
) -> reports.Plot:
    """Both quantities along the run, mean over matrices, with walk and chance."""
    panels = []
    for quantity in QUANTITIES:
        first = next(iter(channels.values()))
        chance = np.mean([m.chance for m in first[0]])
        level = float(chance) if quantity == "directions" else DENSITY
        walk = _mean_way(first, quantity, walk=True)
        panels.append(
            plots.Panel(
                f"{quantity} of the end",
                {
                    arm: plots.Curve(progress, _mean_way(seeds, quantity))
                    for arm, seeds in channels.items()
                },
                [
                    plots.Reference("chance", level),
                    plots.Reference("random walk", plots.Curve(progress, walk)),
                ],
                y_percent=True,
            )
        )
    seeds = len(next(iter(channels.values())))
    band: plots.BandKind = "ci95" if seeds >= 3 else "range"
    name = next(iter(channels))
    return reports.Plot(
        "channels",
        plots.line_figure(
            panels,
            x_label="share of the run",
            x_percent=True,
            band=band,
            styles=styles,
        ),
        "Similarity of the update so far to the final one, means over matrices. The "
        f"random walk has the norms of {name}'s steps, of rows and columns too. "
        f"{plots.describe_band(band, seeds)}",
    )


def _mean_way(
    seeds: Sequence[Sequence[Channel]], quantity: str, *, walk: bool = False
) -> np.ndarray:
    """`[S, T]`, means over the matrices whose way is defined throughout."""
    found = []
    for matrices in seeds:
        ways = [getattr(m.walk if walk else m.run, quantity) for m in matrices]
        found.append(np.mean([way for way in ways if np.isfinite(way).all()], axis=0))
    return np.stack(found)


def probe_plot(name: str, arm: Measured) -> reports.Plot:
    """What the probe measured along training, by group of modules; first seed."""
    rows = [row for row in arm.runs[0].rows if row["kind"] == "eval"]
    steps = np.array([row["step"] for row in rows])
    panels = []
    for label, column in PANELS.items():
        curves = {}
        for group in GROUPS:
            values = [row.get(f"update/{group}/{column}", math.nan) for row in rows]
            if np.isfinite(values).any():
                curves[group] = plots.Curve(steps, np.array([values]))
        if curves:
            panels.append(plots.Panel(label, curves))
    return reports.Plot(
        f"probes_{name}",
        plots.line_figure(panels, x_label="training step", columns=2),
        f"{name}, seed {arm.runs[0].seed}: the stored update so far, by group of "
        "modules, as `geomjax.train.probe` measures it at each evaluation.",
    )


def claims(channels: Followed, progress: np.ndarray) -> list[Verdict]:
    """P2's claims on the way of an update, and where a random walk would be."""
    found: list[Verdict] = []

    def test(
        claim: str, source: str, statistic: str, side: Side, bound: float, samples: Any
    ) -> None:
        found.append(Verdict(claim, source, statistic, side, bound, tuple(samples)))

    def attention(matrix: Channel) -> bool:
        return matrix.place.group == "attention"

    def enters(arm: str) -> list[float | None]:
        return entries(channels[arm], "directions", progress, keep=attention)

    for sft, who, source in (
        ("sft", "SFT", "P2, Figure 5"),
        ("sft_anchor", "SFT from OPD's start at its rate", "ours: same start and rate"),
    ):
        if not {"opd", sft} <= channels.keys():
            continue
        test(
            f"OPD enters its final directions before {who}",
            source,
            "mean entry over attention matrices, SFT less OPD, share of the run",
            "above",
            0.0,
            differences(enters(sft), enters("opd")),
        )
    if "opd" in channels:
        test(
            f"OPD is in its final directions by {LOCKED_BY:.0%} of the run",
            "P2, Figures 5 and 6",
            "mean entry over attention matrices, share of the run",
            "below",
            LOCKED_BY,
            enters("opd"),
        )
    if "rlvr" in channels:
        test(
            "RLVR's update contracts: its stable rank falls along the run",
            "P2, Figure 4",
            "mean stable rank over attention matrices, at the end less at the first "
            f"snapshot ({progress[0]:.0%} of the run)",
            "below",
            0.0,
            _contraction([list(filter(attention, s)) for s in channels["rlvr"]]),
        )
    for arm, seeds in channels.items():
        who = "SFT from OPD's start" if arm == "sft_anchor" else arm.upper()
        for quantity in QUANTITIES:
            test(
                f"{who} enters its final {quantity} before a random walk would",
                "ours; the papers show chance at most",
                "mean entry over matrices, random walk with the norms of the run's "
                "steps, rows and columns less run, share of the run",
                "above",
                0.0,
                differences(
                    entries(seeds, quantity, progress, walk=True),
                    entries(seeds, quantity, progress),
                ),
            )
    return found


def _contraction(seeds: Sequence[Sequence[Channel]]) -> list[float | None]:
    return [
        _or_none(
            float(np.mean([m.run.stable_rank[-1] - m.run.stable_rank[0] for m in part]))
        )
        for part in seeds
    ]


if __name__ == "__main__":
    launch(NAME, run)
