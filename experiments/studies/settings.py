"""The checks of a study's configuration, before any work is done."""

import math
from pathlib import Path

import ml_collections

from experiments.common.settings import find_problems, refuse
from experiments.common.world import TINY_WORLD, placement
from experiments.studies.forms import is_form
from experiments.studies.run import FLOAT32, KINDS, STORED
from experiments.studies.study import snapshot_steps
from geomjax.models.load import checkpoint_directory
from geomjax.objectives.surrogate import Clip

STARTS = ("anchor", "base")


def check_settings(config: ml_collections.ConfigDict) -> None:
    """Raises ValueError with every setting that is out of range."""
    problems = find_problems(config)
    if config.samples_per_prompt == 1:
        problems.append(
            "samples_per_prompt is 1; GRPO compares the completions of a prompt"
        )
    if not config.accuracy:
        problems.append("accuracy is False; rewards and claims need answers")
    for check in (
        Clip(*config.ratio_clip).check,
        lambda: snapshot_steps(config),
        lambda: placement(config),
    ):
        try:
            check()
        except ValueError as error:
            problems.append(str(error))
    for name, arm in config.get("arms", {}).items():
        problems += [f"arm {name}: {problem}" for problem in _arm_problems(arm)]
    refuse(problems)


def _arm_problems(arm: ml_collections.ConfigDict) -> list[str]:
    problems = []
    if arm.kind not in KINDS and not is_form(arm.kind):
        problems.append(f"kind {arm.kind!r}; known: {', '.join(KINDS)}")
    if arm.get("start", "anchor") not in STARTS:
        problems.append(f"start {arm.start!r}; known: {', '.join(STARTS)}")
    if arm.get("stored", FLOAT32) not in STORED:
        problems.append(f"stored {arm.stored!r}; known: {', '.join(STORED)}")
    if not 0 < arm.learning_rate < math.inf:
        problems.append(
            f"learning_rate is {arm.learning_rate}; expected a number above 0"
        )
    return problems


def base_folder(config: ml_collections.ConfigDict) -> Path:
    """Checkpoint folder of the base; an empty one is the tiny world's.

    A base that is named by its repository on the hub is downloaded.

    Raises:
      ValueError: No such folder, and no such repository or no access to it.
    """
    return checkpoint_directory(config.base or TINY_WORLD / "base")
