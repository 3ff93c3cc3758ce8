"""Does an update stay in its early directions, and does training suffice with them?

Follows the update of OPD, SFT and RLVR along training (stable rank, norm, Hill
exponent, similarity to the end, with its chance level; P2, arXiv 2606.07082, Figures 4
and 5), and trains each on from an early snapshot three ways: freely, inside the first
right singular directions of its own update until then (P2, Figures 6 and 8), and inside
random directions, of which P2 has no run. RLVR under the constraint is ours too, and so
is SFT from OPD's start at OPD's rate: P2's SFT starts elsewhere and has ten times the
rate, so that what sets it apart from OPD may be either.

    python -m experiments.subspace_locking --workdir=runs/locking

P2 does not say what becomes of the optimizer's state at the restart: here all three
start with a fresh one, the free run included, so that they differ in the constraint
alone. What the constraint does to matrices, vectors and moments is written down in
`geomjax.optim.project_updates`. An interrupted run continues when it is started again.
"""

from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import ml_collections
import numpy as np

from experiments.common.outcome import Outcome, late
from experiments.studies.arms import arm_runs, run_bar
from experiments.studies.begin import begin
from experiments.studies.launch import launch
from experiments.studies.measured import Measured, measure_runs
from experiments.studies.report import trajectory_plot, write_results
from experiments.studies.run import Run
from experiments.studies.study import Start, Study
from experiments.studies.subnetwork_claims import RECOVERED
from experiments.studies.verdict import Side, Verdict, differences
from geomjax import hosts
from geomjax.analysis import plots
from geomjax.analysis.report import Column, Estimate, Table
from geomjax.optim import leading_right_basis, load_basis, random_basis, save_basis
from geomjax.typing import Params

NAME = "subspace_locking"
FREE, OWN, RANDOM = "free", "own", "random"
CONSTRAINTS = (FREE, OWN, RANDOM)
SFT = {
    "sft": ("SFT", ""),
    "sft_anchor": ("SFT from OPD's start at its rate", "ours: same start and rate"),
}
"""What claims call the supervised arms, and the source of those that P2 lacks."""
TOLERANCE_POINTS = 0.02
"""Accuracy that a constrained run may lose and still count as kept. Of a gain not much
larger, that is kept by a basis of no use too, hence the claims on the gain itself."""
LATER = "ours, added after the first results"


def run(config: ml_collections.ConfigDict, workdir: Path) -> dict[str, Any]:
    """Runs all regimes with and without constraint, and writes results and report."""
    with begin(config, workdir, NAME) as (study, origins):
        return _run(config, study, origins)


def _run(
    config: ml_collections.ConfigDict, study: Study, origins: dict[str, Params]
) -> dict[str, Any]:
    at = basis_step(config, study)
    outcomes: dict[str, list[Outcome]] = {}
    outside: dict[str, list[float]] = {}
    starts: dict[str, str] = {}
    total = len(config.arms) * len(config.seeds) * (1 + len(CONSTRAINTS))
    with run_bar(total) as bar:
        for name, arm in config.arms.items():
            for spec in arm_runs(config)[name]:
                bar.set_description(f"{name} seed {spec.seed}")
                origin = origins[arm.start]
                plain = study.train(spec, Start(origin))
                outcomes.setdefault(name, []).append(plain)
                starts[name] = arm.start
                bar.update()
                early = study.snapshot_params(plain, at)
                for how in CONSTRAINTS:
                    branch = spec._replace(arm=f"{name}_{how}", first_step=at)
                    basis = shared_basis(study, how, origin, early, branch)
                    end = study.train(branch, Start(early, basis))
                    outcomes.setdefault(branch.arm, []).append(end)
                    starts[branch.arm] = arm.start
                    if basis is not None:
                        share = partial(largest_outside, study, early, end, basis)
                        outside.setdefault(branch.arm, []).append(hosts.on_main(share))
                    bar.update()
    found = Found(outcomes, {n: origins[start] for n, start in starts.items()}, outside)
    return hosts.on_main(lambda: _conclude(config, study, found, at))


class Found(NamedTuple):
    """What training has given, by arm.

    Attributes:
      outcomes: Runs, one a seed.
      origins: Parameters that their updates count from.
      outside: `largest_outside` of the runs with a basis.
    """

    outcomes: dict[str, list[Outcome]]
    origins: dict[str, Params]
    outside: dict[str, list[float]]


