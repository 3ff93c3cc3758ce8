"""From a Hugging Face config.json to a `DecoderConfig`: one mapping a family."""

import math
from collections.abc import Mapping
from typing import Any

from geomjax.models.config import DecoderConfig, ExpertSizes, LatentSizes
from geomjax.models.fields import Fields
from geomjax.models.rope import YarnScaling, read_rope


def _common(fields: Fields, default_theta: float | None) -> dict[str, Any]:
    """What every family says in the same words."""
    fields.only(hidden_act="silu")
    common = {
        "vocab_size": fields.size("vocab_size"),
        "hidden_size": fields.size("hidden_size"),
        "intermediate_size": fields.size("intermediate_size"),
        "num_layers": fields.size("num_hidden_layers"),
        "num_heads": fields.size("num_attention_heads"),
        "rms_norm_eps": fields.positive("rms_norm_eps"),
        "tie_word_embeddings": fields.flag("tie_word_embeddings"),
        "max_position_embeddings": fields.size("max_position_embeddings"),
    }
    fields.finish()
    theta, scaling = read_rope(fields.config, default_theta)
    return common | {"rope_theta": theta, "rope_scaling": scaling}


def _quotient(fields: Fields) -> int:
    """The head size of families that derive it from the width."""
    width, heads = fields.size("hidden_size"), fields.size("num_attention_heads")
    if width % heads:
        fields.problems.append(
            f"hidden_size={width}, no multiple of num_attention_heads={heads}, and no "
            "head_dim"
        )
    return width // heads or 1


def _sliding(fields: Fields, num_layers: int) -> dict[str, Any]:
    """Windows as Qwen writes them: by `layer_types`, or from `max_window_layers` on."""
    if not fields.flag("use_sliding_window"):
        return {}
    window = fields.size("sliding_window")
    if "layer_types" in fields.config:
        types = list(fields.config["layer_types"])
        layers = [i for i, kind in enumerate(types) if kind == "sliding_attention"]
        if len(types) != num_layers or set(types) - {
            "sliding_attention",
            "full_attention",
        }:
            fields.problems.append(
                f"layer_types={types!r}; expected one of 'full_attention' and "
                f"'sliding_attention' for each of the {num_layers} layers"
            )
    else:
        first = fields.config.get("max_window_layers")
        if not isinstance(first, int) or isinstance(first, bool) or first < 0:
            fields.problems.append(f"max_window_layers={first!r}; expected 0 or more")
            first = 0
        layers = list(range(first, num_layers))
    if not layers:
        return {}
    return {"sliding_window": window, "sliding_layers": tuple(layers)}


_QWEN_ABSENT = {
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "attention_bias": False,
}


def qwen2(config: Mapping[str, Any]) -> DecoderConfig:
    """Maps Qwen2 and Qwen2.5: biases on queries, keys and values.

    Raises:
      ValueError: Entries are missing or ask for what the decoder does not implement.
    """
    fields = Fields(config, _QWEN_ABSENT)
    fields.only(use_mrope=False)
    common = _common(fields, None)
    values = {
        "num_kv_heads": fields.size("num_key_value_heads"),
        "head_dim": fields.size("head_dim")
        if "head_dim" in fields.config
        else _quotient(fields),
        **_sliding(fields, common["num_layers"]),
    }
    fields.finish()
    return DecoderConfig(
        architecture="Qwen2ForCausalLM",
        qk_norm=False,
        qkv_bias=True,
        **common,
        **values,
    )


def _qwen3(fields: Fields) -> dict[str, Any]:
    common = _common(fields, None)
    bias = fields.flag("attention_bias")
    return common | {
        "num_kv_heads": fields.size("num_key_value_heads"),
        "head_dim": fields.size("head_dim"),
        "qkv_bias": bias,
        "out_bias": bias,
    }


def qwen3(config: Mapping[str, Any]) -> DecoderConfig:
    """Maps dense Qwen3: norms on queries and keys.

    Raises:
      ValueError: Entries are missing or ask for what the decoder does not implement.
    """
    fields = Fields(config, _QWEN_ABSENT)
    values = _qwen3(fields)
    values |= _sliding(fields, values["num_layers"])
    fields.finish()
    return DecoderConfig(architecture="Qwen3ForCausalLM", **values)


def qwen3_moe(config: Mapping[str, Any]) -> DecoderConfig:
    """Maps Qwen3-MoE: as Qwen3, with experts in every layer.

    Raises:
      ValueError: Entries are missing or ask for what the decoder does not implement:
        dense layers between those of experts, biases, sliding windows.
    """
    # Files of transformers 4 say num_experts, those of 5 num_local_experts.
    renamed = dict(config)
    if renamed.get("num_experts") is None:
        renamed["num_experts"] = renamed.get("num_local_experts")
    fields = Fields(renamed, _QWEN_ABSENT | {"norm_topk_prob": False})
    fields.only(use_sliding_window=False, decoder_sparse_step=1, mlp_only_layers=[])
    values = _qwen3(fields)
    count, per_token = fields.size("num_experts"), fields.size("num_experts_per_tok")
    size, normalise = (
        fields.size("moe_intermediate_size"),
        fields.flag("norm_topk_prob"),
    )
    fields.finish()
    experts = ExpertSizes(count, per_token, size, normalise)
    return DecoderConfig(architecture="Qwen3MoeForCausalLM", experts=experts, **values)


