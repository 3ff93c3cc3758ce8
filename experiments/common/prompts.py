"""Prompts of an experiment: read, checked, split and encoded as its config says."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import ml_collections
from transformers import PreTrainedTokenizerFast

from geomjax import hosts
from geomjax.data.adapters import WORDING
from geomjax.data.chat import as_conversations, thinking_settings
from geomjax.data.encode import EncodedPrompts, encode_prompts
from geomjax.data.image_prompts import encode_image_prompts
from geomjax.data.overlap import find_duplicates, find_overlap, fingerprint, without
from geomjax.data.prompts import Example
from geomjax.data.sources import Columns, read_source
from geomjax.data.splits import split_examples
from geomjax.models.load import Loaded
from geomjax.rewards.judge import Judge

UNUSABLE = "unusable_prompts.jsonl"
"""In a run's folder: line, answer and reason of every example set aside."""

_THINKING = {"default": None, "on": True, "off": False}


class Prompts(NamedTuple):
    """The prompts of a run.

    Attributes:
      train: Prompts to sample from.
      validation: Prompts to choose by.
      test: Prompts to report on; empty where there are none.
      fingerprint: Hash of all of them, in their order.
      unusable: Examples set aside as their answers cannot be read, with the reasons.
      notes: What a person should know of them, a line each.
    """

    train: EncodedPrompts
    validation: EncodedPrompts
    test: EncodedPrompts
    fingerprint: str
    unusable: list[tuple[Example, str]]
    notes: list[str]


def open_judge(config: ml_collections.ConfigDict) -> Judge:
    """The judge that `config.reward` describes.

    Raises:
      ValueError: There is no such reward, or a setting is out of range.
    """
    reward = config.reward
    return Judge(
        reward.name,
        workers=reward.workers,
        timeout_s=reward.timeout_s,
        settings=reward.settings.to_dict(),
    )


def write_unusable(workdir: Path, prompts: Prompts) -> None:
    """Lists the examples that were set aside, where there are any."""
    if prompts.unusable and hosts.is_main():
        with (workdir / UNUSABLE).open("w") as file:
            for example, reason in prompts.unusable:
                row = {"line": example.line, "answer": example.answer, "reason": reason}
                file.write(json.dumps(row) + "\n")


def load_prompts(
    config: ml_collections.ConfigDict,
    source: str,
    tokenizer: PreTrainedTokenizerFast,
    student: Loaded,
    judge: Judge | None,
) -> Prompts:
    """Reads prompts, takes out what cannot be used, splits and encodes them.

    Args:
      config: Fields `data` (`configs/shared.py`), `accuracy`, `validation_fraction`,
        `test_fraction`, `max_prompt_tokens` and `overlong`.
      source: As `read_source` takes it.
      tokenizer: The student's.
      student: Reads the images, where the prompts have any.
      judge: Finds the answers that cannot be read; None to take them as they are.

    Raises:
      ValueError: The prompts do not fit, or processes read different ones; says how.
    """
    settings = config.data
    examples = read_source(
        source,
        columns=Columns(
            settings.prompt_column,
            settings.answer_column,
            settings.split,
            settings.hub_config,
        ),
        limit=settings.limit or None,
        require_answers=config.accuracy,
    )
    notes: list[str] = []
    examples = _clean(settings, examples, notes)
    # Before process 0 says which of them, by their places, cannot be used.
    _require_same(source, examples)
    unusable = _unusable(judge, examples) if judge and config.accuracy else []
    if unusable:
        first, reason = unusable[0]
        notes.append(
            f"{len(unusable)} prompts are set aside, as the reward cannot read their "
            f"answers; the first is line {first.line}: {reason}"
        )
        lost = {id(example) for example, _ in unusable}
        examples = [example for example in examples if id(example) not in lost]
    splits = split_examples(
        examples, validation=config.validation_fraction, test=config.test_fraction
    )
    _require_splits(config, splits.validation, splits.test)
    shots = _shots(settings)
    # Of all splits alike: with images, the chat template stands around plain text too.
    images = has_images([*examples, *shots])
    train, validation, test = (
        _encode(config, part, tokenizer, student, shots, images) for part in splits
    )
    dropped = train.dropped + validation.dropped + test.dropped
    if dropped:
        notes.append(
            f"{dropped} prompts are longer than max_prompt_tokens and left out"
        )
    used = _require_same(
        source, [*train.examples, *validation.examples, *test.examples]
    )
    return Prompts(train, validation, test, used, unusable, notes)


