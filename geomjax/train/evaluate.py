"""Greedy accuracy and divergence from the teacher on held-out prompts."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int32
from transformers import PreTrainedTokenizerFast

from geomjax import hosts
from geomjax.data.answers import decode_completions
from geomjax.data.batches import ImagesOf, PromptBatch, pad_prompts
from geomjax.data.prompts import Example
from geomjax.meshes import Placement
from geomjax.objectives.distill import full_vocabulary
from geomjax.objectives.divergence import reverse_kl
from geomjax.rewards.contract import SILENT, Judgement
from geomjax.rollout.sample import sample
from geomjax.train.step import Sampling, mini_batch, rollout
from geomjax.typing import LanguageModel, Params, prompted

Evaluate = Callable[[Params], dict[str, float]]

Judges = Callable[[Sequence[Example], Sequence[str]], list[Judgement]]
"""Judges completions, each with its example: a `geomjax.rewards.judge.Judge`."""


def _batches(
    token_ids: Sequence[Int32[np.ndarray, "_"]],
    rows: int,
    length: int,
    pad_id: int,
    placement: Placement,
    images_of: ImagesOf | None,
) -> Callable[[], Iterator[PromptBatch]]:
    """Batches of one shape; the last is filled up with copies of the first prompt.

    Their tokens are made once, and their images, which are large, each time.
    """
    count = len(token_ids)
    filled = [*range(count), *[0] * (-count % rows)]
    parts = [filled[i : i + rows] for i in range(0, len(filled), rows)]
    batches = hosts.put(
        [pad_prompts([token_ids[i] for i in part], length, pad_id) for part in parts],
        placement.sharding(),
    )

    def each() -> Iterator[PromptBatch]:
        for batch, part in zip(batches, parts, strict=True):
            images = None if images_of is None else images_of(part)
            placed = hosts.put(images, placement.sharding())
            yield batch._replace(images=placed)

    return each


def _rows(rows: int, placement: Placement) -> int:
    """As many rows, or some more, that a mesh divides."""
    return rows + -rows % placement.parts("batch")


@partial(jax.jit, static_argnames=("model", "settings"))
def _greedy(
    params: Params, batch: PromptBatch, model: LanguageModel, settings: Sampling
) -> Int32[Array, "B S"]:
    """Tokens of greedy completions; one program for all splits and equal models."""
    tokens = sample(
        prompted(model, batch.images),
        params,
        jnp.asarray(batch.tokens),
        jnp.asarray(batch.positions),
        jnp.asarray(batch.segment_ids),
        jax.random.key(0),
        max_new_tokens=settings.max_new_tokens,
        stop_tokens=settings.stop_tokens,
        temperature=settings.temperature,
        pad_token=settings.pad_token,
    ).tokens
    return model.placement.constrain(tokens, None, None)


def make_accuracy(
    model: LanguageModel,
    tokenizer: PreTrainedTokenizerFast,
    token_ids: Sequence[Int32[np.ndarray, "_"]],
    examples: Sequence[Example],
    sampling: Sampling,
    judge: Judges,
    *,
    prompt_length: int,
    batch_size: int,
    images_of: ImagesOf | None = None,
) -> Callable[[Params], np.ndarray]:
    """Scores of greedy completions.

    Args:
      model: The model.
      tokenizer: Its tokenizer.
      token_ids: Encoded prompts.
      examples: The example of each prompt.
      sampling: Stop tokens and lengths; its temperature and count are not used.
      judge: Gives the scores. A completion that was cut off scores 0 unseen; in
        `geomjax.evaluation.summary` that mean is `ended`, not `mean`.
      prompt_length: Padded length in tokens.
      batch_size: Prompts decoded at a time.
      images_of: Reads the images of some prompts; None for prompts without images.

    Returns:
      A function from parameters to `[n]` float32 scores, usually 1 where the answer is
      right; nan where the judgement says nothing about the completion.

    Raises:
      ValueError: There is no prompt, or not one example for each prompt.
    """
    if not token_ids or len(token_ids) != len(examples):
        raise ValueError(
            f"got {len(token_ids)} prompts and {len(examples)} examples; expected one "
            "example for each of at least one prompt"
        )
    rows = _rows(batch_size, model.placement)
    batches = _batches(
        token_ids, rows, prompt_length, sampling.pad_token, model.placement, images_of
    )
    settings = sampling._replace(samples_per_prompt=1, temperature=0.0)

    def accuracy(params: Params) -> np.ndarray:
        tokens = []
        for batch in batches():
            found = _greedy(params, batch, model, settings)
            # Unread, images of many batches would lie on the device at once.
            tokens.append(found if images_of is None else jax.device_get(found))
        drawn = np.concatenate(jax.device_get(tokens))[: len(examples), prompt_length:]
        # One process judges: another's clock might judge otherwise.
        return np.array(hosts.on_main(lambda: scores(drawn)), np.float32)

    def scores(drawn: np.ndarray) -> list[float]:
        texts = decode_completions(drawn, tokenizer, sampling.stop_tokens)
        found = [0.0] * len(examples)
        ended = [i for i, text in enumerate(texts) if text.stopped]
        judgements = judge([examples[i] for i in ended], [texts[i].text for i in ended])
        for i, judgement in zip(ended, judgements, strict=True):
            silent = judgement.status in SILENT
            found[i] = np.nan if silent else float(judgement.score)
        return found

    return accuracy


def make_divergence(
    student: LanguageModel,
    teacher: LanguageModel,
    token_ids: Sequence[Int32[np.ndarray, "_"]],
    sampling: Sampling,
    *,
    prompt_length: int,
    batch_size: int,
    seed: int,
    images_of: ImagesOf | None = None,
) -> Callable[[Params, Params], float]:
    """Whole-vocabulary `KL(student || teacher)` on completions that are sampled anew.

    Less noisy than the training loss, and the same quantity for every objective.

    Args:
      student: The model that samples.
      teacher: The model compared with.
      token_ids: Encoded prompts.
      sampling: How completions are drawn; one is drawn for each prompt.
      prompt_length: Padded length in tokens.
      batch_size: Most prompts completed at a time; the draws depend on it.
      seed: Seed of the draws, which are the same in every evaluation.
      images_of: Reads the images of some prompts; None for prompts without images.

    Returns:
      A function from the parameters of student and teacher to nats a token, the mean
      over the tokens of all completions.
    """
    objective = full_vocabulary(
        student, teacher, reverse_kl, temperature=sampling.temperature
    )
    placement = student.placement
    rows = _rows(min(batch_size, len(token_ids)), placement)
    batches = _batches(
        token_ids, rows, prompt_length, sampling.pad_token, placement, images_of
    )
    once = sampling._replace(samples_per_prompt=1)

    @jax.jit
    def sums(params: Params, teacher_params: Params, prompts: PromptBatch, start):
        """Nats and tokens of the rows that are no filling."""
        key = jax.random.fold_in(jax.random.key(seed), start)
        drawn = rollout(student, params, prompts, key, once)
        batch = mini_batch(drawn, once.max_new_tokens)
        real = start + jnp.arange(rows) < len(token_ids)
        weights = jnp.where(real[:, None], batch.weights, 0)
        loss, _ = objective(params, teacher_params, batch._replace(weights=weights))
        tokens = drawn.completion.sum(dtype=jnp.float32)
        return loss * tokens, weights.sum() * tokens

    def divergence(params: Params, teacher_params: Params) -> float:
        parts = []
        for i, batch in enumerate(batches()):
            found = sums(params, teacher_params, batch, np.int32(i * rows))
            # As in `make_accuracy`.
            parts.append(found if images_of is None else jax.device_get(found))
        nats, tokens = np.asarray(jax.device_get(parts), np.float64).sum(axis=0)
        return float(nats / tokens)

    return divergence
