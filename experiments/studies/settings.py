"""The checks of a study's configuration, before any work is done."""

from pathlib import Path

import ml_collections

from experiments.ablation.arms import COUNTS
from experiments.common.world import TINY_WORLD
from experiments.studies.forms import is_form
from experiments.studies.run import KINDS
from experiments.studies.study import snapshot_steps
from geomjax.objectives.surrogate import Clip


def check_settings(config: ml_collections.ConfigDict) -> None:
    """Raises ValueError with every setting that is out of range."""
    problems = [
        f"{name} is {config[name]!r}; expected a whole number above 0"
        for name in COUNTS
        if type(config[name]) is not int or config[name] < 1
    ]
    if not problems and config.prompts_per_step % config.mini_batches:
        problems.append(
            f"{config.prompts_per_step} prompts_per_step cannot be split into "
            f"{config.mini_batches} mini_batches; the samples of a prompt belong to "
            "one update"
        )
    if config.samples_per_prompt == 1:
        problems.append(
            "samples_per_prompt is 1; GRPO compares the completions of a prompt"
        )
    seeds = tuple(config.seeds)
    if not seeds or len(set(seeds)) < len(seeds):
        problems.append(f"seeds are {seeds}; expected at least one, each once")
    if not 0 < config.temperature < float("inf"):
        problems.append(f"temperature is {config.temperature}; expected above 0")
    if config.mesh:
        problems.append(f"mesh is {config.mesh!r}; studies run on one device")
    if not config.accuracy:
        problems.append("accuracy is False; rewards and claims need answers")
    for check in (Clip(*config.ratio_clip).check, lambda: snapshot_steps(config)):
        try:
            check()
        except ValueError as error:
            problems.append(str(error))
    problems += [
        f"arm {name}: kind {arm.kind!r}; known: {', '.join(KINDS)}"
        for name, arm in config.get("arms", {}).items()
        if arm.kind not in KINDS and not is_form(arm.kind)
    ]
    if problems:
        raise ValueError("the configuration:\n  " + "\n  ".join(problems))


def base_folder(config: ml_collections.ConfigDict) -> Path:
    """Checkpoint folder of the base; an empty one is the tiny world's."""
    return Path(config.base or TINY_WORLD / "base")