def _require_same(source: str, examples: Sequence[Example]) -> str:
    """The hash of prompts; ValueError in every process if another has others."""
    found = fingerprint(examples)
    if len(set(hosts.gather(found))) > 1:
        raise ValueError(f"the processes read different prompts from {source}")
    return found


def _clean(
    settings: ml_collections.ConfigDict, examples: list[Example], notes: list[str]
) -> list[Example]:
    """Counts repeated prompts and overlap, and removes them where that is asked for."""
    done = {True: "removed", False: "kept"}
    repeated = find_duplicates(examples)
    if repeated:
        other = sum(not each.same_answer for each in repeated)
        notes.append(
            f"{len(repeated)} prompts repeat an earlier one, {other} of them with "
            f"another answer: {done[settings.remove_duplicates]}"
        )
        if settings.remove_duplicates:
            examples = without(examples, repeated)
    suites = {name: read_source(name) for name in settings.evaluation_sets}
    shared = find_overlap(examples, suites, wording=WORDING)
    if shared:
        first = shared[0]
        notes.append(
            f"{len(shared)} prompts overlap with evaluation sets: "
            f"{done[settings.remove_overlap]}; the first is line "
            f"{examples[first.index].line}, with line {first.line} of {first.suite}: "
            f"{first.words!r}"
        )
        if settings.remove_overlap:
            examples = without(examples, shared)
    return examples


def _unusable(judge: Judge, examples: list[Example]) -> list[tuple[Example, str]]:
    """`judge.unusable`, as process 0 finds them."""
    places = {id(example): i for i, example in enumerate(examples)}

    def judged() -> list[Any]:
        return [[places[id(each)], why] for each, why in judge.unusable(examples)]

    found = hosts.on_main(judged)
    return [(examples[i], reason) for i, reason in found]


def _require_splits(
    config: ml_collections.ConfigDict, validation: list[Example], test: list[Example]
) -> None:
    if not validation:
        raise ValueError(
            "validation_fraction is 0; the divergence is measured on this split, and "
            "learning rates are chosen by it"
        )
    if config.accuracy and not test:
        raise ValueError("test_fraction is 0, but accuracy is asked for")


def _shots(settings: ml_collections.ConfigDict) -> list[Example]:
    return read_source(settings.shots, require_answers=True) if settings.shots else []


def _encode(
    config: ml_collections.ConfigDict,
    part: list[Example],
    tokenizer: PreTrainedTokenizerFast,
    student: Loaded,
    shots: list[Example],
    images: bool,
) -> EncodedPrompts:
    settings = config.data
    if not part:
        return EncodedPrompts([], [], 0)
    if settings.chat or settings.system or shots:
        part = as_conversations(part, system=settings.system or None, shots=shots)
    return encode(
        part,
        tokenizer,
        student,
        config.max_prompt_tokens,
        images=images,
        overlong=config.overlong,
        template_settings=thinking_settings(tokenizer, _THINKING[settings.thinking]),
    )


def encode(
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerFast,
    model: Loaded,
    max_prompt_tokens: int,
    *,
    images: bool,
    **options: Any,
) -> EncodedPrompts:
    """Encodes prompts, with the placeholders of their images.

    Args:
      examples: The prompts.
      tokenizer: The student's.
      model: Reads the images.
      max_prompt_tokens: The longest prompt allowed, in tokens.
      images: Whether the data set that they are of has images. Then all are encoded as
        prompts with images are, through the chat template.
      options: Of `encode_prompts` and `encode_image_prompts`.

    Raises:
      ValueError: As those two; or there are images, and the model sees none.
    """
    if images:
        reading = model.image_reading
        return encode_image_prompts(
            examples, tokenizer, reading, max_prompt_tokens, **options
        )
    return encode_prompts(examples, tokenizer, max_prompt_tokens, **options)


def has_images(examples: Sequence[Example]) -> bool:
    """Whether some of the prompts have images."""
    return any(example.images for example in examples)
