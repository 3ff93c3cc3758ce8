"""Student, teacher and prompts of a distillation experiment, loaded and checked."""

from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import ml_collections
from transformers import PreTrainedTokenizerFast

from geomjax.data.encode import EncodedPrompts, encode_prompts
from geomjax.data.prompts import Example, read_prompts
from geomjax.data.same_tokenizer import require_same_tokenizer
from geomjax.data.splits import split_examples
from geomjax.data.tokenizers import load_tokenizer, stop_token_ids, tokenizer_size
from geomjax.models.load import Loaded, checkpoint_directory, load
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
      train: Prompts to sample from.
      validation: Prompts to choose by.
      test: Prompts to report on.
      sampling: How rollouts are drawn.
      prompt_length: Padded length of every prompt, in tokens.
    """

    student_dir: Path
    student: Loaded
    teacher: Loaded
    tokenizer: PreTrainedTokenizerFast
    train: EncodedPrompts
    validation: EncodedPrompts
    test: EncodedPrompts
    sampling: Sampling
    prompt_length: int


def locate(config: ml_collections.ConfigDict) -> tuple[Path, Path, Path]:
    """Paths of student, teacher and prompts; an empty one is the tiny world's.

    A checkpoint that is named by its repository on the hub is downloaded.
    """
    return (
        checkpoint_directory(config.student or TINY_WORLD / "anchor"),
        checkpoint_directory(config.teacher or TINY_WORLD / "teacher"),
        Path(config.prompts or TINY_WORLD / "prompts.jsonl"),
    )


def load_world(config: ml_collections.ConfigDict) -> World:
    """Loads and checks everything before any work is done.

    Args:
      config: Fields `student`, `teacher`, `prompts`, `accuracy`,
        `validation_fraction`, `test_fraction`, `max_prompt_tokens`, `overlong`,
        `max_new_tokens`, `samples_per_prompt`, `temperature` and `compute_dtype`.

    Returns:
      The world.

    Raises:
      ValueError: A checkpoint, the tokenizers or the prompts do not fit; says how.
    """
    student_dir, teacher_dir, prompts_path = locate(config)
    tokenizer = load_tokenizer(student_dir)
    require_same_tokenizer(tokenizer, load_tokenizer(teacher_dir))
    size = tokenizer_size(tokenizer)
    dtype = jnp.dtype(config.compute_dtype)
    student = load(student_dir, vocab_size=size, dtype=dtype)
    teacher = load(teacher_dir, vocab_size=size, dtype=dtype)
    for loaded, name in ((student, "student"), (teacher, "teacher")):
        context = loaded.model.config.text.max_position_embeddings
        asked = config.max_prompt_tokens + config.max_new_tokens
        if asked > context:
            raise ValueError(
                f"max_prompt_tokens + max_new_tokens is {asked}, but the {name}'s "
                f"context is {context} tokens"
            )
    examples = read_prompts(prompts_path, require_answers=config.accuracy)
    splits = split_examples(
        examples, validation=config.validation_fraction, test=config.test_fraction
    )

    if not splits.validation:
        raise ValueError(
            "validation_fraction is 0; the divergence is measured on this split, and "
            "learning rates are chosen by it"
        )
    if config.accuracy and not splits.test:
        raise ValueError("test_fraction is 0, but accuracy is asked for")

    def encode(part: list[Example]) -> EncodedPrompts:
        if not part:
            return EncodedPrompts([], [], 0)
        limit = config.max_prompt_tokens
        return encode_prompts(part, tokenizer, limit, overlong=config.overlong)

    train, validation, test = map(encode, splits)
    stop = stop_token_ids(tokenizer, student_dir)
    return World(
        student_dir=student_dir,
        student=student,
        teacher=teacher,
        tokenizer=tokenizer,
        train=train,
        validation=validation,
        test=test,
        sampling=Sampling(
            samples_per_prompt=config.samples_per_prompt,
            max_new_tokens=config.max_new_tokens,
            temperature=config.temperature,
            stop_tokens=stop,
            pad_token=stop[0]
            if tokenizer.pad_token_id is None
            else tokenizer.pad_token_id,
        ),
        prompt_length=max(
            len(ids) for part in (train, validation, test) for ids in part.token_ids
        ),
    )
