"""config.json of every family: what is read, what stands for absent entries."""

import json
import math
from pathlib import Path

import pytest

from geomjax.models.config import ExpertSizes, LatentSizes
from geomjax.models.families import model_config
from geomjax.models.rope import LinearScaling

GOLDEN = Path(__file__).parent / "golden"


def golden(name, **fields):
    """A committed config.json; fields that are ... are left out."""
    config = json.loads((GOLDEN / name / "config.json").read_text()) | fields
    return {name: value for name, value in config.items() if value is not ...}


def test_qwen2_has_biases_and_heads_of_a_quotient():
    config = model_config(golden("qwen2"))
    assert (config.qkv_bias, config.out_bias, config.qk_norm) == (True, False, False)
    assert config.head_dim == 24 // 4
    assert (config.sliding_window, config.sliding_layers) == (3, (1,))
    plain = golden("qwen2", use_sliding_window=False, layer_types=...)
    assert model_config(plain).sliding_layers == ()
    older = golden("qwen2", layer_types=..., max_window_layers=0)
    assert model_config(older).sliding_layers == (0, 1)
    beyond = golden("qwen2", layer_types=..., max_window_layers=9)
    assert model_config(beyond).sliding_window is None
    assert model_config(golden("qwen2", head_dim=10)).head_dim == 10


def test_qwen3_moe_is_read_under_both_names_of_its_experts():
    expected = ExpertSizes(count=5, per_token=2, size=12, normalise_weights=True)
    assert model_config(golden("qwen3_moe")).experts == expected
    hub = golden("qwen3_moe", num_local_experts=..., num_experts=5)
    assert model_config(hub).experts == expected
    plain = model_config(golden("qwen3_moe", norm_topk_prob=...))
    assert not plain.experts.normalise_weights


def test_llama_files_may_leave_out_what_llama_2_leaves_out():
    rope = {"rope_parameters": ..., "rope_theta": ..., "rope_scaling": None}
    absent = dict.fromkeys(
        ("num_key_value_heads", "head_dim", "attention_bias", "mlp_bias"), ...
    )
    config = model_config(golden("llama", tie_word_embeddings=..., **absent, **rope))
    assert config.num_kv_heads == config.num_heads == 4
    assert (config.head_dim, config.rope_theta) == (6, 10_000.0)
    assert (config.qkv_bias, config.out_bias, config.mlp_bias) == (False,) * 3
    assert not config.tie_word_embeddings
    scaled = {"rope_parameters": ..., "rope_scaling": {"type": "linear", "factor": 2}}
    config = model_config(golden("llama", rope_theta=5e5, **scaled))
    assert (config.rope_scaling, config.rope_theta) == (LinearScaling(2.0), 5e5)


def test_mistral_has_a_window_in_every_layer_or_in_none():
    assert model_config(golden("mistral")).sliding_layers == (0, 1)
    assert model_config(golden("mistral", sliding_window=None)).sliding_layers == ()


def test_minicpm_scales_embeddings_residuals_and_logits():
    config = model_config(golden("minicpm"))
    assert config.embedding_scale == 3.0
    assert config.residual_scale == pytest.approx(1.1 / math.sqrt(2))
    assert config.logit_divisor == pytest.approx(24 / 16)
    assert model_config(golden("minicpm", tie_word_embeddings=...)).untied_head is False


def test_minicpm3_has_latents():
    config = model_config(golden("minicpm3"))
    assert config.latent == LatentSizes(
        query_rank=10, kv_rank=9, plain_dim=5, rotary_dim=4, value_dim=7
    )
    assert (config.head_dim, config.num_kv_heads) == (9, 4)
    assert config.rope_scaling.exact_length == 32
    full = model_config(golden("minicpm3", q_lora_rank=None, v_head_dim=None))
    assert full.latent.query_rank is None
    assert full.latent.value_dim == 24 // 4


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("qwen2", {"use_mrope": True}, "use_mrope=True"),
        ("qwen2", {"max_window_layers": None, "layer_types": ...}, "max_window_layers"),
        ("qwen2", {"hidden_size": 25}, "hidden_size=25, no multiple of .*=4"),
        ("qwen3_moe", {"decoder_sparse_step": 2}, "decoder_sparse_step=2"),
        ("qwen3_moe", {"mlp_only_layers": [0]}, r"mlp_only_layers=\[0\]"),
        ("qwen3_moe", {"use_sliding_window": True}, "use_sliding_window=True"),
        ("qwen3_moe", {"num_local_experts": ...}, "no 'num_experts'"),
        ("qwen3_moe", {"num_experts_per_tok": 6}, "takes 6 experts, but there are 5"),
        ("llama", {"mlp_bias": "yes"}, "mlp_bias='yes'; expected true or false"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ("mistral", {"layer_types": ["full_attention"]}, "layer_types, which Mistral"),
        ("mistral", {"sliding_window": 0}, "sliding_window=0"),
        ("minicpm", {"num_experts": 8}, "num_experts, which this decoder"),
        ("minicpm", {"sparse_config": {"topk": 4}}, "sparse_config, which this"),
        ("minicpm", {"dim_model_base": ...}, "no 'dim_model_base'"),
        ("minicpm3", {"attention_bias": True}, "attention_bias=True"),
        ("minicpm3", {"q_lora_rank": ...}, "no 'q_lora_rank'"),
        ("minicpm3", {"v_head_dim": 10}, "values no larger than keys"),
    ],
)
def test_what_is_not_implemented_is_refused_by_name(name, fields, message):
    with pytest.raises(ValueError, match=message):
        model_config(golden(name, **fields))


def test_yarn_that_rescales_latent_attention_is_refused():
    rope = {
        "rope_type": "yarn",
        "rope_theta": 100.0,
        "factor": 4.0,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
    }
    with pytest.raises(ValueError, match="mscale_all_dim, which rescales"):
        model_config(golden("minicpm3", rope_parameters=rope))


def test_every_problem_is_named_at_once():
    with pytest.raises(ValueError, match=r"(?s)use_mrope.*no 'vocab_size'.*rms_norm"):
        model_config(golden("qwen2", use_mrope=True, vocab_size=..., rms_norm_eps=-1.0))


def test_quantised_checkpoints_are_refused_with_their_method():
    quantised = {"quantization_config": {"quant_method": "fp8", "bits": 8}}
    with pytest.raises(ValueError, match="quant_method 'fp8'.*convert"):
        model_config(golden("llama", **quantised))


def test_code_in_a_checkpoint_is_never_needed_for_a_family_that_is_known():
    assert "auto_map" in golden("minicpm")
    unknown = golden("minicpm", architectures=["OtherForCausalLM"])
    with pytest.raises(ValueError, match="run code from the checkpoint.*known: "):
        model_config(unknown)
