"""Sampled token, whole vocabulary or top-k: which form of the distillation loss?

Distils with each form of the loss on the student's own sequences, at one rate: the
sampled token (P1, arXiv 2606.13657, eq. 9), forward and reverse KL and Jensen-Shannon
over the whole vocabulary (eq. 1), and the k most likely tokens of student or teacher,
renormalised or with all others as one bucket; and self-distillation (OPSD), in which
the teacher is the model before training, reading the answer in front of the prompt.
Measures accuracy, the geometry of the update, and the noise of each form's gradients on
equally many sampled tokens, beside what a token costs in each form.

    python -m experiments.loss_forms --workdir=runs/forms

An interrupted run continues when it is started again.
"""

import math
from pathlib import Path
from typing import Any

import ml_collections

from experiments.common.outcome import Outcome
from experiments.studies.arms import train_arms
from experiments.studies.begin import begin
from experiments.studies.beside import beside_table
from experiments.studies.costs import cost_table, measure_costs
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
from geomjax.typing import Params

NAME = "loss_forms"
SAMPLED, WHOLE, SELF = "sampled_token", "reverse_kl", "opsd"
TOLERANCE = 0.02
"""Accuracy within which two forms count as equally good, if more was gained."""
SAME_LOSS = "jsd"
"""What self-distillation is but for its teacher."""


def run(config: ml_collections.ConfigDict, workdir: Path) -> dict[str, Any]:
    """Runs all forms, measures them, and writes results and report."""
    missing = [name for name in (SAMPLED, WHOLE) if name not in config.arms]
    if missing:
        raise ValueError(f"there are no arms {missing}; the others are compared with")
    with begin(config, workdir, NAME) as (study, origins):
        return _run(config, study, origins["anchor"])


def _run(
    config: ml_collections.ConfigDict, study: Study, anchor: Params
) -> dict[str, Any]:
    specs = {
        name: [Run(name, arm.kind, arm.learning_rate, seed) for seed in config.seeds]
        for name, arm in config.arms.items()
    }
    for name in specs:
        study.loss(config.arms[name].kind)  # Refuses a bad k before any work is done.
    matrices = read_matrices(config, study)
    moments = measure_moments(study, specs, matrices, WHOLE)
    outcomes = train_arms(study, specs, dict.fromkeys(specs, Start(anchor)))
    return hosts.on_main(lambda: _conclude(study, anchor, outcomes, moments))


def _conclude(
    study: Study, anchor: Params, outcomes: dict[str, list[Outcome]], moments: Moments
) -> dict[str, Any]:
    """Measures the runs and writes all results; in process 0 alone."""
    arms = {name: measure_runs(study, anchor, runs) for name, runs in outcomes.items()}
    styles = plots.assign_styles(list(arms))
    noise = moments_section("Noise of the gradients", moments, "the whole reverse KL")
    costs: dict[str, float] = {}
    if moments:
        kinds = {name: arm.kind for name, arm in study.config.arms.items()}
        costs = measure_costs(study, kinds)
        noise["Noise at equal cost"] = [cost_table(moments, costs, WHOLE)]
    return write_results(
        study,
        arms,
        claims(arms, moments),
        "Forms of the distillation loss",
        "The same teacher, sequences and rate: does it matter which form the loss of "
        "on-policy distillation has?",
        {
            **noise,
            "Geometry, with the papers' numbers": [beside_table(arms)],
            "Trajectories": [trajectory_plot(arms, styles)],
        },
        {"moments": moments, "flops_per_token": costs},
    )


def claims(arms: dict[str, Measured], moments: Moments) -> list[Verdict]:
    """That one token is an unbiased but noisy estimate, and that few tokens suffice."""

    def log_noise(name: str) -> list[float | None]:
        found = mean_figure(moments, name, "noise_to_signal")
        # Of a single token there is no noise, and of 0 no logarithm.
        return [math.log10(x) if x is not None and x > 0 else None for x in found]

    sampled, found = arms[SAMPLED].gain(), []
    if moments:
        found.append(
            Verdict(
                "The sampled token's gradient is noisier than the whole vocabulary's",
                "P1, section 2.1: one sample estimates the sum over the vocabulary",
                "log10 of noise to signal per token, sampled token less reverse KL",
                "above",
                0.0,
                differences(log_noise(SAMPLED), log_noise(WHOLE)),
            )
        )
    for name in arms:
        if name.startswith("top_reverse"):
            found.append(
                Verdict(
                    f"The sampled token does as well as {name}",
                    "arXiv 2604.13016: sampled tokens do as well as top k",
                    f"gain in accuracy, {name} less sampled token; "
                    f"{100 * TOLERANCE:g} points may be lost, of a gain above that",
                    "below",
                    TOLERANCE,
                    _lost(list(arms[name].gain()), list(sampled)),
                )
            )
    if SELF in arms:
        found += _self_claims(arms[SAMPLED], arms[SELF])
        if SAME_LOSS in arms:
            found += _teacher_claims(arms[SAME_LOSS], arms[SELF])
    return found


def _lost(more: list[float], less: list[float]) -> tuple[float | None, ...]:
    """What the second is short of; None where the first gained within the tolerance.

    What never trained would be within it too.
    """
    return tuple(
        a - b if a > TOLERANCE else None for a, b in zip(more, less, strict=True)
    )


def _teacher_claims(jsd: Measured, opsd: Measured) -> list[Verdict]:
    """The same of arms that differ in the teacher alone, not in the loss."""
    unchanged, norm = "unchanged_atol_1e-05", "relative_frobenius"
    source = f"ours: both have the loss of the arm {SAME_LOSS}"
    return [
        Verdict(
            "With the same loss, self-distillation leaves more weights unchanged than "
            "a stronger teacher does",
            source,
            f"share within 1e-5, OPSD less {SAME_LOSS}, stored",
            "above",
            0.0,
            differences(opsd.value(unchanged), jsd.value(unchanged)),
        ),
        Verdict(
            "With the same loss, self-distillation moves the weights less than a "
            "stronger teacher does",
            source,
            f"relative norm of the masters' update, OPSD less {SAME_LOSS}",
            "below",
            0.0,
            differences(opsd.value(norm, "master"), jsd.value(norm, "master")),
        ),
    ]


def _self_claims(opd: Measured, opsd: Measured) -> list[Verdict]:
    """P1's pair of self-distillation is the sparsest of its pairs, and moved least.

    Its OPD and self-distillation differ in the loss as well as in the teacher.
    """
    unchanged, norm = "unchanged_atol_1e-05", "relative_frobenius"
    return [
        Verdict(
            "Self-distillation leaves more weights unchanged than OPD",
            "P1, Table 2",
            "share within 1e-5, OPSD less sampled token, stored",
            "above",
            0.0,
            differences(opsd.value(unchanged), opd.value(unchanged)),
        ),
        Verdict(
            "Self-distillation moves the weights less than OPD",
            "P1, Table 2",
            "relative norm of the masters' update, OPSD less sampled token",
            "below",
            0.0,
            differences(opsd.value(norm, "master"), opd.value(norm, "master")),
        ),
        Verdict(
            "A model learns from itself reading the answer",
            "OPSD, P1's Table 7; P1 prints no accuracy of it",
            "gain in accuracy of self-distillation",
            "above",
            0.0,
            tuple(opsd.gain()),
        ),
    ]


if __name__ == "__main__":
    launch(NAME, run)
