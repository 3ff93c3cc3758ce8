"""From a checkpoint folder to a model and back."""

import dataclasses
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from geomjax.checkpoints.safetensors import SafetensorsSource
from geomjax.checkpoints.writer import write_safetensors
from geomjax.models import hf
from geomjax.models.config import decoder_config, read_config
from geomjax.models.decoder import Decoder
from geomjax.typing import Params

COMPANIONS = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)
"""Files of a checkpoint that training does not change."""


class Loaded(NamedTuple):
    """A model with its parameters."""

    model: Decoder
    params: Params


def load(
    directory: Path,
    *,
    vocab_size: int | None = None,
    param_dtype: Any = jnp.float32,
    dtype: Any = jnp.float32,
) -> Loaded:
    """Loads a checkpoint in the Hugging Face layout.

    Args:
      directory: Folder with config.json and safetensors files.
      vocab_size: Number of tokens of the tokenizer, to which padded heads are cut;
        by default every row counts.
      param_dtype: Dtype in which parameters are held.
      dtype: Dtype in which the model computes. float32 uses products of full float32
        precision; bfloat16 uses the backend's native ones.

    Returns:
      The model and its parameters.

    Raises:
      ValueError: config.json, the tensors or the tokenizer's size do not fit.
    """
    config = decoder_config(read_config(directory))
    rows = config.vocab_size if vocab_size is None else vocab_size
    model = make_decoder(config, rows, dtype)
    source = SafetensorsSource(directory)
    return Loaded(model, hf.read_params(source, config, model.shapes, param_dtype))


def make_decoder(config: Any, vocab_size: int, dtype: Any = jnp.float32) -> Decoder:
    """A decoder whose matmul precision goes with its compute dtype."""
    narrow = jnp.dtype(dtype) != jnp.float32
    precision = jax.lax.Precision.DEFAULT if narrow else jax.lax.Precision.HIGHEST
    return Decoder(config, vocab_size, dtype, precision)


def stored_tensors(
    params: Params, model: Decoder, dtype: Any = ml_dtypes.bfloat16
) -> Iterator[tuple[str, np.ndarray]]:
    """The tensors of an exported checkpoint: names and arrays in `dtype`."""
    return hf.to_hf(params, model.config, lambda array: array.astype(dtype))


def export(
    directory: Path,
    params: Params,
    model: Decoder,
    *,
    like: Path,
    dtype: Any = ml_dtypes.bfloat16,
) -> None:
    """Writes a checkpoint that transformers loads.

    Args:
      directory: Folder to write; made if missing.
      params: Parameters of `model`.
      model: The model.
      like: Checkpoint folder whose config, tokenizer, generation config and chat
        template are copied.
      dtype: Storage dtype of every tensor.

    Raises:
      ValueError: `like` has no readable config.json.
      OSError: The disk is full or not writable; weights already there stay whole.
    """
    config = read_config(like)
    config.pop("torch_dtype", None)
    config["dtype"] = np.dtype(dtype).name
    write_safetensors(directory, stored_tensors(params, model, dtype))
    temporary = directory / ".config.json.tmp"
    temporary.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    temporary.replace(directory / "config.json")
    for name in COMPANIONS:
        if (like / name).is_file():
            shutil.copyfile(like / name, directory / name)


def new_config_json(model: Decoder, **fields: Any) -> dict[str, Any]:
    """The config.json of a Qwen3 model made here rather than loaded.

    Args:
      model: The model.
      **fields: Further entries, such as `eos_token_id`.
    """
    config = dataclasses.asdict(model.config)
    return {
        "architectures": [config["architecture"]],
        "model_type": "qwen3",
        "vocab_size": config["vocab_size"],
        "hidden_size": config["hidden_size"],
        "intermediate_size": config["intermediate_size"],
        "num_hidden_layers": config["num_layers"],
        "num_attention_heads": config["num_heads"],
        "num_key_value_heads": config["num_kv_heads"],
        "head_dim": config["head_dim"],
        "rms_norm_eps": config["rms_norm_eps"],
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": config["rope_theta"],
        },
        "tie_word_embeddings": config["tie_word_embeddings"],
        "max_position_embeddings": config["max_position_embeddings"],
        "attention_bias": False,
        "hidden_act": "silu",
        **fields,
    }