_LLAMA_ABSENT = {
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
}
_LLAMA_THETA = 10_000.0
"""Base of files that name none, such as those of Llama 2."""


def _llama(fields: Fields) -> dict[str, Any]:
    common = _common(fields, _LLAMA_THETA)
    kv = "num_key_value_heads"
    return common | {
        "num_kv_heads": fields.size(kv) if kv in fields.config else common["num_heads"],
        "head_dim": fields.size("head_dim")
        if "head_dim" in fields.config
        else _quotient(fields),
        "qk_norm": False,
    }


def llama(config: Mapping[str, Any]) -> DecoderConfig:
    """Maps Llama, and what shares its architecture, such as MiniCPM5.

    Raises:
      ValueError: Entries are missing or ask for what the decoder does not implement.
    """
    fields = Fields(config, _LLAMA_ABSENT)
    values = _llama(fields)
    bias = fields.flag("attention_bias")
    values |= {
        "qkv_bias": bias,
        "out_bias": bias,
        "mlp_bias": fields.flag("mlp_bias"),
    }
    fields.finish()
    return DecoderConfig(architecture="LlamaForCausalLM", **values)


def mistral(config: Mapping[str, Any]) -> DecoderConfig:
    """Maps Mistral: as Llama, with a window in every layer or in none.

    Raises:
      ValueError: Entries are missing or ask for what the decoder does not implement.
    """
    fields = Fields(config, {"tie_word_embeddings": False})
    if "layer_types" in fields.config:
        fields.problems.append("layer_types, which Mistral models do not use")
    values = _llama(fields)
    if "sliding_window" in fields.config:
        values["sliding_window"] = fields.size("sliding_window")
        values["sliding_layers"] = tuple(range(values["num_layers"]))
    fields.finish()
    return DecoderConfig(architecture="MistralForCausalLM", **values)


def _scales(fields: Fields) -> dict[str, Any]:
    """The constants of MiniCPM's maximal-update parametrisation."""
    depth = math.sqrt(fields.size("num_hidden_layers"))
    return {
        "embedding_scale": fields.positive("scale_emb"),
        "residual_scale": fields.positive("scale_depth") / depth,
        "logit_divisor": fields.size("hidden_size") / fields.size("dim_model_base"),
    }


def minicpm(config: Mapping[str, Any]) -> DecoderConfig:
    """Maps MiniCPM: as Llama, with scaled embeddings, residuals and logits.

    Raises:
      ValueError: Entries are missing or ask for what the decoder does not implement:
        experts, sparse attention.
    """
    fields = Fields(config, {"tie_word_embeddings": True})
    fields.only(attention_bias=False, mlp_bias=False)
    for name in ("num_experts", "sparse_config"):
        if name in fields.config:
            fields.problems.append(f"{name}, which this decoder does not implement")
    values = _llama(fields) | _scales(fields)
    fields.finish()
    return DecoderConfig(architecture="MiniCPMForCausalLM", **values)


def minicpm3(config: Mapping[str, Any]) -> DecoderConfig:
    """Maps MiniCPM3: MiniCPM's scales, and latent attention.

    Raises:
      ValueError: Entries are missing or ask for what the decoder does not implement.
    """
    fields = Fields(config, {"tie_word_embeddings": True})
    fields.only(attention_bias=False, mlp_bias=False)
    common = _common(fields, _LLAMA_THETA)
    rank, value_dim = "q_lora_rank", "v_head_dim"
    # A rank that is null means one full projection; a rank that is absent is missing.
    full_query = rank in config and config[rank] is None
    plain, rotary = fields.size("qk_nope_head_dim"), fields.size("qk_rope_head_dim")
    latent = LatentSizes(
        query_rank=None if full_query else fields.size(rank),
        kv_rank=fields.size("kv_lora_rank"),
        plain_dim=plain,
        rotary_dim=rotary,
        value_dim=fields.size(value_dim)
        if value_dim in fields.config
        else _quotient(fields),
    )
    scales = _scales(fields)
    rope = fields.config.get("rope_scaling") or fields.config.get("rope_parameters")
    yarn = isinstance(common["rope_scaling"], YarnScaling)
    if yarn and rope and rope.get("mscale_all_dim"):
        fields.problems.append(
            "mscale_all_dim, which rescales latent attention; this decoder does not"
        )
    fields.finish()
    return DecoderConfig(
        architecture="MiniCPM3ForCausalLM",
        num_kv_heads=common["num_heads"],
        head_dim=plain + rotary,
        qk_norm=False,
        latent=latent,
        **common,
        **scales,
    )
