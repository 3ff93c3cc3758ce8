"""From a checkpoint to a model on its devices, and back."""

import dataclasses
import json
import os
import shutil
from collections.abc import Iterator
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from transformers import PreTrainedTokenizerFast

from geomjax.checkpoints.hub import download
from geomjax.checkpoints.sources import open_source
from geomjax.checkpoints.writer import DEFAULT_MAX_SHARD_BYTES, write_safetensors
from geomjax.data.image_processor import ImageProcessor
from geomjax.data.image_prompts import ImageReading
from geomjax.data.tokenizers import load_tokenizer
from geomjax.meshes import ONE_DEVICE, Placement
from geomjax.models import hf
from geomjax.models.attention import Attention
from geomjax.models.choose_attention import choose_attention
from geomjax.models.config import DecoderConfig, ModelConfig
from geomjax.models.decoder import Decoder
from geomjax.models.families import model_config
from geomjax.models.fields import read_config
from geomjax.models.qwen2_5_vl import Qwen25VL, place_images
from geomjax.models.qwen2_5_vl_config import Qwen25VLConfig
from geomjax.models.read import read_params
from geomjax.models.vision import VisionTower
from geomjax.typing import LanguageModel, Params, PRNGKey

COMPANIONS = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
)
"""Files of a checkpoint that training does not change."""


@runtime_checkable
class Model(LanguageModel, Protocol):
    """A `LanguageModel` that checkpoints are loaded into and exported from."""

    @property
    def config(self) -> ModelConfig:
        """Its configuration."""

    @property
    def shapes(self) -> Params:
        """Its parameters as `jax.ShapeDtypeStruct`."""

    def init(self, key: PRNGKey) -> Params:
        """Random parameters, float32."""


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A model and its parameters, which `model, params = load(...)` unpacks.

    Attributes:
      model: The model; one with a vision tower reads text as it is, and images by its
        `with_images`.
      params: Its parameters.
      directory: Folder of the checkpoint; None for a model that was made here.
    """

    model: Model
    params: Params
    directory: Path | None = None

    def __iter__(self) -> Iterator[Any]:
        return iter((self.model, self.params))

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerFast:
        """The checkpoint's tokenizer with its chat template.

        Raises:
          ValueError: It has none, or one that would need code of its own.
        """
        return load_tokenizer(self._folder)

    @cached_property
    def image_processor(self) -> ImageProcessor:
        """The image processor of a checkpoint with a vision tower.

        Raises:
          ValueError: It has none.
        """
        return ImageProcessor(self._folder)

    @cached_property
    def image_reading(self) -> ImageReading:
        """How the model takes the images of its prompts.

        Raises:
          ValueError: It sees none, or its folder has no image processor.
        """
        config = self.model.config
        if not isinstance(config, Qwen25VLConfig):
            raise ValueError(
                f"prompts with images, but {config.architecture} sees none"
            )
        return ImageReading(
            self.image_processor,
            partial(place_images, config),
            config.image_token,
            config.video_token,
        )

    @property
    def _folder(self) -> Path:
        if self.directory is None:
            raise ValueError("a model that was made here has no files beside it")
        return self.directory


def checkpoint_directory(
    path_or_name: str | os.PathLike[str], revision: str | None = None
) -> Path:
    """The local folder of a checkpoint, after downloading it where it is on the hub.

    The tokenizer and the chat template lie there, beside the weights.

    Args:
      path_or_name: A folder, or a repository of the hub, `organisation/name`.
      revision: Branch, tag or commit of a repository; its main branch by default.

    Returns:
      The folder.

    Raises:
      ValueError: No such folder, and no such repository or no access to it.
    """
    path = Path(path_or_name)
    return path if path.is_dir() else download(os.fspath(path_or_name), revision)


def load(
    path_or_name: str | os.PathLike[str],
    *,
    placement: Placement = ONE_DEVICE,
    vocab_size: int | None = None,
    param_dtype: Any = jnp.float32,
    dtype: Any = jnp.float32,
    attention: Attention | None = None,
    revision: str | None = None,
) -> Loaded:
    """Loads a checkpoint of any family in the Hugging Face layout.

    The weights may be in any format that `geomjax.checkpoints.open_source` reads. They
    are read once, each straight into its place on the devices: the host holds at most
    one stacked parameter, or the part of it that its own devices need.

    Args:
      path_or_name: Folder with config.json and weights, or the name of a repository of
        the hub, `organisation/name`.
      placement: Where to lay out parameters and all that is computed with them; by
        default everything is on the first device.
      vocab_size: Number of tokens of the tokenizer, to which padded heads are cut;
        by default every row counts.
      param_dtype: Dtype in which parameters are held.
      dtype: Dtype in which the model computes. float32 uses products of full float32
        precision; bfloat16 uses the backend's native ones.
      attention: The attention of whole sequences; by default the one that
        `choose_attention` has for the backend and the mesh.
      revision: Branch, tag or commit of a repository; its main branch by default.

    Returns:
      The model and its parameters; beside them the tokenizer and, of a model that sees,
      the image processor, which are loaded when they are asked for.

    Raises:
      ValueError: config.json, the tensors, the tokenizer's size or the mesh do not fit.
    """
    directory = checkpoint_directory(path_or_name, revision)
    config = model_config(read_config(directory))
    model = make_model(config, vocab_size, dtype, placement, attention)
    source = open_source(directory)
    params = read_params(source, config, model.shapes, param_dtype, placement)
    return Loaded(model, params, directory)


def make_model(
    config: ModelConfig,
    vocab_size: int | None = None,
    dtype: Any = jnp.float32,
    placement: Placement = ONE_DEVICE,
    attention: Attention | None = None,
) -> Model:
    """The model of a configuration, whichever family it is of.

    Args:
      config: The configuration.
      vocab_size: Rows of the unembedding in use; by default every row.
      dtype: Compute dtype, with which the matmul precision goes.
      placement: Where its arrays lie.
      attention: As for `load`; by default chosen.

    Returns:
      A `Decoder`, or a `Qwen25VL`.
    """
    rows = config.text.vocab_size if vocab_size is None else vocab_size
    decoder = make_decoder(config.text, rows, dtype, placement, attention)
    if not isinstance(config, Qwen25VLConfig):
        return decoder
    vision = VisionTower(config.vision, dtype, decoder.precision, decoder.attention)
    return Qwen25VL(config, decoder, vision)


def make_decoder(
    config: DecoderConfig,
    vocab_size: int,
    dtype: Any = jnp.float32,
    placement: Placement = ONE_DEVICE,
    attention: Attention | None = None,
) -> Decoder:
    """As `make_model`, from a decoder's configuration."""
    narrow = jnp.dtype(dtype) != jnp.float32
    precision = jax.lax.Precision.DEFAULT if narrow else jax.lax.Precision.HIGHEST
    if attention is None:
        attention = choose_attention(jax.default_backend(), placement)
    return Decoder(config, vocab_size, dtype, precision, attention, placement=placement)


