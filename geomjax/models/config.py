"""One configuration for every decoder, and its reading from a Hugging Face config."""

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Shape and constants of a decoder.

    Attributes:
      architecture: Name of the Hugging Face class, such as `Qwen3ForCausalLM`.
      vocab_size: Rows of the embedding as stored, padding rows included.
      hidden_size: Width D of the residual stream.
      intermediate_size: Width F of the feed-forward layer.
      num_layers: Number L of blocks.
      num_heads: Number N of query heads.
      num_kv_heads: Number K of key and value heads; divides `num_heads`.
      head_dim: Size H of a head, apart from `hidden_size // num_heads`.
      rms_norm_eps: Added to the mean square in every norm.
      rope_theta: Base of the rotary frequencies.
      tie_word_embeddings: Whether the embedding is also the output head.
      max_position_embeddings: Longest context in tokens.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    tie_word_embeddings: bool
    max_position_embeddings: int

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type is int and value < 1:
                raise ValueError(f"{field.name} is {value}; it must be at least 1")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads ({self.num_heads}) is not a multiple of "
                f"num_kv_heads ({self.num_kv_heads})"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim is {self.head_dim}; rotary heads are even")


def read_config(directory: Path) -> dict[str, Any]:
    """Reads `config.json` of a checkpoint directory as plain data.

    Args:
      directory: Folder of a checkpoint in the Hugging Face layout.

    Returns:
      The parsed object.

    Raises:
      ValueError: The file is missing, is not JSON, or is not an object.
    """
    path = directory / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(
            f"{directory} has no config.json; expected a checkpoint folder in the "
            "Hugging Face layout (config.json, model.safetensors, tokenizer.json)"
        ) from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(config, dict):
        raise ValueError(f"{path} holds a {type(config).__name__}, not an object")
    return config


def _required(config: Mapping[str, Any], name: str) -> Any:
    if config.get(name) is None:
        raise ValueError(f"config.json has no {name!r}, which this architecture needs")
    return config[name]


def _size(config: Mapping[str, Any], name: str) -> int:
    value = _required(config, name)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(
            f"config.json has {name}={value!r}; expected an integer above 0"
        )
    return value


def _positive(config: Mapping[str, Any], name: str) -> float:
    value = _required(config, name)
    if not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ValueError(f"config.json has {name}={value!r}; expected a number above 0")
    return float(value)


def _rope_theta(config: Mapping[str, Any]) -> float:
    """Reads the rotary base from either layout of config.json, or refuses a scaling."""
    theta = {"rope_theta": config.get("rope_theta")}
    for layout in ("rope_scaling", "rope_parameters"):
        rope = config.get(layout) or {}
        rope_type = rope.get("rope_type", rope.get("type", "default"))
        if rope_type != "default":
            raise ValueError(
                f"config.json asks for RoPE scaling {rope_type!r} ({layout}), which "
                "this model does not implement; only 'default' is exact here"
            )
        if rope.get("rope_theta") is not None:
            theta["rope_theta"] = rope["rope_theta"]
    return _positive(theta, "rope_theta")


def qwen3(config: Mapping[str, Any]) -> DecoderConfig:
    """Maps the config.json of a dense Qwen3 model.

    Raises:
      ValueError: A field is missing, or asks for what the decoder does not implement
        (biases, sliding windows, another activation, RoPE scaling).
    """
    unsupported = {
        "attention_bias": False,
        "use_sliding_window": False,
        "hidden_act": "silu",
    }
    for name, supported in unsupported.items():
        value = config.get(name, supported)
        if value != supported:
            raise ValueError(
                f"config.json has {name}={value!r}; this decoder implements "
                f"{supported!r} only"
            )
    if config.get("quantization_config") is not None:
        raise ValueError(
            "config.json has a quantization_config; quantised checkpoints are not "
            "read, convert the weights to bfloat16 first"
        )
    return DecoderConfig(
        architecture="Qwen3ForCausalLM",
        vocab_size=_size(config, "vocab_size"),
        hidden_size=_size(config, "hidden_size"),
        intermediate_size=_size(config, "intermediate_size"),
        num_layers=_size(config, "num_hidden_layers"),
        num_heads=_size(config, "num_attention_heads"),
        num_kv_heads=_size(config, "num_key_value_heads"),
        head_dim=_size(config, "head_dim"),
        rms_norm_eps=_positive(config, "rms_norm_eps"),
        rope_theta=_rope_theta(config),
        tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
        max_position_embeddings=_size(config, "max_position_embeddings"),
    )


CONFIGS = {"Qwen3ForCausalLM": qwen3}
"""Hugging Face architecture name -> mapping of its config.json."""


def decoder_config(config: Mapping[str, Any]) -> DecoderConfig:
    """Builds the decoder's configuration from a parsed config.json.

    Raises:
      ValueError: The architecture is unknown (the known ones are listed), or its
        mapping refuses a field.
    """
    architectures = config.get("architectures") or []
    for name in architectures:
        if name in CONFIGS:
            return CONFIGS[name](config)
    raise ValueError(
        f"config.json names the architecture {architectures!r} (model_type "
        f"{config.get('model_type')!r}); known: {sorted(CONFIGS)}"
    )
