"""Shapes of the papers' models, so that a recipe is described without a download.

From the `config.json` of each repository. Only what the shapes depend on is here; the
parameter counts are held against the model cards by a test.
"""

from pathlib import Path
from typing import Any

import jax.numpy as jnp

from geomjax.models.families import model_config
from geomjax.models.fields import read_config
from geomjax.models.load import Model, make_model

_QWEN = {
    "vocab_size": 151936,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 40960,
    "rope_theta": 1e6,
}


def _qwen2(width: int, ffn: int, layers: int, heads: int, kv: int) -> dict[str, Any]:
    return _QWEN | {
        "architectures": ["Qwen2ForCausalLM"],
        "hidden_size": width,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "tie_word_embeddings": False,
    }


def _qwen3(
    width: int, ffn: int, layers: int, heads: int, *, kv: int = 8, tied: bool = False
) -> dict[str, Any]:
    return _qwen2(width, ffn, layers, heads, kv) | {
        "architectures": ["Qwen3ForCausalLM"],
        "head_dim": 128,
        "tie_word_embeddings": tied,
        "attention_bias": False,
    }


_R1_1_5B = _qwen2(1536, 8960, 28, 12, 2)
_3_8B = _qwen3(4096, 12288, 36, 32)
# The language model of Qwen2.5-VL; its tower adds 0.67 billion parameters.
_VL_3B = _qwen2(2048, 11008, 36, 16, 2) | {"tie_word_embeddings": True}
_VL_7B = _qwen2(3584, 18944, 28, 28, 4) | {"vocab_size": 152064}

PUBLISHED: dict[str, dict[str, Any]] = {
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B": _R1_1_5B,
    "agentica-org/DeepScaleR-1.5B-Preview": _R1_1_5B,
    "hbx/JustRL-DeepSeek-1.5B": _R1_1_5B,
    "Qwen/Qwen2.5-VL-3B-Instruct": _VL_3B,
    "NoisyRollout-Geo3K-7B": _VL_7B,
    "Qwen/Qwen3-1.7B": _qwen3(2048, 6144, 28, 16, tied=True),
    "Qwen/Qwen3-1.7B-Base": _qwen3(2048, 6144, 28, 16, tied=True),
    "Qwen/Qwen3-4B": _qwen3(2560, 9728, 36, 32, tied=True),
    "Qwen/Qwen3-8B": _3_8B,
    "Qwen/Qwen3-8B-Base": _3_8B,
    "qwen3-8b-sft-anchor": _3_8B,
    "Qwen/Qwen3-14B": _qwen3(5120, 17408, 40, 40),
    "Qwen/Qwen3-32B": _qwen3(5120, 25600, 64, 64),
    "Qwen/Qwen3-30B-A3B": _qwen3(2048, 6144, 48, 32, kv=4)
    | {
        "architectures": ["Qwen3MoeForCausalLM"],
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 768,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    },
}
"""Name in a recipe -> entries of its config.json."""


def entries(name: str) -> dict[str, Any]:
    """The `config.json` of a local folder, or what is known of a published name.

    Raises:
      ValueError: It is neither.
    """
    folder = Path(name)
    if folder.is_dir():
        return read_config(folder)
    if name in PUBLISHED:
        return PUBLISHED[name]
    raise ValueError(
        f"{name} is no local folder, and its shapes are not known here; known: "
        f"{', '.join(PUBLISHED)}"
    )


def shaped(name: str, dtype: str) -> Model:
    """The model of a local folder or a published name, without its weights.

    Raises:
      ValueError: It is neither.
    """
    return make_model(model_config(entries(name)), dtype=jnp.dtype(dtype))
