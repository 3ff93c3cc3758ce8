"""P1's claims on optimizers and subnetworks, computed from the runs.

The statistic of every claim is the late accuracy on the test split, the mean of a run's
last five evaluations. Thresholds were fixed before any run:

- a claim of order (A above B) holds if the 95 % interval of the mean difference over
  seeds, paired by seed, lies above zero;
- "near full" holds if the 95 % interval of the share of the full run's gain over the
  start, seed by seed, lies at or above 80 %. (First the mean gain alone was compared;
  the interval asks for more.)

A claim does not hold if the interval lies on the other side. One that holds the
threshold decides nothing: these seeds do not tell the arms apart.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from geomjax.analysis.report import Claim, Estimate

RECOVERED = 0.8
"""Share of the full run's gain from which on a mask counts as near full."""


class ArmAccuracy(NamedTuple):
    """Test accuracy of one arm: at the start, and late, `[S]` over seeds."""

    start: float
    late: np.ndarray


def above(name: str, better: ArmAccuracy, worse: ArmAccuracy) -> Claim:
    """Whether one arm ends above another, by seed-paired differences."""
    differences = (better.late - worse.late).tolist()
    if len(differences) < 2:
        return Claim(
            name,
            None,
            f"difference {100 * differences[0]:.2f} points with one seed: no interval",
        )
    estimate = Estimate.from_samples(differences)
    mean, half = estimate.mean, estimate.half_width or 0.0
    listed = ", ".join(f"{100 * d:.2f}" for d in differences)
    evidence = (
        f"difference {100 * mean:.2f} ± {100 * half:.2f} points (95 % interval over "
        f"{len(differences)} seeds: {listed}); threshold: the interval above 0"
    )
    if abs(mean) <= half:
        evidence += "; it holds 0, so these seeds do not tell the two apart"
        return Claim(name, None, evidence)
    return Claim(name, bool(mean > 0), evidence)


def recovers(name: str, part: ArmAccuracy, full: ArmAccuracy) -> Claim:
    """Whether a masked arm keeps most of the full run's gain.

    Undecided with one seed, and where a seed's full run gained nothing.
    """
    gain, full_gain = part.late.mean() - part.start, full.late.mean() - full.start
    gains = f"gain {100 * gain:.2f} points, the full run's {100 * full_gain:.2f}"
    threshold = f"threshold: {RECOVERED:.0%} of the full gain"
    if full_gain <= 0:
        return Claim(name, None, f"{gains}: there is no gain to recover; {threshold}")
    share = gain / full_gain
    evidence = f"{gains}: {share:.0%} recovered"
    full_gains = full.late - full.start
    if len(full_gains) < 2:
        evidence += " with one seed: no interval"
        return Claim(name, None, f"{evidence}; {threshold}")
    if not (full_gains > 0).all():
        evidence += ", but not every seed's full run gained"
        return Claim(name, None, f"{evidence}; {threshold}")
    by_seed = Estimate.from_samples(((part.late - part.start) / full_gains).tolist())
    mean, half = by_seed.mean, by_seed.half_width or 0.0
    evidence += f" (seed by seed {mean:.0%} ± {half:.0%}, 95 % interval); {threshold}"
    if mean - half < RECOVERED <= mean + half:
        evidence += "; the interval holds it, so these seeds do not decide"
        return Claim(name, None, evidence)
    return Claim(name, bool(mean > RECOVERED), evidence)


def compute(accuracies: Mapping[str, ArmAccuracy]) -> list[Claim]:
    """The claims that the arms at hand allow."""
    claims = []

    def have(*names: str) -> bool:
        return all(name in accuracies for name in names)

    if have("adamw", "sgd"):
        claims.append(
            above("AdamW ends above SGD", accuracies["adamw"], accuracies["sgd"])
        )
    if have("adamw", "adamw_opd_mask"):
        claims.append(
            recovers(
                "Training only the run's own subnetwork nearly matches full training",
                accuracies["adamw_opd_mask"],
                accuracies["adamw"],
            )
        )
    for control, label in (
        ("adamw_random_mask", "a random mask"),
        ("adamw_matched_random_mask", "a random mask of equal density per tensor"),
    ):
        if have("adamw_opd_mask", control):
            claims.append(
                above(
                    f"The own mask ends above {label}",
                    accuracies["adamw_opd_mask"],
                    accuracies[control],
                )
            )
    return claims
