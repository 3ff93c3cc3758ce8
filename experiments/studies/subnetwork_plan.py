"""The runs of the study of subnetworks, and the checks of its settings."""

from pathlib import Path
from typing import NamedTuple

import ml_collections

from experiments.common.settings import refuse
from experiments.studies.masks import RULES

FULL = ("opd", "rlvr", "opd_other_teacher")
"""The full runs that masks are made of; only the first must be among the arms."""

NEEDS = {"rlvr": "rlvr", "other_teacher": "opd_other_teacher"}
"""The full run that a kind of mask is made of, where it is not OPD's."""


class Masked(NamedTuple):
    """A kind of masked run.

    Attributes:
      arm: Its name in results and folders.
      full: The full run that it is to match, one of `FULL`.
      rule: The kind of its mask, or the path of a mask file.
      density: Share of the coordinates; None for a mask file's own.
    """

    arm: str
    full: str
    rule: str
    density: float | None


def check(config: ml_collections.ConfigDict) -> None:
    """Raises ValueError with every setting of masks that is out of range."""
    problems = [
        f"arm {name!r}; known: {', '.join(FULL)}"
        for name in config.arms
        if name not in FULL
    ]
    if "opd" not in config.arms:
        problems.append("there is no arm opd; the others are compared with it")
    densities = (config.density, *config.curve_densities)
    problems += [
        f"density {density}: expected above 0 and at most 1"
        for density in densities
        if not 0 < density <= 1
    ]
    if len(set(densities)) < len(densities):
        problems.append(f"densities are {densities}; expected each once")
    for rule in config.masks:
        if rule not in RULES and not Path(rule).is_file():
            problems.append(
                f"mask {rule!r}; known: {', '.join(RULES)}, or the path of a mask file"
            )
    problems += [
        f"curve_masks: {rule} is no kind among masks"
        for rule in config.curve_masks
        if rule not in config.masks or rule not in RULES
    ]
    problems += [
        f"mask {mask}: there is no arm {arm} to make it of"
        for mask, arm in NEEDS.items()
        if mask in config.masks and arm not in config.arms
    ]
    arms = [m.arm for m in plan(config)]
    problems += [
        f"masks: {arm} occurs more than once; files need names of their own"
        for arm in sorted({arm for arm in arms if arms.count(arm) > 1})
    ]
    if "other_seed" in config.masks and len(config.seeds) < 2:
        problems.append("mask other_seed: expected at least two seeds")
    refuse(problems)


def plan(config: ml_collections.ConfigDict) -> list[Masked]:
    """The masked runs of a configuration."""
    runs = []
    for rule in config.masks:
        known = rule in RULES
        densities: tuple[float | None, ...] = (config.density,) if known else (None,)
        if known and rule in config.curve_masks:
            densities = tuple(sorted((config.density, *config.curve_densities)))
        for density in densities:
            name = f"{rule}_{density:g}" if known else f"file_{Path(rule).stem}"
            runs.append(Masked(name, "opd", rule, density))
    if "own" in config.masks and "rlvr" in config.arms:
        name = f"rlvr_own_{config.density:g}"
        runs.append(Masked(name, "rlvr", "own", config.density))
    return runs
