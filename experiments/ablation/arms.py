"""What the arms of the ablation are, and the settings that they share."""

import math
from pathlib import Path
from typing import NamedTuple

import ml_collections

from experiments.common.settings import find_problems, refuse

MASKS = ("none", "own", "teacher", "random", "matched_random")


class Arm(NamedTuple):
    """One row of the table.

    Attributes:
      name: Its name in results and folders.
      optimizer: Its entry in `config.optimizers`.
      learning_rates: Rates to run; the best on the validation split is reported.
      mask: One of `MASKS`, or the path of a mask file: which coordinates are trained.
    """

    name: str
    optimizer: str
    learning_rates: tuple[float, ...]
    mask: str

    def needs_own(self, mask_threshold: float) -> bool:
        """Whether its mask is made of a run of the arm `adamw`.

        By threshold, a random one is too: it has as many coordinates as the own mask.
        """
        return self.mask in ("own", "matched_random") or (
            self.mask == "random" and mask_threshold > 0
        )


def check_settings(config: ml_collections.ConfigDict) -> None:
    """Checks the numbers of a configuration before any work is done.

    Raises:
      ValueError: Lists every setting that is out of range.
    """
    problems = find_problems(config)
    if not 0 < config.mask_density <= 1:
        problems.append(
            f"mask_density is {config.mask_density}; expected above 0, at most 1"
        )
    if not 0 <= config.mask_threshold < math.inf:
        problems.append(
            f"mask_threshold is {config.mask_threshold}; expected 0, or a size above it"
        )
    refuse(problems)


def read_arms(config: ml_collections.ConfigDict) -> list[Arm]:
    """The arms of a configuration: those without a mask, then by kind of mask.

    Raises:
      ValueError: An arm has an unknown optimizer or mask, its optimizer has no learning
        rate, or it asks for the mask of the `adamw` arm where there is none.
    """
    arms = []
    for name, fields in config.arms.items():
        if fields.optimizer not in config.optimizers:
            raise ValueError(
                f"arm {name}: optimizer {fields.optimizer!r} is not described in "
                f"config.optimizers; known: {list(config.optimizers)}"
            )
        rates = config.optimizers[fields.optimizer].learning_rates
        if not rates:
            raise ValueError(f"optimizer {fields.optimizer}: learning_rates is empty")
        if fields.mask not in MASKS and not Path(fields.mask).is_file():
            raise ValueError(
                f"arm {name}: mask {fields.mask!r}; known: {list(MASKS)}, or the path "
                "of a mask file"
            )
        arms.append(Arm(name, fields.optimizer, tuple(map(float, rates)), fields.mask))
    arms.sort(key=lambda arm: (_place(arm.mask), arm.name))
    followers = [arm.name for arm in arms if arm.needs_own(config.mask_threshold)]
    if followers and not any(a.name == "adamw" and a.mask == "none" for a in arms):
        raise ValueError(
            f"arms {followers} train coordinates by the mask of what the arm 'adamw' "
            "moved; there must be such an arm, without a mask"
        )
    return arms


def _place(mask: str) -> int:
    return MASKS.index(mask) if mask in MASKS else len(MASKS)
