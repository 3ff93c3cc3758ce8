"""The decoder as a function: padding, caching, vocabulary, precision, checks."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_decoder import CONFIG, on_device, ragged, random_params, variant

from geomjax.models.decoder import UNROLLED_LAYERS, Decoder

MODEL = Decoder(CONFIG, CONFIG.vocab_size)
APPLY = jax.jit(MODEL.apply)


@pytest.fixture(scope="module")
def params():
    return random_params(MODEL, seed=0)


def test_padding_changes_no_hidden_state(params):
    tokens, positions, segments = ragged(1, 24, [(0, 0)] * 2, length=6)
    alone = np.asarray(APPLY(params, tokens, positions, segments))
    for left, right in [(3, 0), (0, 3), (1, 2)]:
        padded = ragged(2, 24, [(left, right)] * 2, length=9)
        inside = slice(left, 9 - right)
        padded[0][:, inside] = tokens
        got = np.asarray(APPLY(params, *padded))[:, inside]
        np.testing.assert_allclose(got, alone, rtol=1e-5, atol=1e-5)


def test_segments_do_not_see_each_other(params):
    tokens, positions, segments = ragged(1, 24, [(0, 0)] * 2, length=8)
    packed = np.array([[0, 1, 2, 0, 1, 2, 3, 4]] * 2, np.int32)
    segments = np.array([[1, 1, 1, 2, 2, 2, 2, 2]] * 2, np.int32)
    together = np.asarray(APPLY(params, tokens, packed, segments))
    other = tokens.copy()
    other[:, :3] = (other[:, :3] + 1) % 24
    apart = np.asarray(APPLY(params, other, packed, segments))
    np.testing.assert_array_equal(together[:, 3:], apart[:, 3:])
    assert np.abs(together[:, :3] - apart[:, :3]).max() > 1e-2


def test_no_position_sees_a_later_one(params):
    tokens, positions, segments = ragged(1, 24, [(0, 0)] * 2, length=8)
    hidden = np.asarray(APPLY(params, tokens, positions, segments))
    changed = tokens.copy()
    changed[:, 5] = (changed[:, 5] + 1) % 24
    other = np.asarray(APPLY(params, changed, positions, segments))
    np.testing.assert_array_equal(hidden[:, :5], other[:, :5])
    assert np.abs(hidden[:, 5:] - other[:, 5:]).max(axis=(0, 2)).min() > 1e-4


@pytest.mark.parametrize(
    ("num_kv_heads", "tied"), [(4, False), (1, True)], ids=["plain", "grouped, tied"]
)
def test_prefill_and_decode_equal_the_full_pass(num_kv_heads, tied):
    config = variant(num_kv_heads=num_kv_heads, tie_word_embeddings=tied)
    model = Decoder(config, config.vocab_size)
    params = random_params(model, seed=3)
    inputs = ragged(4, 24, [(0, 0), (2, 0), (4, 0)], length=9)
    expected = np.asarray(jax.jit(model.apply)(params, *inputs))
    split, prompt = model.split_layers(params), 5
    hidden, cache = jax.jit(model.prefill, static_argnums=4)(
        split, *(x[:, :prompt] for x in inputs), 9
    )
    got = [np.asarray(hidden)]
    decode = jax.jit(model.decode)
    for t in range(prompt, 9):
        hidden, cache = decode(split, *(x[:, t] for x in inputs), cache)
        got.append(np.asarray(hidden)[:, None])
    assert int(cache.length) == 9
    real = inputs[2] != 0
    np.testing.assert_allclose(
        np.concatenate(got, axis=1)[real], expected[real], rtol=1e-5, atol=1e-5
    )


def test_a_deep_stack_is_scanned_and_equals_the_unrolled_layers():
    config = variant(num_layers=UNROLLED_LAYERS + 1)
    model = Decoder(config, config.vocab_size)
    params = random_params(model, seed=5)
    inputs = on_device(ragged(6, 24, [(0, 0), (3, 0)], length=7))
    assert "stablehlo.while" in jax.jit(model.apply).lower(params, *inputs).as_text()
    prefill = jax.jit(model.prefill, static_argnums=4)
    expected, _ = prefill(model.split_layers(params), *inputs, 7)
    got = jax.jit(model.apply)(params, *inputs)
    real = inputs[2] != 0
    np.testing.assert_allclose(got[real], expected[real], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("last", [None, 2])
@pytest.mark.parametrize("num_layers", [2, UNROLLED_LAYERS + 1])
def test_split_parameters_give_the_same_states(num_layers, last):
    config = variant(num_layers=num_layers)
    model = Decoder(config, config.vocab_size)
    params = random_params(model, seed=3)
    inputs = on_device(ragged(4, 24, [(0, 0), (2, 1)], length=7))
    real = np.asarray(inputs[2] != 0)[:, slice(None if last is None else -last, None)]
    apply = jax.jit(model.apply, static_argnums=4)
    expected = np.asarray(apply(params, *inputs, last))
    split = model.split_layers(params)
    got = np.asarray(apply(split, *inputs, last))
    np.testing.assert_allclose(got[real], expected[real], rtol=1e-5, atol=1e-5)
    fewer = split | {"layers": split["layers"][1:]}
    with pytest.raises(ValueError, match="parameters do not fit"):
        model.apply(fewer, *inputs)


def test_recomputed_blocks_have_the_same_gradient(params):
    inputs = on_device(ragged(7, 24, [(0, 0), (2, 0)], length=5))

    def gradient(remat):
        model = Decoder(CONFIG, CONFIG.vocab_size, remat=remat)
        loss = lambda p: jnp.square(model.apply(p, *inputs)).sum()  # noqa: E731
        return jax.jit(jax.grad(loss))(params)

    kept, recomputed = gradient(False), gradient(True)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4),
        kept,
        recomputed,
    )


def test_unembedding_is_cut_to_the_tokenizer(params):
    model = Decoder(CONFIG, 20)
    head = params["lm_head"]["weight"]
    np.testing.assert_array_equal(model.unembedding(params), head[:20])
    tied = Decoder(variant(tie_word_embeddings=True), 20)
    embedding = params["embed_tokens"]["weight"]
    np.testing.assert_array_equal(tied.unembedding(params), embedding[:20])
    assert "lm_head" not in tied.shapes


@pytest.mark.parametrize("vocab_size", [0, 25])
def test_a_tokenizer_that_does_not_fit_is_refused(vocab_size):
    with pytest.raises(ValueError, match=f"{vocab_size} tokens .* has 24 rows"):
        Decoder(CONFIG, vocab_size)


@pytest.mark.parametrize(
    ("dtype", "precision"),
    [(jnp.float32, "HIGHEST"), (jnp.bfloat16, "DEFAULT")],
    ids=str,
)
def test_every_product_states_its_precision(params, dtype, precision):
    """Float32 models must not fall to a backend's default, attention included."""
    model = Decoder(CONFIG, 24, dtype, jax.lax.Precision[precision])
    inputs = on_device(ragged(1, 24, [(0, 0)], length=4))
    split = model.split_layers(params)
    _, cache = jax.eval_shape(lambda p: model.prefill(p, *inputs, 5), split)
    last = [x[:, 0] for x in inputs]
    # The product of positions and frequencies is exact in any model; decoding takes the
    # angles from a table.
    for lowered, exact in (
        (jax.jit(model.apply).lower(params, *inputs), 1),
        (jax.jit(model.decode).lower(split, *last, cache), 0),
    ):
        text = lowered.as_text()
        products = re.findall(r"dot_general .*?precision = \[(\w+), \w+\]", text)
        assert len(products) == text.count("stablehlo.dot_general") >= 10
        stated = [precision] * (len(products) - exact) + ["HIGHEST"] * exact
        assert sorted(products) == sorted(stated)