def _conclude(
    config: ml_collections.ConfigDict, study: Study, found: Found, at: int
) -> dict[str, Any]:
    """Measures the runs and writes all results; in process 0 alone."""
    arms = {
        name: measure_runs(
            study, found.origins[name], runs, 0 if name in config.arms else at
        )
        for name, runs in found.outcomes.items()
    }
    plain_arms = {name: arms[name] for name in config.arms}
    styles = plots.assign_styles(list(arms))
    return write_results(
        study,
        arms,
        claims(plain_arms, arms, at / config.num_steps),
        "Subspace locking",
        "Does an update stay in the directions that it takes early on, and is training "
        "inside them enough? After arXiv 2606.07082, with a random subspace and with "
        "RLVR as controls of ours.",
        {
            "Trajectories": [trajectory_plot(plain_arms, styles)],
            f"Training inside {config.rank} directions": [
                constraint_table(config, arms, found.outside)
            ],
        },
        {"outside_subspace": found.outside, "basis_step": at},
    )


def basis_step(config: ml_collections.ConfigDict, study: Study) -> int:
    """The snapshot whose update the basis is made of.

    Raises:
      ValueError: It is none of the snapshots kept, or the last.
    """
    at = max(1, round(config.basis_share * config.num_steps))
    if at not in study.snapshots[:-1]:
        raise ValueError(
            f"basis_share {config.basis_share} is step {at} of {config.num_steps}; it "
            f"must be one of the snapshots before the end, {study.snapshots[:-1]}"
        )
    return at


def shared_basis(
    study: Study, how: str, origin: Params, early: Params, run: Run
) -> Any:
    """`make_basis` of a run, kept in its folder.

    Process 0 makes it, and all read it: another machine's singular vectors may differ
    in their last bits.
    """
    if how == FREE:
        return None
    folder = study.workdir / run.folder / "basis"

    def make() -> None:
        save_basis(folder, make_basis(study, how, origin, early, run.seed))

    hosts.on_main(make)
    hosts.await_file(folder / "model.safetensors")
    return load_basis(folder, early, study.roles)


def make_basis(study: Study, how: str, origin: Params, early: Params, seed: int) -> Any:
    """The directions that a run is held to."""
    rank = study.config.rank
    if how == RANDOM:
        return random_basis(jax.random.key(seed), early, rank, study.roles)
    delta = jax.tree.map(
        lambda new, old: np.asarray(new, np.float64) - np.asarray(old, np.float64),
        early,
        origin,
    )
    return leading_right_basis(delta, rank, study.roles)


def largest_outside(study: Study, start: Params, end: Outcome, basis: Any) -> float:
    """Largest `||D (I - V V^T)||_F / ||W||_F` of a matrix with a basis, in float64."""
    params = end.params(study.world.student.model.config)
    shares = []

    def of_leaf(v: Any, before: Any, after: Any) -> None:
        if v is None:
            return
        v, before = np.asarray(v, np.float64), np.asarray(before, np.float64)
        d = np.asarray(after, np.float64) - before
        rest = d - d @ v @ np.swapaxes(v, -1, -2)
        axes = (-2, -1)
        shares.append(
            (np.linalg.norm(rest, axis=axes) / np.linalg.norm(before, axis=axes)).max()
        )

    jax.tree.map(of_leaf, basis, start, params, is_leaf=lambda v: v is None)
    return float(max(shares))


def constraint_table(
    config: ml_collections.ConfigDict,
    arms: dict[str, Measured],
    outside: dict[str, list[float]],
) -> Table:
    """Late accuracy of each regime under each constraint."""
    columns = [
        Column("regime", align="left"),
        *(Column(f"late accuracy, {how}", spec=".1%") for how in CONSTRAINTS),
        Column("gain, free", spec=".1%"),
        *(Column(f"recovered, {how}", spec=".0%") for how in (OWN, RANDOM)),
        *(Column(f"outside, {how}", spec=".1e") for how in (OWN, RANDOM)),
    ]
    rows = [
        [
            name,
            *(
                Estimate.from_samples(late_accuracy(arms[f"{name}_{how}"]))
                for how in CONSTRAINTS
            ),
            Estimate.from_samples(arms[f"{name}_{FREE}"].gain()),
            *(Estimate.from_samples(shares(arms, name, how)) for how in (OWN, RANDOM)),
            *(max(outside[f"{name}_{how}"]) for how in (OWN, RANDOM)),
        ]
        for name in config.arms
    ]
    return Table(
        columns,
        rows,
        f"Restarts at {config.basis_share:.0%} of the run: free, inside the first "
        f"{config.rank} right singular directions of the regime's own update until "
        "then, or inside as many random ones. Gain: late accuracy less that at the "
        "restart; recovered: the share of the free run's that a constrained one has, "
        "of the seeds whose free run gained. Outside: the largest share of a matrix's "
        "norm by which its update left the subspace, which is the rounding of float32 "
        "weights.",
    )


