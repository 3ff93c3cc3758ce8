"""Prompts with images: their token ids, and batches of them with their patches."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
from jaxtyping import Int32
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerFast

from geomjax.data.batches import WHOLE, PromptBatch, Shard, make_batches
from geomjax.data.encode import EncodedPrompts, encode_text
from geomjax.data.image_processor import ImageProcessor, open_image
from geomjax.data.patches import ImagePatches
from geomjax.data.placeholders import expand_placeholders, image_parts
from geomjax.data.prompts import Example, Message, summarize


def encode_image_prompts(
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerFast,
    processor: ImageProcessor,
    max_prompt_tokens: int,
    *,
    image_token: int,
    video_token: int,
    overlong: Literal["error", "drop"] = "error",
    template_settings: Mapping[str, Any] | None = None,
) -> EncodedPrompts:
    """Encodes prompts through the chat template, an image's placeholder for each token.

    Each image is opened once, for its size: patches are large, and made anew for every
    batch.

    Args:
      examples: The prompts, with `<image>` where an image belongs; plain text becomes
        the user's turn.
      tokenizer: The student's, with a chat template that takes images.
      processor: The checkpoint's image processor.
      max_prompt_tokens: The longest prompt allowed, its images' tokens counted.
      image_token: Id of the placeholder.
      video_token: Id of the placeholder of videos.
      overlong: Whether a longer prompt is an error, or is dropped and counted.
      template_settings: Variables of the chat template.

    Raises:
      ValueError: Naming the lines of prompts that are too long, whose images cannot be
        opened or are not as many as their marks; or if none is left.
    """
    kept = EncodedPrompts([], [], 0)
    problems: list[str] = []
    dropped = 0
    for example in examples:
        try:
            text = _render(example.prompt, tokenizer, template_settings or {})
            grids = [each.grid for each in patches_of(example, processor)]
            ids = expand_placeholders(
                encode_text(text, tokenizer),
                grids,
                image_token=image_token,
                video_token=video_token,
                merge_size=processor.merge_size,
            )
        except (ValueError, TemplateError) as error:
            problems.append(f"line {example.line}: {error}")
            continue
        if len(ids) <= max_prompt_tokens:
            kept.examples.append(example)
            kept.token_ids.append(ids)
        elif overlong == "drop":
            dropped += 1
        else:
            problems.append(
                f"line {example.line}: {len(ids)} tokens with its images, expected at "
                f"most {max_prompt_tokens}"
            )
    if problems:
        raise ValueError(f"prompts:\n{summarize(problems)}")
    if not kept.examples:
        raise ValueError(
            f"prompts: none is left; all {dropped} are longer than {max_prompt_tokens} "
            "tokens"
        )
    return kept._replace(dropped=dropped)


def patches_of(example: Example, processor: ImageProcessor) -> list[ImagePatches]:
    """The patches of an example's images, in their order."""
    return [
        processor(open_image(data, name=f"image {i} of line {example.line}"))
        for i, data in enumerate(example.images, start=1)
    ]


Place = Callable[
    [Sequence[Int32[np.ndarray, "_"]], Sequence[Sequence[ImagePatches]]], Any
]
"""Ties images to the placeholders of their prompts, as a model reads both."""


def make_image_batches(
    prompts: EncodedPrompts,
    processor: ImageProcessor,
    place: Place,
    *,
    batch_size: int,
    seed: int,
    pad_id: int,
    length: int | None = None,
    shard: Shard = WHOLE,
) -> Callable[[int], tuple[PromptBatch, Any]]:
    """As `make_batches`, each batch with its images, which a `Pipeline` opens ahead.

    Args:
      prompts: From `encode_image_prompts`.
      processor: The checkpoint's image processor.
      place: Such as `geomjax.models.qwen2_5_vl.place_images` with its configuration.
      batch_size: Prompts in a batch.
      seed: The seed of the order.
      pad_id: The token id on padding.
      length: The padded length in tokens, or None for that of the longest prompt.
      shard: Which rows of each batch are made here.
    """
    prompts_at = make_batches(
        prompts.token_ids,
        batch_size=batch_size,
        seed=seed,
        pad_id=pad_id,
        length=length,
        shard=shard,
    )

    def batch_at(step: int) -> tuple[PromptBatch, Any]:
        batch = prompts_at(step)
        rows = np.asarray(batch.index).tolist()
        patches = [patches_of(prompts.examples[i], processor) for i in rows]
        return batch, place([prompts.token_ids[i] for i in rows], patches)

    return batch_at


def _render(
    prompt: str | tuple[Message, ...],
    tokenizer: PreTrainedTokenizerFast,
    settings: Mapping[str, Any],
) -> str:
    if tokenizer.chat_template is None:
        raise ValueError("has images, but the tokenizer has no chat template for them")
    turns = (Message("user", prompt),) if isinstance(prompt, str) else prompt
    # Its type knows texts alone; the templates of models that see take parts.
    content: list[Any] = [
        {"role": m.role, "content": image_parts(m.content)} for m in turns
    ]
    text = tokenizer.apply_chat_template(
        content, add_generation_prompt=True, tokenize=False, **settings
    )
    assert isinstance(text, str)
    return text
