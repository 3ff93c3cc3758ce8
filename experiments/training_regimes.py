"""SFT, OPD, RLVR and offline distillation from one anchor: how they move the weights.

Trains each regime on the same task with the same seeds, and measures sparsity,
principal angles, spectral shift, the localisation of the update and its trajectory,
with the papers' numbers beside ours (P2, arXiv 2606.07082, Tables 1 and 6, Figures 2 to
5; P1, arXiv 2606.13657, Table 2). The claims have thresholds fixed beforehand.

    python -m experiments.training_regimes --workdir=runs/regimes

RLVR is GRPO with group-normalised advantages, clipping 0.2/0.28, no KL term, the reward
of `config.reward` (`exact`: the answer, token for token), and groups without contrast
left out and counted. Every regime's loss is a mean over the tokens of a mini-batch,
which is ours: P1's OPD sums over a response's tokens (eq. 9), its GRPO averages each
response (eq. 7).
Deviations from P2: the tiny world's size, float32 masters, rates, no weight decay, and
what configs/training_regimes.py marks as ours. An interrupted run continues when it is
started again.
"""

from pathlib import Path
from typing import Any

import ml_collections

from experiments.common.outcome import Outcome
from experiments.studies.arms import arm_runs, train_arms
from experiments.studies.begin import begin
from experiments.studies.beside import beside_table
from experiments.studies.launch import launch
from experiments.studies.measured import MASK_DENSITY, Measured, measure_runs
from experiments.studies.report import trajectory_plot, write_results
from experiments.studies.study import Start, Study
from experiments.studies.verdict import Side, Verdict, differences
from geomjax import hosts
from geomjax.analysis import plots
from geomjax.typing import Params

NAME = "training_regimes"


def run(config: ml_collections.ConfigDict, workdir: Path) -> dict[str, Any]:
    """Runs all regimes, measures them, and writes results and report."""
    with begin(config, workdir, NAME) as (study, origins):
        return _run(config, study, origins)


def _run(
    config: ml_collections.ConfigDict, study: Study, origins: dict[str, Params]
) -> dict[str, Any]:
    anchors = {name: origins[arm.start] for name, arm in config.arms.items()}
    starts = {name: Start(params) for name, params in anchors.items()}
    outcomes = train_arms(study, arm_runs(config), starts)
    return hosts.on_main(lambda: _conclude(study, anchors, outcomes))


def _conclude(
    study: Study, anchors: dict[str, Params], outcomes: dict[str, list[Outcome]]
) -> dict[str, Any]:
    """Measures the runs and writes all results; in process 0 alone."""
    arms = {
        name: measure_runs(study, anchors[name], runs)
        for name, runs in outcomes.items()
    }
    styles = plots.assign_styles(list(arms))
    return write_results(
        study,
        arms,
        claims(arms),
        "Training regimes: SFT, OPD, RLVR and offline distillation",
        "One task, one anchor, the same seeds: how differently do four ways of "
        "training move the weights? SFT is measured from the base at ten times OPD's "
        "rate, as in arXiv 2606.07082, and once more from the anchor at OPD's rate.",
        {
            "Geometry, with the papers' numbers": [beside_table(arms)],
            "Trajectories": [trajectory_plot(arms, styles)],
        },
    )


def claims(arms: dict[str, Measured]) -> list[Verdict]:
    """P2's and P1's claims on the regimes, of the arms at hand."""
    found: list[Verdict] = []

    def order(claim: str, source: str, statistic: str, more: list, less: list) -> None:
        samples = differences(more, less)
        found.append(Verdict(claim, source, statistic, "above", 0.0, samples))

    sft, opd, rlvr = (arms.get(name) for name in ("sft", "opd", "rlvr"))
    sparsity, angle = "bf16_unchanged_fraction", "principal_angle_max_right_deg"
    shift = "normalized_spectral_shift"
    anchored = arms.get("sft_anchor")
    alike, same = "SFT from OPD's start at its rate", "ours: same start and rate"
    for more, less, first, second, control in (
        (opd, sft, "OPD", "SFT", None),
        (opd, anchored, "OPD", alike, same),
        (rlvr, opd, "RLVR", "OPD", None),
    ):
        if more is None or less is None:
            continue
        order(
            f"{first} leaves more weights unchanged in bfloat16 than {second}",
            control or "P2, Table 1",
            f"share unchanged, {first} less {second}, stored",
            more.value(sparsity),
            less.value(sparsity),
        )
        order(
            f"{second} rotates principal directions further than {first}",
            control or "P2, Figure 2",
            f"mean over matrices of the largest angle, {second} less {first}, degrees",
            less.mean(angle, "master"),
            more.mean(angle, "master"),
        )
        order(
            f"{second} shifts singular values further than {first}",
            control or "P2, Figure 2",
            f"mean spectral shift, {second} less {first}, masters",
            less.mean(shift, "master"),
            more.mean(shift, "master"),
        )
    for name, arm in (("OPD", opd), ("RLVR", rlvr)):
        if arm is not None:
            found += _localisation(name, arm)
    if opd is not None and rlvr is not None:
        order(
            "OPD's update is concentrated in fewer directions than RLVR's",
            "P1, Table 2",
            "median top-16 energy, OPD less RLVR, masters",
            opd.median("top_energy_16", "master"),
            rlvr.median("top_energy_16", "master"),
        )
    offline = arms.get("offline")
    if opd is not None and offline is not None:
        order(
            "Offline distillation moves the weights further than OPD",
            "P1, Table 2",
            "relative norm, offline less OPD, masters",
            offline.value("relative_frobenius", "master"),
            opd.value("relative_frobenius", "master"),
        )
    return found


def _localisation(name: str, arm: Measured) -> list[Verdict]:
    """Where the changed weights lie; `experiments.precision` sets nulls beside it."""
    cases: tuple[tuple[str, str, Side], ...] = (
        (f"{name} avoids principal weights", "principal", "below"),
        (f"{name} prefers weights of small magnitude", "low_magnitude", "above"),
    )
    statistic = (
        f"share of the changed weights on P2's mask of {MASK_DENSITY:.0%}, less "
        "chance, stored; rounding alone prefers small weights, see precision"
    )
    return [
        Verdict(claim, "P2, Figure 3", statistic, side, 0.0, arm.mask_coverage(mask))
        for claim, mask, side in cases
    ]


if __name__ == "__main__":
    launch(NAME, run)
