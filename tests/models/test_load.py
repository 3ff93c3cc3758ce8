"""Checkpoints in and out: bits, names, shapes and values."""

import json

import jax
import ml_dtypes
import numpy as np
import pytest
from tiny_decoder import CONFIG, on_device, ragged, random_params, variant

from geomjax.checkpoints.safetensors import SafetensorsSource
from geomjax.checkpoints.writer import write_safetensors
from geomjax.data.characters import character_tokenizer
from geomjax.models import hf
from geomjax.models.attention import dot_product_attention
from geomjax.models.decoder import Decoder
from geomjax.models.load import (
    COMPANIONS,
    Loaded,
    export,
    load,
    make_decoder,
    new_config_json,
)

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def expected_shapes(config):
    shapes = Decoder(config, config.vocab_size).shapes
    return {
        name: hf.leaf(shapes, rule.path).shape[rule.role.stack_depth :]
        for rule in hf.rules(config)
        for name in rule.names(config)
    }


def random_bits(shape, dtype, generator):
    """Any finite value: both zeros, subnormal numbers, the largest ones."""
    bits = {2: np.uint16, 4: np.uint32}[dtype.itemsize]
    raw = generator.integers(0, 2 ** (8 * dtype.itemsize), shape).astype(bits)
    values = raw.view(dtype)
    finite = np.isfinite(values.astype(np.float32))
    lowest_exponent_bit = bits(1 << (np.finfo(dtype).nmant if bits is np.uint32 else 7))
    return np.where(finite, raw, raw ^ lowest_exponent_bit)


def make_tensors(config, dtype, seed=0):
    generator = np.random.default_rng(seed)
    return {
        name: random_bits(shape, dtype, generator).view(dtype)
        for name, shape in expected_shapes(config).items()
    }


def write(directory, config, tensors, **kwargs):
    write_safetensors(directory, tensors, **kwargs)
    model = Decoder(config, config.vocab_size)
    (directory / "config.json").write_text(json.dumps(new_config_json(model)))
    return directory


def raw_bytes(directory):
    source = SafetensorsSource(directory)
    return {
        name: (source.spec(name).dtype, source.read(name).tobytes())
        for name in source.keys()
    }


