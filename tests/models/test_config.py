"""config.json: what is read and what is refused."""

import json

import pytest
from tiny_decoder import CONFIG, variant

from geomjax.models.families import model_config
from geomjax.models.fields import read_config

QWEN3 = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "vocab_size": 24,
    "hidden_size": 16,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "rms_norm_eps": 1e-06,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "tie_word_embeddings": False,
    "max_position_embeddings": 64,
    "attention_bias": False,
    "hidden_act": "silu",
    "sliding_window": None,
    "use_sliding_window": False,
}


def without(*names):
    return {name: value for name, value in QWEN3.items() if name not in names}


def test_reads_both_layouts_of_the_rotary_base():
    assert model_config(QWEN3) == CONFIG
    older = without("rope_parameters") | {"rope_theta": 10000, "rope_scaling": None}
    assert model_config(older) == CONFIG


def test_the_rotary_base_in_rope_parameters_counts():
    both = QWEN3 | {"rope_theta": 5.0}
    assert model_config(both).rope_theta == 10000.0


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"attention_bias": 1}, "attention_bias=1; expected true or false"),
        ({"use_sliding_window": True}, "no 'sliding_window'"),
        (
            {"use_sliding_window": True, "sliding_window": 4, "layer_types": ["full"]},
            r"layer_types=\['full'\]; expected .* each of the 2 layers",
        ),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'.*'silu' only"),
        ({"quantization_config": {"bits": 4}}, "quantization_config.*bfloat16"),
        (
            {"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4}},
            "RoPE scaling 'llama3' with no 'low_freq_factor'",
        ),
        ({"rope_scaling": {"rope_type": "mrope"}}, "RoPE scaling 'mrope'.*known"),
        ({"rope_parameters": {"rope_type": "default"}}, "no 'rope_theta'"),
        ({"hidden_size": "16"}, "hidden_size='16'; expected an integer"),
        ({"num_hidden_layers": 0}, "num_hidden_layers=0"),
        ({"vocab_size": 24.0}, "vocab_size=24.0"),
        ({"rms_norm_eps": 0}, "rms_norm_eps=0; expected a number above 0"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps=nan"),
        ({"num_key_value_heads": 3}, r"num_heads \(4\) is not a multiple .* \(3\)"),
        ({"head_dim": 5}, "head_dim is 5; rotary heads are even"),
        ({"architectures": ["OptForCausalLM"]}, "Opt.*known: .*Qwen3ForCausalLM"),
        ({"architectures": None, "model_type": "gpt2"}, "gpt2.*Qwen3ForCausalLM"),
    ],
)
def test_what_is_not_implemented_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        model_config(QWEN3 | fields)


@pytest.mark.parametrize(
    "name",
    [
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "rms_norm_eps",
        "max_position_embeddings",
    ],
)
def test_a_missing_field_is_named(name):
    with pytest.raises(ValueError, match=f"no {name!r}"):
        model_config(without(name))


def test_sizes_are_positive_however_a_config_is_made():
    with pytest.raises(ValueError, match="num_layers is 0"):
        variant(num_layers=0)


def test_files_that_are_no_config_are_refused(tmp_path):
    with pytest.raises(ValueError, match="no config.json; expected a checkpoint"):
        read_config(tmp_path)
    for text, message in [
        ("{", "not valid JSON"),
        ("[1]", "holds a list, not an object"),
        ("\xff", "not valid JSON"),
    ]:
        (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
        with pytest.raises(ValueError, match=message):
            read_config(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(QWEN3))
    assert model_config(read_config(tmp_path)) == CONFIG
