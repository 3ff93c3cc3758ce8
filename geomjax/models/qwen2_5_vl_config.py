"""The configuration of Qwen2.5-VL, and its reading from config.json."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from geomjax.models.config import DecoderConfig
from geomjax.models.fields import Fields
from geomjax.models.hf_config import qwen2
from geomjax.models.vision_config import VisionConfig, vision_config


@dataclasses.dataclass(frozen=True)
class Qwen25VLConfig:
    """A vision tower, a Qwen2.5 decoder, and how they meet.

    Attributes:
      text: The decoder.
      vision: The vision tower.
      mrope_sections: How many rotary frequencies turn with the time, the row and the
        column of a token; they sum to half a head.
      image_token: Id of the placeholder that the features of an image replace.
      video_token: Id of the placeholder of videos, which are not implemented.
    """

    text: DecoderConfig
    vision: VisionConfig
    mrope_sections: tuple[int, int, int]
    image_token: int
    video_token: int

    def __post_init__(self) -> None:
        problems = []
        if self.vision.out_size != self.text.hidden_size:
            problems.append(
                f"vision_config has out_hidden_size={self.vision.out_size}, but the "
                f"decoder has hidden_size={self.text.hidden_size}"
            )
        if self.text.sliding_window is not None:
            problems.append(
                f"sliding_window={self.text.sliding_window}; windows over prompts with "
                "images are not implemented, only use_sliding_window=false"
            )
        half = self.text.head_dim // 2
        if min(self.mrope_sections) < 0 or sum(self.mrope_sections) != half:
            problems.append(
                f"mrope_section={list(self.mrope_sections)}; expected three numbers "
                f"that sum to {half}, half a head"
            )
        for name in ("image_token", "video_token"):
            if not 0 <= getattr(self, name) < self.text.vocab_size:
                problems.append(
                    f"{name}_id={getattr(self, name)}; expected an id below vocab_size "
                    f"({self.text.vocab_size})"
                )
        if problems:
            raise ValueError("config.json: " + "\n  and ".join(problems))

    @property
    def architecture(self) -> str:
        """Name of the Hugging Face class."""
        return "Qwen2_5_VLForConditionalGeneration"

    @property
    def stack_sizes(self) -> Mapping[str, int]:
        """Numbers of layers of the decoder and of blocks of the vision tower."""
        return {**self.text.stack_sizes, "block": self.vision.depth}


def qwen2_5_vl(config: Mapping[str, Any]) -> Qwen25VLConfig:
    """Maps the config.json of Qwen2.5-VL, published or saved by transformers 5.

    Published files hold the decoder's fields at the top, later ones in `text_config`.

    Raises:
      ValueError: A field is missing, wrong, or asks for what is not implemented.
    """
    if not isinstance(config.get("vision_config"), dict):
        raise ValueError(
            "config.json has no vision_config object, which this architecture needs"
        )
    fields = Fields(config, {})
    image_token = fields.size("image_token_id")
    video_token = fields.size("video_token_id")
    fields.finish()
    text, sections = _text_fields(config)
    return Qwen25VLConfig(
        text=qwen2(text),
        vision=vision_config(config["vision_config"]),
        mrope_sections=sections,
        image_token=image_token,
        video_token=video_token,
    )


def _text_fields(
    config: Mapping[str, Any],
) -> tuple[dict[str, Any], tuple[int, int, int]]:
    """The fields of a Qwen2 config.json, and the sections taken out of its RoPE."""
    nested = config.get("text_config") or {}
    text = {**config, **nested}
    tied = config.get("tie_word_embeddings") or nested.get("tie_word_embeddings")
    text["tie_word_embeddings"] = bool(tied)
    name = "rope_scaling" if text.get("rope_scaling") else "rope_parameters"
    rope = dict(text.get(name) or {})
    match rope.pop("mrope_section", None):
        case [int(time), int(row), int(column)]:
            sections = (time, row, column)
        case other:
            raise ValueError(
                f"config.json has mrope_section={other!r} in its RoPE parameters; "
                "expected a list of three integers"
            )
    # "mrope" says no more than that there are sections.
    for kind in ("type", "rope_type"):
        if rope.get(kind) == "mrope":
            rope[kind] = "default"
    text[name] = rope
    return text, sections