def test_bfloat16_compute_is_near_float32(params):
    inputs = ragged(8, 24, [(0, 0), (3, 0)], length=6)
    narrow = Decoder(CONFIG, 24, jnp.bfloat16, jax.lax.Precision.DEFAULT)
    got = jax.jit(narrow.apply)(params, *inputs)
    assert got.dtype == jnp.bfloat16
    real = inputs[2] != 0
    expected = np.asarray(APPLY(params, *inputs))[real]
    error = np.asarray(got.astype(jnp.float32))[real] - expected
    assert 1e-4 < np.abs(error).mean() / np.abs(expected).mean() < 0.05


def test_init_scales_each_matrix_by_its_fan_in():
    config = variant(hidden_size=64, intermediate_size=256, vocab_size=96)
    params = Decoder(config, 96).init(jax.random.key(0))
    down = np.asarray(params["layers"]["mlp"]["down_proj"]["weight"])
    assert down.std() == pytest.approx(256**-0.5, rel=0.05)
    up = np.asarray(params["layers"]["mlp"]["up_proj"]["weight"])
    assert up.std() == pytest.approx(64**-0.5, rel=0.05)
    assert not np.array_equal(up[0], up[1])
    assert (np.asarray(params["norm"]["weight"]) == 1).all()
    assert (np.asarray(params["layers"]["self_attn"]["q_norm"]["weight"]) == 1).all()