@pytest.mark.parametrize("shard_bytes", [10**9, 2000], ids=["single", "sharded"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("dtype", [BFLOAT16, np.dtype(np.float32)], ids=str)
def test_load_and_export_keep_every_bit(dtype, tied, shard_bytes, tmp_path):
    config = variant(tie_word_embeddings=tied)
    tensors = make_tensors(config, dtype)
    everything = np.concatenate(
        [t.astype(np.float32).ravel() for t in tensors.values()]
    )
    assert (np.abs(everything) < 2.0**-126).any()  # Subnormal numbers are among them.
    source = write(tmp_path / "source", config, tensors, max_shard_bytes=shard_bytes)
    assert (len(list(source.glob("*.safetensors"))) > 1) == (shard_bytes == 2000)
    model, params = load(source)
    assert model.config == config
    export(tmp_path / "target", params, model, like=source, dtype=dtype)
    assert raw_bytes(tmp_path / "target") == raw_bytes(source)
    exported = json.loads((tmp_path / "target" / "config.json").read_text())
    assert exported["dtype"] == str(dtype)


def test_export_copies_what_training_does_not_change(tmp_path):
    source = write(tmp_path / "a", CONFIG, make_tensors(CONFIG, BFLOAT16))
    config = json.loads((source / "config.json").read_text())
    config |= {"torch_dtype": "float32", "eos_token_id": 3}
    (source / "config.json").write_text(json.dumps(config))
    for name in COMPANIONS:
        (source / name).write_text(name)
    (source / "optimizer.pt").write_text("not part of a checkpoint")
    model, params = load(source)
    export(tmp_path / "b", params, model, like=source)
    assert {path.name for path in (tmp_path / "b").iterdir()} == {
        "config.json",
        "model.safetensors",
        *COMPANIONS,
    }
    assert {"generation_config.json", "chat_template.jinja"} < set(COMPANIONS)
    for name in COMPANIONS:
        assert (tmp_path / "b" / name).read_text() == name
    exported = json.loads((tmp_path / "b" / "config.json").read_text())
    assert exported["eos_token_id"] == 3
    assert exported["dtype"] == "bfloat16"
    assert "torch_dtype" not in exported


def test_export_reads_the_config_before_it_writes(tmp_path):
    model = make_decoder(CONFIG, 24)
    with pytest.raises(ValueError, match=r"no config\.json"):
        export(tmp_path / "b", random_params(model, 0), model, like=tmp_path)
    assert not (tmp_path / "b").exists()


def test_layers_are_stacked_in_order(tmp_path):
    tensors = make_tensors(CONFIG, BFLOAT16)
    _, params = load(write(tmp_path, CONFIG, tensors))
    for layer in range(CONFIG.num_layers):
        name = f"model.layers.{layer}.self_attn.k_proj.weight"
        got = np.asarray(params["layers"]["self_attn"]["k_proj"]["weight"])[layer]
        np.testing.assert_array_equal(got, tensors[name].astype(np.float32))


def test_ten_layers_keep_their_order(tmp_path):
    config = variant(num_layers=11)
    tensors = make_tensors(config, BFLOAT16)
    _, params = load(write(tmp_path, config, tensors))
    norms = np.asarray(params["layers"]["self_attn"]["q_norm"]["weight"])
    for layer in (2, 10):
        name = f"model.layers.{layer}.self_attn.q_norm.weight"
        np.testing.assert_array_equal(norms[layer], tensors[name].astype(np.float32))


def test_all_wrong_tensors_are_listed_at_once(tmp_path):
    tensors = make_tensors(CONFIG, BFLOAT16)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    tensors["model.layers.0.self_attn.q_proj.bias"] = np.zeros(24, BFLOAT16)
    tensors["model.norm.weight"] = np.zeros(17, BFLOAT16)
    with pytest.raises(ValueError, match="does not fit Qwen3ForCausalLM") as error:
        load(write(tmp_path, CONFIG, tensors))
    lines = str(error.value).splitlines()[1:]
    assert lines == [
        "unexpected model.layers.0.self_attn.q_proj.bias (24,)",
        "missing model.layers.1.mlp.up_proj.weight (20, 16)",
        "model.norm.weight has shape (17,), expected (16,)",
    ]


class TestTiedHead:
    config = variant(tie_word_embeddings=True)

    def test_stored_and_equal_is_read(self, tmp_path):
        tensors = make_tensors(self.config, BFLOAT16)
        tensors[HEAD] = tensors[EMBEDDING]
        _, params = load(write(tmp_path, self.config, tensors))
        assert "lm_head" not in params

    def test_stored_and_different_is_refused(self, tmp_path):
        tensors = make_tensors(self.config, BFLOAT16)
        tensors[HEAD] = tensors[EMBEDDING].copy()
        tensors[HEAD][3, 2] = 1.5
        with pytest.raises(ValueError, match=f"{HEAD} differs from {EMBEDDING}"):
            load(write(tmp_path, self.config, tensors))

    def test_stored_in_place_of_the_embedding_is_refused(self, tmp_path):
        tensors = make_tensors(self.config, BFLOAT16)
        tensors[HEAD] = tensors.pop(EMBEDDING)
        with pytest.raises(ValueError, match=f"missing {EMBEDDING}"):
            load(write(tmp_path, self.config, tensors))


def test_values_that_are_not_finite_are_refused_by_name(tmp_path):
    tensors = make_tensors(CONFIG, np.dtype(np.float32))
    names = "model.layers.1.mlp.gate_proj.weight", "model.norm.weight"
    tensors[names[0]].flat[5] = np.nan
    tensors[names[1]].flat[0] = -np.inf
    with pytest.raises(ValueError, match=f"not finite in float32: {', '.join(names)}"):
        load(write(tmp_path, CONFIG, tensors))


def test_values_beyond_the_parameters_dtype_are_refused_by_name(tmp_path):
    tensors = {
        name: np.ones(shape, np.float32)
        for name, shape in expected_shapes(CONFIG).items()
    }
    name = "model.layers.0.mlp.down_proj.weight"
    tensors[name].flat[2] = 7e4
    write(tmp_path, CONFIG, tensors)
    with pytest.raises(ValueError, match=f"not finite in float16: {name}$"):
        load(tmp_path, param_dtype=np.float16)
    _, params = load(tmp_path, param_dtype=BFLOAT16)
    assert params["norm"]["weight"].dtype == BFLOAT16


def test_padded_rows_enter_no_softmax_and_survive_export(tmp_path):
    source = write(tmp_path / "a", CONFIG, make_tensors(CONFIG, BFLOAT16))
    model, params = load(source, vocab_size=20)
    assert model.vocab_size == 20
    assert model.unembedding(params).shape == (20, 16)
    export(tmp_path / "b", params, model, like=source)
    assert raw_bytes(tmp_path / "b") == raw_bytes(source)
    for size in (0, 25):
        with pytest.raises(ValueError, match=f"{size} tokens"):
            load(source, vocab_size=size)


class TestBesideTheWeights:
    def test_the_tokenizer_comes_with_its_template(self, tmp_path):
        made = character_tokenizer("ab", pad="<pad>", eos="<eos>")
        made.chat_template = "{% for m in messages %}[{{ m.content }}]{% endfor %}"
        made.save_pretrained(tmp_path)
        write(tmp_path, CONFIG, make_tensors(CONFIG, BFLOAT16))
        tokenizer = load(tmp_path).tokenizer
        messages = [{"role": "user", "content": "ab"}]
        text = tokenizer.apply_chat_template(messages, tokenize=False)
        assert text == "[ab]"
        assert tokenizer.encode("ab") == made.encode("ab")

    def test_the_image_processor_comes_too(self, tmp_path):
        source = write(tmp_path, CONFIG, make_tensors(CONFIG, BFLOAT16))
        fields = {"patch_size": 4, "merge_size": 3, "min_pixels": 144}
        text = json.dumps(fields | {"image_processor_type": "Qwen2VLImageProcessor"})
        (source / "preprocessor_config.json").write_text(text)
        assert load(source).image_processor.merge_size == 3

    def test_what_is_not_there_is_missed_when_it_is_asked_for(self, tmp_path):
        loaded = load(write(tmp_path, CONFIG, make_tensors(CONFIG, BFLOAT16)))
        with pytest.raises(ValueError, match=r"has no tokenizer\.json"):
            _ = loaded.tokenizer
        with pytest.raises(ValueError, match="image processor"):
            _ = loaded.image_processor
        with pytest.raises(ValueError, match="no files beside it"):
            _ = Loaded(loaded.model, loaded.params).tokenizer


def test_attention_is_injected(tmp_path):
    source = write(tmp_path, CONFIG, make_tensors(CONFIG, BFLOAT16))
    calls = []

    def attend(query, key, value, visible, precision):
        calls.append((visible.segment_ids is not None, precision))
        return query

    model, params = load(source, attention=attend)
    model.apply(params, *on_device(ragged(0, 24, [(0, 0)], length=3)))
    assert calls == [(True, jax.lax.Precision.HIGHEST)] * CONFIG.num_layers
    assert load(source).model.attention is dot_product_attention


def test_precision_goes_with_the_compute_dtype():
    assert make_decoder(CONFIG, 24).precision.name == "HIGHEST"
    assert make_decoder(CONFIG, 24, ml_dtypes.bfloat16).precision.name == "DEFAULT"


def test_data_that_follows_the_weights_goes_there_and_back():
    model = make_decoder(CONFIG, 24)
    params = random_params(model, 1)
    tensors = dict(hf.to_hf(params, CONFIG, lambda array: array > 0))
    mask = hf.from_hf(tensors, CONFIG)
    up = params["layers"]["mlp"]["up_proj"]["weight"]
    np.testing.assert_array_equal(mask["layers"]["mlp"]["up_proj"]["weight"], up > 0)
    assert hf.roles(CONFIG).keys() == {rule.path for rule in hf.rules(CONFIG)}
    inputs = on_device(ragged(0, 24, [(0, 0)], length=3))
    apply = jax.jit(model.apply)
    again = hf.from_hf(dict(hf.to_hf(params, CONFIG)), CONFIG)
    np.testing.assert_array_equal(apply(again, *inputs), apply(params, *inputs))
