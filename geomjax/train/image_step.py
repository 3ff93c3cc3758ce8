"""A training step of distillation on prompts with images."""

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import optax

from geomjax.data.batches import PromptBatch
from geomjax.objectives.base import Objective
from geomjax.train.step import (
    Sampling,
    Step,
    TrainState,
    check_split,
    make_update,
    rollout,
    split_rows,
    update_on,
)
from geomjax.typing import LanguageModel, Params


@runtime_checkable
class SeeingModel(Protocol):
    """A model that becomes a `LanguageModel` of prompts once it has their images."""

    def with_images(self, images: Any) -> LanguageModel:
        """The model of these prompts; `images` is a pytree with the rows first."""


def make_image_distill_step(
    student: SeeingModel,
    teacher: SeeingModel,
    objective: Callable[[LanguageModel, LanguageModel], Objective],
    tx: optax.GradientTransformation,
    sampling: Sampling,
    *,
    mini_batches: int,
) -> Step:
    """As `geomjax.train.step.make_distill_step`, on prompts with images.

    `step(state, teacher_params, prompts, images, key)`; the rows of `images` are those
    of `prompts`. The images of a prompt are read again in each update, so that the
    vision tower is trained too.

    Args:
      student: The model that samples and is trained.
      teacher: The model it learns from.
      objective: From student and teacher, with their images, to the objective.
      tx: Any optax transform.
      sampling: How rollouts are drawn.
      mini_batches: Optimizer updates a rollout.

    Returns:
      The step, jitted; the state is donated.
    """

    def step(
        state: TrainState, teacher_params: Params, prompts: PromptBatch, images, key
    ):
        check_split(prompts, mini_batches)
        images = jax.tree.map(
            lambda x: jnp.repeat(x, sampling.samples_per_prompt, axis=0), images
        )
        seeing = student.with_images(images)
        drawn = rollout(seeing, state.params, prompts, key, sampling)

        def body(carry, part):
            drawn, images = part
            models = student.with_images(images), teacher.with_images(images)
            update = make_update(objective(*models), tx, micro_batches=1)
            last = sampling.max_new_tokens
            return update_on(update, carry, teacher_params, drawn, last)

        parts = split_rows((drawn, images), mini_batches)
        (params, opt_state), metrics = jax.lax.scan(
            body, (state.params, state.opt_state), parts
        )
        return TrainState(state.step + 1, params, opt_state), metrics

    return jax.jit(step, donate_argnums=0)
