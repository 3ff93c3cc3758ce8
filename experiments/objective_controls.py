"""Tokens, rollouts and mixtures: what in OPD's signal shapes the update?

Trains with a quarter or half of the tokens (those of the largest gap to the teacher, or
random ones), on the teacher's rollouts, and on mixtures with a verifiable reward, and
follows the geometry of each (P2, arXiv 2606.07082, Figures 7 and 9). P2 explains its
findings by the second moment E[g g^T] of the per-token gradients; here it is measured,
for chosen matrices, on each control's first rollout: how many directions it spreads
over, its noise, and how well its leading directions agree with plain OPD's. P1's
figures of AdamW's state stand beside them for SFT, OPD and RLVR.

    python -m experiments.objective_controls --workdir=runs/controls

All controls but the foreign rollouts run in one compiled program. An interrupted run
continues when it is started again.
"""

from pathlib import Path
from typing import Any

import ml_collections
import numpy as np

from experiments.common.outcome import Outcome
from experiments.studies.arms import train_arms
from experiments.studies.begin import begin
from experiments.studies.launch import launch
from experiments.studies.measured import Measured, measure_runs
from experiments.studies.moments import (
    Moments,
    mean_figure,
    measure_moments,
    moments_section,
    read_matrices,
)
from experiments.studies.report import trajectory_plot, write_results
from experiments.studies.run import Run
from experiments.studies.study import Start, Study
from experiments.studies.verdict import Verdict, differences
from geomjax import hosts
from geomjax.analysis import plots
from geomjax.analysis import report as reports
from geomjax.analysis.report import Cell, Column, Estimate, Table
from geomjax.train.learn import Controls
from geomjax.typing import Params

NAME = "objective_controls"
REFERENCE = "opd"
COSINE, VARIATION = "momentum_gradient_cosine", "root_second_moment_variation"


def run(config: ml_collections.ConfigDict, workdir: Path) -> dict[str, Any]:
    """Runs all controls, measures them, and writes results and report."""
    if REFERENCE not in config.arms:
        raise ValueError(f"there is no arm {REFERENCE!r}; the others are compared with")
    with begin(config, workdir, NAME) as (study, origins):
        return _run(config, study, origins)


def _run(
    config: ml_collections.ConfigDict, study: Study, origins: dict[str, Params]
) -> dict[str, Any]:
    matrices = read_matrices(config, study)
    specs = {name: _runs(config, name) for name in config.arms}
    moments = measure_moments(study, specs, matrices, REFERENCE)
    anchor = origins["anchor"]
    outcomes = train_arms(study, specs, dict.fromkeys(specs, Start(anchor)))
    return hosts.on_main(lambda: _conclude(study, anchor, outcomes, moments))


def _conclude(
    study: Study, anchor: Params, outcomes: dict[str, list[Outcome]], moments: Moments
) -> dict[str, Any]:
    """Measures the runs and writes all results; in process 0 alone."""
    arms = {name: measure_runs(study, anchor, runs) for name, runs in outcomes.items()}
    shown = {name: arm for name, arm in arms.items() if name != "sft"}
    styles = plots.assign_styles(list(shown))
    return write_results(
        study,
        arms,
        claims(arms, moments),
        "Controls of the objective",
        "Which part of the signal of on-policy distillation shapes its update? Tokens "
        "left out, foreign rollouts and mixtures with a reward, after arXiv "
        "2606.07082.",
        {
            "Trajectories": [trajectory_plot(shown, styles)],
            **moments_section(
                "Second moment of the per-token gradients", moments, "OPD"
            ),
            "Optimizer state": [state_plot(arms), state_table(arms)],
        },
        {"moments": moments},
    )


def _runs(config: ml_collections.ConfigDict, name: str) -> list[Run]:
    arm = config.arms[name]
    controls = Controls(float(arm.alpha), float(arm.keep), bool(arm.by_gap))
    controls.check()
    return [
        Run(name, arm.kind, arm.learning_rate, seed, controls=controls)
        for seed in config.seeds
    ]


