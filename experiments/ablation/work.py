"""What one training step of distillation computes, for speeds and utilisation."""

from collections.abc import Callable

import numpy as np

from experiments.common.world import World
from geomjax.models.decoder import Decoder
from geomjax.models.flops import forward_flops
from geomjax.train.throughput import Work


def step_work(
    world: World, prompts_per_step: int
) -> Callable[[dict[str, np.ndarray]], Work] | None:
    """Counts a step's work from its metrics.

    The student's forward pass once to sample and once to train, twice as much for the
    gradient, and the teacher's once, on sequences of the mean length: that of the
    training prompts and of the step's completions. Padding is left out.

    Args:
      world: The models and prompts.
      prompts_per_step: Prompts of a step.

    Returns:
      A function from a step's metrics to its work; None for models with images.
    """
    student, teacher = world.student.model, world.teacher.model
    if not (isinstance(student, Decoder) and isinstance(teacher, Decoder)):
        return None
    prompt = float(np.mean([len(ids) for ids in world.train.token_ids]))
    rows = prompts_per_step * world.sampling.samples_per_prompt

    def work(values: dict[str, np.ndarray]) -> Work:
        length = prompt + float(values["completion_tokens"].mean())
        each = 4 * forward_flops(student, length) + forward_flops(teacher, length)
        return Work(tokens=rows * length, flops=rows * each)

    return work
