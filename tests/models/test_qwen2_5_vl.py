"""Qwen2.5-VL without PyTorch: golden values, the cache, padding, names and errors."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from tiny_vl import (
    CONFIG,
    IMAGE,
    MODEL,
    prompts_and_images,
    ragged_batch,
    random_params,
    variant,
)

from geomjax.checkpoints.sources import DictSource
from geomjax.data.patches import ImagePatches
from geomjax.meshes import ONE_DEVICE, Placement, mesh_from_string
from geomjax.models import hf
from geomjax.models.families import model_config
from geomjax.models.fields import read_config
from geomjax.models.load import export, load, make_model
from geomjax.models.mrope import batch_positions
from geomjax.models.qwen2_5_vl import place_images
from geomjax.models.read import read_params
from geomjax.models.vision_layout import arrange
from geomjax.optim.roles import leaf_paths
from geomjax.rollout.sample import sample
from geomjax.typing import LanguageModel

GOLDEN = Path(__file__).parent / "golden_vl"
LEFT = [(0, 0)] * 4  # Padded on the left, to the longest.


@pytest.fixture(scope="module")
def golden():
    with np.load(GOLDEN / "golden.npz") as data:
        return dict(data)


def golden_rows(golden):
    """The images of each row."""
    counts = golden["grids"].prod(axis=1)
    values = np.split(golden["pixel_values"], np.cumsum(counts)[:-1])
    images = [
        ImagePatches(v, tuple(g.tolist()))
        for v, g in zip(values, golden["grids"], strict=True)
    ]
    ends = np.cumsum(golden["images_per_row"])
    starts = ends - golden["images_per_row"]
    return [images[start:end] for start, end in zip(starts, ends, strict=True)]


def apply(model, params, images, *inputs):
    return jax.jit(lambda p, i, *args: model.with_images(i).apply(p, *args))(
        params, images, *inputs
    )


def test_positions_equal_those_of_transformers(golden):
    positions, deltas = batch_positions(
        golden["tokens"],
        golden["segment_ids"],
        [[image.grid for image in row] for row in golden_rows(golden)],
        image_token=IMAGE,
        merge_size=2,
    )
    np.testing.assert_array_equal(positions, golden["positions"])
    np.testing.assert_array_equal(deltas, golden["deltas"])


def test_features_equal_those_of_transformers(golden):
    model, params = load(GOLDEN)
    vision = model.config.vision
    rows, places = arrange(golden_rows(golden), vision.window, vision.patch_values)
    out = np.asarray(jax.jit(model.vision.apply)(params["visual"], *rows))
    ours = [out[b, at] for b, row in enumerate(places) for at in row]
    assert np.abs(golden["features"]).max() > 1
    np.testing.assert_allclose(np.concatenate(ours), golden["features"], atol=1e-4)


def test_logits_equal_those_of_transformers(golden):
    model, params = load(GOLDEN)
    tokens, segments = golden["tokens"], golden["segment_ids"]
    prompts = [row[s != 0] for row, s in zip(tokens, segments, strict=True)]
    images = place_images(model.config, prompts, golden_rows(golden))
    places = np.maximum(np.cumsum(segments, axis=1) - 1, 0).astype(np.int32)
    hidden = apply(model, params, images, tokens, places, segments)
    logits = np.asarray(hidden) @ np.asarray(model.decoder.unembedding(params)).T
    real = segments != 0
    assert np.abs(golden["logits"][real]).max() > 1
    np.testing.assert_allclose(logits[real], golden["logits"][real], atol=1e-4)


def test_cached_decoding_equals_the_full_forward_pass():
    """Prefill of the prompts, then token by token; and all of it in one pass."""
    params, batch, steps = random_params(MODEL), ragged_batch(CONFIG, LEFT), 5
    length = batch.tokens.shape[1]
    new = np.random.default_rng(1).integers(0, 40, (4, steps)).astype(np.int32)
    new[0, 1] = IMAGE  # Sampled, a placeholder is a token like any other.
    tokens, places, segments = batch.inputs
    later = places[:, -1:] + 1 + jnp.arange(steps)[None]
    full = apply(
        MODEL,
        params,
        batch.images,
        jnp.concatenate([tokens, new], axis=1),
        jnp.concatenate([places, later], axis=1),
        jnp.pad(segments, ((0, 0), (0, steps)), constant_values=1),
    )

    @jax.jit
    def cached(params, images, new):
        model = MODEL.with_images(images)
        params = model.split_layers(params)
        hidden, cache = model.prefill(params, *batch.inputs, length + steps)
        out = [hidden]
        for i in range(steps):
            step = (new[:, i], later[:, i], jnp.ones(4, jnp.int32))
            hidden, cache = model.decode(params, *step, cache)
            out.append(hidden[:, None])
        return jnp.concatenate(out, axis=1)

    got = cached(params, batch.images, new)
    real = np.pad(batch.segment_ids, ((0, 0), (0, steps)), constant_values=1) != 0
    np.testing.assert_allclose(got[real], np.asarray(full)[real], atol=1e-5)


def test_the_last_slots_alone_are_those_of_all():
    params, batch = random_params(MODEL), ragged_batch(CONFIG, LEFT)

    def both(params, images, *inputs):
        model = MODEL.with_images(images)
        split = model.split_layers(params)
        prefilled, _ = model.prefill(split, *inputs, inputs[0].shape[1], last=1)
        return model.apply(params, *inputs), model.apply(params, *inputs, 2), prefilled

    everything, two, one = jax.jit(both)(params, batch.images, *batch.inputs)
    np.testing.assert_allclose(two, everything[:, -2:], atol=1e-5)
    np.testing.assert_allclose(one, everything[:, -1:], atol=1e-5)


def test_a_prompt_is_the_same_alone_and_padded_in_company():
    """Nor does it matter what else the batch holds, or on which side it is padded."""
    params = random_params(MODEL)
    together = ragged_batch(CONFIG, [(0, 0), (3, 0), (1, 2), (0, 4)])
    hidden = np.asarray(apply(MODEL, params, together.images, *together.inputs))
    for b, (prompt, row) in enumerate(
        zip(together.prompts, together.rows, strict=True)
    ):
        images = place_images(CONFIG, [prompt], [row])
        shape = (1, len(prompt))
        inputs = (
            jnp.asarray(prompt)[None],
            jnp.arange(len(prompt), dtype=jnp.int32)[None],
            jnp.ones(shape, jnp.int32),
        )
        alone = np.asarray(apply(MODEL, params, images, *inputs))[0]
        real = together.segment_ids[b] != 0
        np.testing.assert_allclose(hidden[b, real], alone, atol=1e-5)


def test_images_matter_and_belong_to_their_rows():
    params, batch = random_params(MODEL), ragged_batch(CONFIG, LEFT)
    before = np.asarray(apply(MODEL, params, batch.images, *batch.inputs))
    patches = batch.images.patches.at[0].multiply(-1.0)
    changed = batch.images._replace(patches=patches)
    after = np.asarray(apply(MODEL, params, changed, *batch.inputs))
    assert np.abs(after[0, -1] - before[0, -1]).max() > 1e-3
    np.testing.assert_array_equal(after[1:], before[1:])


def test_text_alone_is_what_the_decoder_makes_of_it():
    params = random_params(MODEL)
    tokens = np.random.default_rng(2).integers(0, 29, (2, 6)).astype(np.int32)
    places = np.tile(np.arange(6, dtype=np.int32), (2, 1))
    images = place_images(CONFIG, list(tokens), [[], []])
    inputs = [jnp.asarray(x) for x in (tokens, places, np.ones_like(tokens))]
    text = {name: part for name, part in params.items() if name != "visual"}
    np.testing.assert_allclose(
        apply(MODEL, params, images, *inputs),
        jax.jit(MODEL.decoder.apply)(text, *inputs),
        atol=1e-5,
    )


def test_rollouts_of_prompts_with_images_score_what_they_sampled():
    """The log-probabilities of a rollout are those of a forward pass over it."""
    params, batch = random_params(MODEL), ragged_batch(CONFIG, LEFT)

    def rollout_and_score(params, images, *inputs):
        model = MODEL.with_images(images)
        assert isinstance(model, LanguageModel)
        done = sample(
            model,
            params,
            *inputs,
            jax.random.key(3),
            max_new_tokens=6,
            stop_tokens=(5, 17),
            temperature=1.0,
        )
        hidden = model.apply(params, done.tokens, done.positions, done.segment_ids)
        logits = jnp.einsum("btd,vd->btv", hidden, model.unembedding(params))
        following = jnp.roll(done.tokens, -1, axis=1)[:, :, None]
        scores = jnp.take_along_axis(jax.nn.log_softmax(logits), following, axis=-1)
        return done, jnp.roll(scores[:, :, 0], 1, axis=1)

    done, scores = jax.jit(rollout_and_score)(params, batch.images, *batch.inputs)
    completion = np.asarray(done.completion)
    assert completion.sum() > 8
    np.testing.assert_allclose(
        scores[completion], done.log_probs[completion], atol=1e-5
    )


def test_prompts_and_images_that_do_not_match_are_named():
    prompts, rows = prompts_and_images(CONFIG)
    with pytest.raises(ValueError, match="images for 3 prompts, but there are 4"):
        place_images(CONFIG, prompts, rows[:3])
    with pytest.raises(ValueError, match="prompt 0: 6 placeholders") as raised:
        place_images(CONFIG, prompts, [rows[1], rows[1], rows[0], rows[3]])
    assert "prompt 2: 0 placeholders (token 30) for 1 images of [6]" in str(
        raised.value
    )
    assert "prompt 1" not in str(raised.value)


def test_every_parameter_has_a_role_of_as_many_axes():
    roles = hf.roles(CONFIG)
    paths = leaf_paths(MODEL.shapes)
    assert roles.keys() == set(paths)
    for path in paths:
        shape = hf.leaf(MODEL.shapes, path).shape
        assert len(roles[path].logical_axes) == len(shape), path


def stored(params, *, in_memory, config=CONFIG):
    """The tensors of a checkpoint, with either set of names."""
    tensors = dict(hf.to_hf(params, config))
    if not in_memory:
        return tensors

    def name(published):
        if published.startswith("visual."):
            return f"model.{published}"
        return published.replace("model.", "model.language_model.", 1)

    return {name(key): tensor for key, tensor in tensors.items()}


@pytest.mark.parametrize("in_memory", [False, True])
@pytest.mark.parametrize("mesh", [None, "fsdp=2,tensor=2,data=2"])
def test_reading_inverts_writing_bit_for_bit(in_memory, mesh):
    # Two heads of keys, so that they can be split over two devices.
    config = variant(text=dataclasses.replace(CONFIG.text, num_kv_heads=2))
    shapes = make_model(config).shapes
    params = jax.tree.map(
        lambda x: x.astype(jnp.bfloat16), random_params(make_model(config), seed=4)
    )
    source = DictSource(stored(params, in_memory=in_memory, config=config))
    placement = Placement(mesh_from_string(mesh)) if mesh else ONE_DEVICE
    back = read_params(source, config, shapes, ml_dtypes.bfloat16, placement)
    jax.tree.map(np.testing.assert_array_equal, back, params)
    again = hf.from_hf(stored(back, in_memory=False, config=config), config)
    jax.tree.map(np.testing.assert_array_equal, again, params)
    down = back["visual"]["blocks"]["mlp"]["down_proj"]["weight"]
    assert len(down.sharding.device_set) == (8 if mesh else 1)
    if mesh:
        assert down.sharding.shard_shape(down.shape) == (2, 8, 6)


def test_everything_that_does_not_fit_is_listed_at_once():
    tensors = stored(random_params(MODEL), in_memory=False)
    shape = tensors["visual.blocks.1.attn.qkv.weight"].shape
    tensors["visual.blocks.1.attn.qkv.weight"] = np.zeros((3, 3), np.float32)
    del tensors["visual.merger.mlp.2.bias"], tensors["model.norm.weight"]
    tensors["visual.blocks.2.norm1.weight"] = np.ones(16, np.float32)
    tensors["model.visual.blocks.0.norm1.weight"] = np.ones(16, np.float32)
    with pytest.raises(ValueError, match="does not fit Qwen2_5_VLFor") as raised:
        read_params(DictSource(tensors), CONFIG, MODEL.shapes, np.float32)
    message = str(raised.value)
    for line in (
        f"visual.blocks.1.attn.qkv.weight has shape (3, 3), expected {shape}",
        "missing visual.merger.mlp.2.bias (12,)",
        "missing model.norm.weight (12,)",
        "unexpected visual.blocks.2.norm1.weight (16,)",
        "visual.blocks.0.norm1.weight is there twice",
    ):
        assert line in message


def test_overflow_is_refused_by_name():
    tensors = stored(random_params(MODEL), in_memory=False)
    tensors["visual.blocks.1.mlp.up_proj.bias"] = np.full(12, 1e6, np.float32)
    with pytest.raises(ValueError, match="float16: visual.blocks.1.mlp.up_proj.bias"):
        read_params(DictSource(tensors), CONFIG, MODEL.shapes, np.float16)


def test_the_golden_checkpoint_is_exported_bit_for_bit(tmp_path):
    model, params = load(GOLDEN)
    export(tmp_path, params, model, like=GOLDEN, dtype=np.float32)
    back = load(tmp_path)
    assert back.model.config == model.config
    jax.tree.map(np.testing.assert_array_equal, back.params, params)


PUBLISHED = {
    "architectures": ["Qwen2_5_VLForConditionalGeneration"],
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "vision_start_token_id": 151652,
    "vision_end_token_id": 151653,
    "vision_token_id": 151654,
    "image_token_id": 151655,
    "video_token_id": 151656,
    "hidden_act": "silu",
    "hidden_size": 3584,
    "initializer_range": 0.02,
    "intermediate_size": 18944,
    "max_position_embeddings": 128000,
    "max_window_layers": 28,
    "model_type": "qwen2_5_vl",
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "use_sliding_window": False,
    "vision_config": {
        "depth": 32,
        "hidden_act": "silu",
        "hidden_size": 1280,
        "intermediate_size": 3420,
        "num_heads": 16,
        "in_chans": 3,
        "out_hidden_size": 3584,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "spatial_patch_size": 14,
        "window_size": 112,
        "fullatt_block_indexes": [7, 15, 23, 31],
        "tokens_per_second": 2,
        "temporal_patch_size": 2,
    },
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
    "vocab_size": 152064,
}


def test_the_flat_configuration_of_published_checkpoints_is_read():
    config = model_config(PUBLISHED)
    assert config.mrope_sections == (16, 24, 24)
    assert config.text.rope_theta == 1e6
    assert config.text.rope_scaling is None
    assert config.text.qkv_bias
    assert config.text.head_dim == 128
    assert config.image_token == 151655


def test_both_layouts_of_a_configuration_are_the_same():
    nested = {
        name: PUBLISHED[name]
        for name in (
            "architectures",
            "image_token_id",
            "video_token_id",
            "vision_config",
        )
    }
    nested["text_config"] = {
        name: value for name, value in PUBLISHED.items() if name not in nested
    } | {"model_type": "qwen2_5_vl_text", "layer_types": ["full_attention"] * 28}
    assert model_config(nested) == model_config(PUBLISHED)
    golden = model_config(read_config(GOLDEN))
    assert golden.text.tie_word_embeddings
    assert golden.mrope_sections == (1, 1, 1)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"architectures": ["Qwen2VLForConditionalGeneration"]},
            "Qwen2VLFor.*known: .*Qwen2_5_VLFor",
        ),
        ({"quantization_config": {"bits": 4}}, "quantised"),
        ({"vision_config": None}, "no vision_config object"),
        ({"rope_scaling": {"type": "mrope"}}, "mrope_section=None"),
        (
            {"rope_scaling": {"type": "mrope", "mrope_section": [16, 24]}},
            "three integers",
        ),
        (
            {"rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 20]}},
            "sum to 64",
        ),
        ({"use_sliding_window": True, "max_window_layers": 20}, "sliding_window=32768"),
        ({"video_token_id": None}, "no 'video_token_id'"),
        ({"image_token_id": "<image>"}, "image_token_id='<image>'"),
        ({"hidden_size": 2048, "num_attention_heads": 16}, "out_hidden_size=3584"),
        ({"image_token_id": 152064}, "image_token_id=152064"),
        ({"rope_scaling": {"type": "ntk", "mrope_section": [16, 24, 24]}}, "ntk"),
    ],
)
def test_configurations_that_are_not_implemented_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        model_config(PUBLISHED | fields)
