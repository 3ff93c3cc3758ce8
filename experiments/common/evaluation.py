"""What is measured of a model along training: accuracy, and distance to the teacher."""

import math
from collections.abc import Callable

import ml_collections
import numpy as np

from experiments.common.world import World
from geomjax.rewards.judge import Judge
from geomjax.train.evaluate import make_accuracy, make_divergence
from geomjax.typing import LanguageModel, Params


def make_split_accuracy(
    config: ml_collections.ConfigDict,
    world: World,
    split: str,
    model: LanguageModel,
    judge: Judge,
) -> Callable[[Params], np.ndarray]:
    """Greedy scores on a split, from parameters to one value a prompt."""
    part = getattr(world, split)
    return make_accuracy(
        model,
        world.tokenizer,
        part.token_ids,
        part.examples,
        world.sampling,
        judge,
        prompt_length=world.prompt_length,
        batch_size=config.evaluation_batch,
        images_of=world.images_of(split),
    )


def mean_score(scores: np.ndarray) -> float:
    """Mean of the scores that say something; nan where none does."""
    spoken = scores[~np.isnan(scores)]
    return float(spoken.mean()) if spoken.size else math.nan


def make_evaluate(
    config: ml_collections.ConfigDict, world: World, judge: Judge
) -> Callable[[Params], dict[str, float]]:
    """From a student's parameters to its scalars.

    `validation_reverse_kl`, and `validation_accuracy` and `test_accuracy` where the
    configuration asks for accuracy.

    Args:
      config: Fields `evaluation_batch` and `accuracy`.
      world: Student, teacher and prompts.
      judge: Gives the scores.
    """
    teacher_params = world.teacher.params
    divergence_on = make_divergence(
        world.student.model,
        world.teacher.model,
        world.validation.token_ids,
        world.sampling,
        prompt_length=world.prompt_length,
        batch_size=config.evaluation_batch,
        seed=0,
        images_of=world.images_of("validation"),
    )
    accuracies = {}
    if config.accuracy:
        accuracies = {
            f"{split}_accuracy": make_split_accuracy(
                config, world, split, world.student.model, judge
            )
            for split in ("validation", "test")
        }

    def evaluate(params: Params) -> dict[str, float]:
        divergence = divergence_on(params, teacher_params)
        values = {name: mean_score(f(params)) for name, f in accuracies.items()}
        return values | {"validation_reverse_kl": float(divergence)}

    return evaluate