def late_accuracy(arm: Measured) -> list[float]:
    """Late test accuracy, one a seed."""
    return late(arm.accuracy()).tolist()


def shares(arms: dict[str, Measured], name: str, how: str) -> tuple[float | None, ...]:
    """Gain of a constrained run over that of the free one, one a seed.

    Both count from the restart. None where the free run gained nothing.
    """
    free, held = (arms[f"{name}_{x}"].gain() for x in (FREE, how))
    return tuple(
        part / whole if whole > 0 else None
        for part, whole in zip(held, free, strict=True)
    )


def recovery(arms: dict[str, Measured], name: str, label: str) -> Verdict:
    """Whether the early directions give the gain of the free run, or most of it.

    Tested seed by seed as subnetworks are: the gain less 80 % of the free run's, which
    asks the same as a share above 80 % and stays finite where a gain is small. Of
    supervised training P2 says the contrary.
    """
    free, own = (arms[f"{name}_{how}"].gain() for how in (FREE, OWN))
    part = [RECOVERED * gain if gain > 0 else None for gain in free]
    supervised = name in SFT
    known = [x for x in shares(arms, name, OWN) if x is not None]
    mean, half = Estimate.from_samples(known)
    seen = f"{mean:.0%}" + ("" if half is None else f" ± {half:.0%}")
    return Verdict(
        f"{label} has {'less than ' if supervised else ''}{RECOVERED:.0%} of its free "
        "gain inside its early directions" + ("" if supervised else ", or more"),
        LATER,
        f"gain since the restart, constrained less {RECOVERED:.0%} of the free run's, "
        "undefined where that is no gain; "
        + (f"share recovered {seen}" if known else "no free run gained"),
        "below" if supervised else "above",
        0.0,
        differences(own, part),
    )


def claims(
    plain: dict[str, Measured], arms: dict[str, Measured], share: float
) -> list[Verdict]:
    """P2's claims on the trajectory and the constraint, and those of the controls."""
    found: list[Verdict] = []

    def test(
        claim: str, source: str, statistic: str, side: Side, bound: float, samples: Any
    ) -> None:
        found.append(Verdict(claim, source, statistic, side, bound, tuple(samples)))

    for rival, (label, control) in SFT.items():
        if {"opd", rival} <= plain.keys():
            opd, sft = plain["opd"], plain[rival]
            at = int(np.argmin(np.abs(np.array(opd.progress) - share)))
            similarity = "subspace_similarity_16"
            test(
                f"OPD finds its final directions earlier than {label}",
                control or "P2, Figure 5",
                f"similarity to the end at {share:.0%} of the run, OPD less {label}",
                "above",
                0.0,
                opd.path(similarity)[:, at] - sft.path(similarity)[:, at],
            )
            test(
                f"OPD's update ends with a lower stable rank than that of {label}",
                control or "P2, Figure 4",
                "mean stable rank over attention matrices at the end, OPD less "
                f"{label}",
                "below",
                0.0,
                opd.path("stable_rank")[:, -1] - sft.path("stable_rank")[:, -1],
            )
    for name in plain:
        own, random, free = (
            late_accuracy(arms[f"{name}_{how}"]) for how in (OWN, RANDOM, FREE)
        )
        label, control = SFT.get(name, (name.upper(), ""))
        lost = differences(list(free), list(own))
        if name in SFT:
            test(
                f"{label} loses accuracy inside its early directions",
                control or "P2, Figure 6",
                "late accuracy, free less constrained",
                "above",
                0.0,
                lost,
            )
        else:
            test(
                f"{label} keeps its accuracy inside its early directions",
                "P2, Figure 6" if name == "opd" else "ours; P2 has no such run",
                "late accuracy, free less constrained; "
                f"{100 * TOLERANCE_POINTS:g} points may go",
                "below",
                TOLERANCE_POINTS,
                lost,
            )
        found.append(recovery(arms, name, label))
        test(
            f"{label} does better inside its early directions than inside random ones",
            "ours; P2 has no such run",
            "late accuracy, own less random directions",
            "above",
            0.0,
            differences(list(own), list(random)),
        )
    return found


if __name__ == "__main__":
    launch(NAME, run)
