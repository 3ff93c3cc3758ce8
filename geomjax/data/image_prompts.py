"""Prompts with images: their token ids, and the images of a batch of them."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Int32
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerFast

from geomjax.data.batches import ImagesOf
from geomjax.data.encode import EncodedPrompts, encode_text, with_thinking
from geomjax.data.image_processor import ImageProcessor, open_image
from geomjax.data.patches import ImagePatches
from geomjax.data.placeholders import expand_placeholders, image_parts
from geomjax.data.prompts import Example, Message, summarize

Place = Callable[
    [Sequence[Int32[np.ndarray, "_"]], Sequence[Sequence[ImagePatches]], int], Any
]
"""From prompts, their images and a length to what the model's `with_images` takes."""


class ImageReading(NamedTuple):
    """How a model takes the images of its prompts.

    Attributes:
      processor: The checkpoint's image processor.
      place: Ties images to the placeholders of their prompts, such as
        `geomjax.models.qwen2_5_vl.place_images` with its configuration.
      image_token: Id of the placeholder.
      video_token: Id of the placeholder of videos.
    """

    processor: ImageProcessor
    place: Place
    image_token: int
    video_token: int


def encode_image_prompts(
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerFast,
    reading: ImageReading,
    max_prompt_tokens: int,
    *,
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
      reading: How the student takes images.
      max_prompt_tokens: The longest prompt allowed, its images' tokens counted.
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
            grids = [each.grid for each in patches_of(example, reading.processor)]
            ids = expand_placeholders(
                encode_text(text, tokenizer),
                grids,
                image_token=reading.image_token,
                video_token=reading.video_token,
                merge_size=reading.processor.merge_size,
            )
        except (ValueError, TemplateError) as error:
            problems.append(f"line {example.line}: {error}")
            continue
        if len(ids) <= max_prompt_tokens:
            kept.examples.append(with_thinking(example, ids.tolist(), tokenizer))
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
        processor(open_image(image.read(), name=f"image {i} of line {example.line}"))
        for i, image in enumerate(example.images, start=1)
    ]


def read_images(
    prompts: EncodedPrompts, reading: ImageReading, length: int
) -> ImagesOf:
    """Opens the images of a batch when it is made, which a `Pipeline` does ahead.

    Args:
      prompts: From `encode_image_prompts`.
      reading: How the model takes images.
      length: The padded length of the batches, in tokens.
    """

    def images_of(rows: Sequence[int]) -> Any:
        patches = [patches_of(prompts.examples[i], reading.processor) for i in rows]
        return reading.place([prompts.token_ids[i] for i in rows], patches, length)

    return images_of


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
