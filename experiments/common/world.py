"""Student, teacher and prompts of a distillation experiment, loaded and checked."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
from transformers import PreTrainedTokenizerFast

from experiments.common.prompts import Prompts, has_images, load_prompts
from geomjax import hosts
from geomjax.data.batches import WHOLE, ImagesOf, PromptBatch, make_batches
from geomjax.data.encode import EncodedPrompts
from geomjax.data.image_prompts import read_images
from geomjax.data.same_tokenizer import require_same_tokenizer
from geomjax.data.spread import Spread, spread
from geomjax.data.tokenizers import load_tokenizer, stop_token_ids, tokenizer_size
from geomjax.meshes import ONE_DEVICE, Placement, mesh_from_string
from geomjax.models.config import ModelConfig
from geomjax.models.load import Loaded, checkpoint_directory, load
from geomjax.models.qwen2_5_vl_config import Qwen25VLConfig
from geomjax.rewards.judge import Judge
from geomjax.train.step import Sampling

TINY_WORLD = Path(__file__).parent.parent / "artifacts" / "tiny_world"
"""The bundled checkpoints and prompts."""


class World(NamedTuple):
    """What a distillation run starts from.

    Attributes:
      student_dir: Checkpoint folder of the student.
      student: The student before training, the anchor.
      teacher: The teacher.
      tokenizer: The one they share.
      prompts: Prompts to sample from, to choose by and to report on.
      sampling: How rollouts are drawn.
      prompt_length: Padded length of every prompt, in tokens.
    """

    student_dir: Path
    student: Loaded
    teacher: Loaded
    tokenizer: PreTrainedTokenizerFast
    prompts: Prompts
    sampling: Sampling
    prompt_length: int

    @property
    def train(self) -> EncodedPrompts:
        """Prompts to sample from."""
        return self.prompts.train

    @property
    def validation(self) -> EncodedPrompts:
        """Prompts to choose by."""
        return self.prompts.validation

    @property
    def test(self) -> EncodedPrompts:
        """Prompts to report on."""
        return self.prompts.test

    def images_of(self, split: str) -> ImagesOf | None:
        """Reads the images of a split's prompts; None where they have none."""
        part: EncodedPrompts = getattr(self.prompts, split)
        if not has_images(part.examples):
            return None
        return read_images(part, self.student.image_reading, self.prompt_length)

    def train_batches(
        self, size: int, seed: int
    ) -> tuple[Callable[[int], PromptBatch], Spread]:
        """Batches of training prompts, over the devices of all processes.

        Args:
          size: Prompts in a batch.
          seed: Of their order.

        Returns:
          From a step to the rows that this process makes, and how a batch lies.
        """
        lies = spread(size, self.student.model.placement)
        images_of = self.images_of("train")
        batch_at = make_batches(
            self.train.token_ids,
            batch_size=size,
            seed=seed,
            pad_id=self.sampling.pad_token,
            length=self.prompt_length,
            # Of images every process needs all: their padded size is the batch's.
            shard=lies.shard if images_of is None else WHOLE,
            images_of=images_of,
        )
        return batch_at, lies


def locate(config: ml_collections.ConfigDict) -> tuple[Path, Path, str]:
    """Student, teacher and prompts; an empty one is the tiny world's.

    A checkpoint that is named by its repository on the hub is downloaded.
    """
    return (
        checkpoint_directory(config.student or TINY_WORLD / "anchor"),
        checkpoint_directory(config.teacher or TINY_WORLD / "teacher"),
        config.prompts or str(TINY_WORLD / "prompts.jsonl"),
    )


def placement(config: ml_collections.ConfigDict) -> Placement:
    """Where models and batches lie: over `config.mesh`, or on one device.

    Raises:
      ValueError: There are several processes and no mesh, or one that cannot be read or
        is of another number of devices.
    """
    if config.mesh:
        return Placement(mesh_from_string(config.mesh))
    if hosts.count() > 1:
        raise ValueError(
            f"{hosts.count()} processes train over one mesh of all their devices; give "
            f"it, such as --config.mesh=data={jax.device_count()}"
        )
    return ONE_DEVICE


def load_world(config: ml_collections.ConfigDict, judge: Judge | None = None) -> World:
    """Loads and checks everything before any work is done.

    Args:
      config: Fields `student`, `teacher`, `prompts`, those that `load_prompts` takes,
        `max_new_tokens`, `samples_per_prompt`, `temperature`, `compute_dtype` and
        `mesh`.
      judge: Finds prompts whose answers cannot be read, which are set aside.

    Returns:
      The world.

    Raises:
      ValueError: A checkpoint, the tokenizers or the prompts do not fit; says how.
    """
    place = placement(config)
    student_dir, teacher_dir, prompts_source = locate(config)
    tokenizer = load_tokenizer(student_dir)
    require_same_tokenizer(tokenizer, load_tokenizer(teacher_dir))
    size = tokenizer_size(tokenizer)
    dtype = jnp.dtype(config.compute_dtype)
    student = load(student_dir, vocab_size=size, dtype=dtype, placement=place)
    teacher = load(teacher_dir, vocab_size=size, dtype=dtype, placement=place)
    for loaded, name in ((student, "student"), (teacher, "teacher")):
        context = loaded.model.config.text.max_position_embeddings
        asked = config.max_prompt_tokens + config.max_new_tokens
        if asked > context:
            raise ValueError(
                f"max_prompt_tokens + max_new_tokens is {asked}, but the {name}'s "
                f"context is {context} tokens"
            )
    prompts = load_prompts(config, prompts_source, tokenizer, student, judge)
    parts = prompts.train, prompts.validation, prompts.test
    if any(has_images(part.examples) for part in parts):
        _require_same_sight(student, teacher)
    stop = stop_token_ids(tokenizer, student_dir)
    return World(
        student_dir=student_dir,
        student=student,
        teacher=teacher,
        tokenizer=tokenizer,
        prompts=prompts,
        sampling=Sampling(
            samples_per_prompt=config.samples_per_prompt,
            max_new_tokens=config.max_new_tokens,
            temperature=config.temperature,
            stop_tokens=stop,
            pad_token=stop[0]
            if tokenizer.pad_token_id is None
            else tokenizer.pad_token_id,
        ),
        prompt_length=max(len(ids) for part in parts for ids in part.token_ids),
    )


def _require_same_sight(student: Loaded, teacher: Loaded) -> None:
    """Raises ValueError unless the teacher takes images as the student does."""
    ours, theirs = (_sight(loaded.model.config) for loaded in (student, teacher))
    if ours != theirs:
        raise ValueError(
            "prompts with images: student and teacher take images differently, "
            f"{ours} and {theirs}"
        )


def _sight(config: ModelConfig) -> str:
    """What decides how images become patches, placeholders and places."""
    if not isinstance(config, Qwen25VLConfig):
        return f"{config.architecture}: none"
    vision = config.vision
    return (
        f"{config.architecture}: image token {config.image_token}, {vision.window}, "
        f"{vision.patch_values} values a patch"
    )
