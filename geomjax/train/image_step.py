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
    make_update,
    mini_batch,
    rollout,
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
        count = prompts.tokens.shape[0]
        if count % mini_batches:
            raise ValueError(
                f"{count} prompts cannot be split into {mini_batches} mini-batches; "
                "the samples of a prompt belong to one update"
            )
        images = jax.tree.map(
            lambda x: jnp.repeat(x, sampling.samples_per_prompt, axis=0), images
        )
        seeing = student.with_images(images)
        drawn = rollout(seeing, state.params, prompts, key, sampling)

        def body(carry, part):
            drawn, images = part
            models = student.with_images(images), teacher.with_images(images)
            update = make_update(objective(*models), tx, micro_batches=1)
            batch = mini_batch(drawn, sampling.max_new_tokens)
            params, opt_state, metrics = update(
                carry[0], carry[1], teacher_params, batch
            )
            lengths = drawn.completion.sum(axis=-1, dtype=jnp.float32)
            metrics["completion_tokens"] = lengths.mean()
            return (params, opt_state), metrics

        parts = jax.tree.map(
            lambda x: x.reshape(mini_batches, -1, *x.shape[1:]), (drawn, images)
        )
        carry = state.params, state.opt_state
        (params, opt_state), metrics = jax.lax.scan(body, carry, parts)
        return TrainState(state.step + 1, params, opt_state), metrics

    return jax.jit(step, donate_argnums=0)