def stored_tensors(
    params: Params, model: Model, dtype: Any = ml_dtypes.bfloat16
) -> Iterator[tuple[str, np.ndarray]]:
    """The tensors of an exported checkpoint: names and arrays in `dtype`."""
    return hf.to_hf(params, model.config, lambda array: array.astype(dtype))


def export(
    directory: Path,
    params: Params,
    model: Model,
    *,
    like: str | os.PathLike[str],
    dtype: Any = ml_dtypes.bfloat16,
    max_shard_bytes: int = DEFAULT_MAX_SHARD_BYTES,
) -> None:
    """Writes a checkpoint that transformers loads.

    Args:
      directory: Folder to write; made if missing.
      params: Parameters of `model`.
      model: The model.
      like: Checkpoint folder, or name on the hub, whose config, generation config,
        tokenizer, chat template, image processor and, where it has one, model code are
        copied.
      dtype: Storage dtype of every tensor.
      max_shard_bytes: Size of a file's data above which the next one is begun.

    Raises:
      ValueError: `like` has no readable config.json.
      OSError: The disk is full or not writable; weights already there stay whole.
    """
    like = checkpoint_directory(like)
    config = read_config(like)
    config.pop("torch_dtype", None)
    config["dtype"] = np.dtype(dtype).name
    tensors = stored_tensors(params, model, dtype)
    write_safetensors(directory, tensors, max_shard_bytes=max_shard_bytes)
    temporary = directory / ".config.json.tmp"
    temporary.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    temporary.replace(directory / "config.json")
    code = sorted(path.name for path in like.glob("*.py"))  # Copied, never run.
    for name in (*COMPANIONS, *code):
        if (like / name).is_file():
            shutil.copyfile(like / name, directory / name)


def new_config_json(model: Decoder, **fields: Any) -> dict[str, Any]:
    """The config.json of a Qwen3 model made here rather than loaded.

    Args:
      model: The model.
      **fields: Further entries, such as `eos_token_id`.

    Raises:
      ValueError: The model is not a dense Qwen3 with plain rotary frequencies.
    """
    config = dataclasses.asdict(model.config)
    plain = {
        field.name: field.default
        for field in dataclasses.fields(model.config)
        if field.default is not dataclasses.MISSING
    }
    plain["architecture"] = "Qwen3ForCausalLM"
    other = sorted(name for name, value in plain.items() if config[name] != value)
    if other:
        raise ValueError(
            f"new_config_json writes dense Qwen3 models alone; this one differs in "
            f"{other}"
        )
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