class TestCheck:
    inputs = on_device(ragged(1, 24, [(0, 0)], length=4))

    def test_lists_missing_unknown_and_misshaped_parameters(self, params):
        broken = {
            "embed_tokens": {"weight": params["embed_tokens"]["weight"][:, :3]},
            "layers": params["layers"],
            "lm_head": params["lm_head"],
            "extra": jnp.zeros(2),
        }
        with pytest.raises(ValueError, match="do not fit the model") as error:
            MODEL.apply(broken, *self.inputs)
        assert "['norm']['weight']: expected (16,), got None" in str(error.value)
        assert "['extra']: expected None, got (2,)" in str(error.value)
        assert "['embed_tokens']['weight']: expected (24, 16), got (24, 3)" in str(
            error.value
        )

    def test_swapped_names_of_one_shape_are_found(self, params):
        layers = dict(params["layers"])
        layers["final"] = layers.pop("input_layernorm")
        with pytest.raises(ValueError, match="input_layernorm.*got None"):
            MODEL.apply(params | {"layers": layers}, *self.inputs)

    def test_every_split_layer_is_checked(self, params):
        split = MODEL.split_layers(params)
        first, second = split["layers"]
        broken = second | {"mlp": {"up_proj": second["mlp"]["up_proj"]}}
        with pytest.raises(ValueError, match=r"\['layers'\]\[1\].*down_proj"):
            MODEL.prefill(split | {"layers": (first, broken)}, *self.inputs, 4)
        with pytest.raises(ValueError, match=r"\['layers'\]\[1\]"):
            MODEL.prefill(split | {"layers": (first,)}, *self.inputs, 4)

    def test_a_cache_takes_split_parameters_alone(self, params):
        with pytest.raises(ValueError, match="do not fit"):
            MODEL.prefill(params, *self.inputs, 4)

    def test_a_prompt_that_does_not_fit_the_cache_is_refused(self, params):
        with pytest.raises(ValueError, match="4 tokens do not fit 3 cache slots"):
            MODEL.prefill(MODEL.split_layers(params), *self.inputs, 3)


@pytest.mark.parametrize("remat", [False, True])
@pytest.mark.parametrize("num_layers", [1, 2, UNROLLED_LAYERS + 1])
def test_the_last_slots_alone_equal_those_of_the_full_pass(num_layers, remat):
    config = variant(num_layers=num_layers)
    model = Decoder(config, config.vocab_size, remat=remat)
    params = random_params(model, seed=8)
    inputs = on_device(ragged(9, 24, [(0, 0), (2, 0)], length=6))

    def with_gradient(select):
        loss = lambda p: (jnp.sin(x := select(p)).sum(), x)  # noqa: E731
        return jax.jit(jax.grad(loss, has_aux=True))(params)

    got = with_gradient(lambda p: model.apply(p, *inputs, last=3))
    expected = with_gradient(lambda p: model.apply(p, *inputs)[:, -3:])
    assert got[1].shape[1] == 3
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4),
        got,
        expected,
    )
    split = model.split_layers(params)
    full, cache = model.prefill(split, *inputs, 7)
    one, same = model.prefill(split, *inputs, 7, last=1)
    np.testing.assert_allclose(one, full[:, -1:], rtol=1e-5, atol=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5),
        same,
        cache,
    )