def _final(arm: Measured, name: str) -> list[float]:
    """The mean over the second half of a run's updates, one a seed."""
    curves = np.stack([run.curve(name, "train") for run in arm.runs])
    return curves[:, curves.shape[1] // 2 :].mean(axis=1).tolist()


def state_table(arms: dict[str, Measured]) -> Table:
    """P1's figures of AdamW's state."""
    columns = [
        Column("arm", align="left"),
        Column("cos(m, g)", spec=".3f"),
        Column("CV of sqrt(v)", spec=".3f"),
    ]
    rows: list[list[Cell]] = [
        [name, *(Estimate.from_samples(_final(arm, n)) for n in (COSINE, VARIATION))]
        for name, arm in arms.items()
    ]
    return Table(
        columns,
        rows,
        "Means over the second half of the updates; the cosine is with the momentum "
        "before the update, 0 for unrelated gradients. P1 (arXiv 2606.13657v2, "
        "appendix A.8) has for OPD a mean cosine of 0.280 and a mean CV of 4.85; arXiv "
        "2602.07729 has cosines of 0.997 for SFT and -0.007 for RL.",
    )


def state_plot(arms: dict[str, Measured]) -> reports.Plot:
    """Both figures along training, for SFT, OPD and RLVR."""
    shown = {name: arms[name] for name in ("sft", "opd", "rlvr") if name in arms}

    def curves(name: str, first: int) -> dict[str, plots.Curve]:
        return {
            label: plots.Curve(
                arm.runs[0].curve("update", "train")[first:],
                np.stack([run.curve(name, "train") for run in arm.runs])[:, first:],
            )
            for label, arm in shown.items()
        }

    return reports.Plot(
        "adamw_state",
        plots.optimizer_state_curves(
            # Before the first update there is no momentum.
            curves(COSINE, 1),
            curves(VARIATION, 0),
            x_label="optimizer update",
        ),
        "Cosine of the gradient and the momentum before it, and variation of the root "
        "second moment.",
    )


def claims(arms: dict[str, Measured], moments: Moments) -> list[Verdict]:
    """What P2 says of its controls, and its mechanism, which it does not measure.

    The mechanism is tested on the controls that differ from OPD: OPD itself would agree
    with OPD by construction. Mixtures of less than a tenth are all but the RLVR that
    they would be compared with. RLVR learns from fewer tokens, as groups without
    contrast are left out, and leading directions of fewer tokens are noisier: that
    lowers its alignment whatever the mechanism. The table of second moments has the
    counts.
    """
    found: list[Verdict] = []

    def above(
        claim: str, source: str, statistic: str, more: list[Any], less: list[Any]
    ) -> None:
        samples = differences(more, less)
        found.append(Verdict(claim, source, statistic, "above", 0.0, samples))

    if "off_policy" in arms:
        above(
            "Training on the teacher's rollouts moves the weights further",
            "P2, Figure 9",
            "relative norm of the masters' update, off-policy less OPD",
            arms["off_policy"].value("relative_frobenius", "master"),
            arms[REFERENCE].value("relative_frobenius", "master"),
        )
    if "rlvr" not in arms:
        return found
    ours = "P2's mechanism; measured by us alone"
    for name in arms:
        left_out = name in (REFERENCE, "rlvr", "sft") or name.startswith("mix_0")
        if left_out or not moments:
            continue
        above(
            f"The leading gradient directions of {name} are closer to OPD's than "
            "those of RLVR are",
            ours,
            "alignment of 16 directions with another rollout of OPD, "
            f"{name} less RLVR, whose tokens are fewer",
            mean_figure(moments, name, "alignment"),
            mean_figure(moments, "rlvr", "alignment"),
        )
    if "sft" in arms:
        above(
            "Momentum follows the gradient more closely in SFT than in RLVR",
            "arXiv 2602.07729",
            "mean cos(m, g) over the second half of the updates, SFT less RLVR",
            _final(arms["sft"], COSINE),
            _final(arms["rlvr"], COSINE),
        )
    return found


if __name__ == "__main__":
    launch(NAME, run)
