"""Layer, module and group of Hugging Face tensor names."""

import pytest

from geomjax.names import GROUPS, classify

CASES = [
    ("model.embed_tokens.weight", None, "embed_tokens", "embedding"),
    ("lm_head.weight", None, "lm_head", "lm_head"),
    ("model.norm.weight", None, "norm", "norm"),
    ("model.layers.0.input_layernorm.weight", 0, "norm", "norm"),
    ("model.layers.11.self_attn.q_norm.weight", 11, "norm", "norm"),
    ("model.layers.27.self_attn.o_proj.weight", 27, "o_proj", "attention"),
    ("model.layers.2.self_attn.k_proj.bias", 2, "bias", "attention"),
    ("model.language_model.layers.4.mlp.down_proj.weight", 4, "down_proj", "ffn"),
    ("model.layers.1.mlp.gate.weight", 1, "router", "ffn"),
    ("model.layers.1.mlp.experts.63.gate_proj.weight", 1, "experts.gate_proj", "ffn"),
    ("model.layers.1.mlp.experts.gate_up_proj", 1, "experts.gate_up_proj", "ffn"),
    (
        "model.layers.1.mlp.shared_expert.up_proj.weight",
        1,
        "shared_expert.up_proj",
        "ffn",
    ),
    ("visual.blocks.5.attn.qkv.weight", 5, "visual.attn.qkv", "vision"),
    ("visual.blocks.5.attn.qkv.bias", 5, "visual.attn.qkv.bias", "vision"),
    ("model.visual.merger.mlp.0.weight", None, "visual.merger.mlp.0", "vision"),
    ("model.rotary.inv_freq", None, "inv_freq", "other"),
]


@pytest.mark.parametrize(("name", "layer", "module", "group"), CASES)
def test_classify(name, layer, module, group):
    assert classify(name) == (layer, module, group)
    assert group in GROUPS
