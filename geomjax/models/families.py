"""The families of models: for each architecture its config mapping and its rules.

A new family is one more entry of `FAMILIES`, and nothing else: loading, export, role
tables and sharding follow from it.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from geomjax.models import hf_config, rules
from geomjax.models.config import ModelConfig
from geomjax.models.qwen2_5_vl_config import qwen2_5_vl
from geomjax.models.rules import Rule
from geomjax.models.vision_rules import RENAMED, VISION


class Family(NamedTuple):
    """What is to be known of the checkpoints of one architecture.

    Attributes:
      config: From the parsed config.json to the model's configuration, whose
        `architecture` is the name in `FAMILIES`; refuses by name what the model does
        not implement.
      rules: Tensor names and paths, in the order in which they are read and written.
      renamed: Prefix of a tensor name that some checkpoints have -> that of the rules.
    """

    config: Callable[[Mapping[str, Any]], ModelConfig]
    rules: tuple[Rule, ...]
    renamed: Mapping[str, str] = MappingProxyType({})


FAMILIES: dict[str, Family] = {
    "LlamaForCausalLM": Family(hf_config.llama, rules.LLAMA),
    "MiniCPM3ForCausalLM": Family(hf_config.minicpm3, rules.MINICPM3),
    "MiniCPMForCausalLM": Family(hf_config.minicpm, rules.LLAMA),
    "MistralForCausalLM": Family(hf_config.mistral, rules.LLAMA),
    "Qwen2ForCausalLM": Family(hf_config.qwen2, rules.LLAMA),
    "Qwen2_5_VLForConditionalGeneration": Family(
        qwen2_5_vl, (*VISION, *rules.LLAMA), RENAMED
    ),
    "Qwen3ForCausalLM": Family(hf_config.qwen3, rules.QWEN3),
    "Qwen3MoeForCausalLM": Family(hf_config.qwen3_moe, rules.QWEN3_MOE),
}
"""Name of the Hugging Face class -> the family."""


def model_config(config: Mapping[str, Any]) -> ModelConfig:
    """Builds a model's configuration from a parsed config.json.

    Raises:
      ValueError: The checkpoint is quantised, its architecture is unknown (the known
        ones are listed), or its mapping refuses an entry.
    """
    quantised = config.get("quantization_config")
    if quantised is not None:
        method = quantised.get("quant_method") if isinstance(quantised, dict) else None
        raise ValueError(
            f"config.json has a quantization_config (quant_method {method!r}); "
            "quantised checkpoints are not read, convert the weights to bfloat16 first"
        )
    architectures = config.get("architectures") or []
    for name in architectures:
        if name in FAMILIES:
            return FAMILIES[name].config(config)
    remote = ""
    if config.get("auto_map"):
        remote = (
            "; its auto_map asks to run code from the checkpoint, which is never done"
        )
    raise ValueError(
        f"config.json names the architecture {architectures!r} (model_type "
        f"{config.get('model_type')!r}){remote}; known: {sorted(FAMILIES)}"
    )
