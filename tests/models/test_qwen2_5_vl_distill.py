"""Distillation on a file in Geometry3K's schema, images and all, judged as maths."""

import dataclasses
import functools
import io
import json
import string

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from tiny_vl import CONFIG, random_params

from geomjax.data.answers import decode_completions
from geomjax.data.batches import make_batches
from geomjax.data.characters import character_tokenizer
from geomjax.data.image_processor import ImageProcessor
from geomjax.data.image_prompts import (
    ImageReading,
    encode_image_prompts,
    read_images,
)
from geomjax.data.pipeline import Pipeline
from geomjax.data.sources import read_source
from geomjax.models import hf
from geomjax.models.load import make_model
from geomjax.models.qwen2_5_vl import place_images
from geomjax.objectives.divergence import forward_kl
from geomjax.objectives.top_k import top_k
from geomjax.optim.build import OptimizerSpec, build
from geomjax.rewards.judge import Judge
from geomjax.train.step import Sampling, init_state, make_distill_step, rollout

MARKS = ["<|image|>", "<|video|>"]
TEMPLATE = (
    "{% for m in messages %}{{ m.role[0] }}:{% for part in m.content %}"
    "{% if part.type == 'image' %}<|image|>{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}\n{% endfor %}{% if add_generation_prompt %}a:{% endif %}"
)


def figure(seed, size):
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def file(tmp_path):
    """As the hub's Parquet: a list of images, each with bytes and a path."""
    rows = [
        {
            "images": [{"bytes": figure(i, (8 + 4 * i, 16)), "path": None}],
            "problem": f"<image>Find x if y is {i}.",
            "answer": str(i),
        }
        for i in range(4)
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "train.parquet")
    return tmp_path / "train.parquet"


@pytest.fixture
def tokenizer():
    made = character_tokenizer(string.printable[:95] + "\n", pad="<pad>", eos="<eos>")
    made.add_special_tokens({"additional_special_tokens": MARKS})
    made.chat_template = TEMPLATE
    return made


@pytest.fixture
def processor(tmp_path):
    vision = CONFIG.vision
    config = {
        "image_processor_type": "Qwen2VLImageProcessor",
        "min_pixels": 16,
        "max_pixels": 256,
        "patch_size": vision.patch_size,
        "temporal_patch_size": vision.temporal_patch_size,
        "merge_size": vision.merge_size,
    }
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(config))
    return ImageProcessor(tmp_path)


@pytest.fixture
def config(tokenizer):
    image, video = tokenizer.convert_tokens_to_ids(MARKS)
    text = dataclasses.replace(
        CONFIG.text, vocab_size=len(tokenizer), max_position_embeddings=1024
    )
    return dataclasses.replace(CONFIG, text=text, image_token=image, video_token=video)


def encode(examples, tokenizer, processor, config, limit=600, **settings):
    reading = image_reading(processor, config)
    return encode_image_prompts(examples, tokenizer, reading, limit, **settings)


def image_reading(processor, config):
    place = functools.partial(place_images, config)
    return ImageReading(processor, place, config.image_token, config.video_token)


def test_distillation_on_geometry3k(file, tokenizer, processor, config):
    examples = read_source(f"geometry3k={file}")
    prompts = encode(examples, tokenizer, processor, config)
    assert all((ids == config.image_token).sum() > 4 for ids in prompts.token_ids)
    length = max(map(len, prompts.token_ids))
    batch_at = make_batches(
        prompts.token_ids,
        batch_size=2,
        seed=0,
        pad_id=tokenizer.pad_token_id,
        length=length,
        images_of=read_images(prompts, image_reading(processor, config), length),
    )
    sampling = Sampling(
        samples_per_prompt=2,
        max_new_tokens=3,
        temperature=1.0,
        stop_tokens=(tokenizer.eos_token_id,),
        pad_token=tokenizer.pad_token_id,
    )
    model = make_model(config)
    tx = build(OptimizerSpec(name="adamw", learning_rate=1e-3), hf.roles(config))
    # P1's vision-language run: forward KL on the likeliest tokens, one sample there.
    objective = top_k(
        model,
        model,
        divergence=forward_kl,
        k=8,
        support="teacher",
        tail="bucket",
        temperature=1.0,
    )
    step = make_distill_step(
        model, objective, tx, sampling, mini_batches=2, micro_batches=2
    )
    params, teacher = random_params(model, 0), random_params(model, 1)
    state = init_state(params, tx)
    losses = []
    with Pipeline(batch_at) as pipeline:
        for index in range(2):
            batch = pipeline.at(index)
            key = jax.random.fold_in(jax.random.key(0), index)
            state, metrics = step(state, teacher, batch, key)
            losses += np.asarray(metrics["loss"]).tolist()
    assert int(state.step) == 2
    assert np.isfinite(losses).all()
    assert min(losses) > 0
    # The tower was trained as well, by gradients that came through the images.
    moved = jax.tree.map(
        lambda new, old: bool((np.asarray(new) != np.asarray(old)).any()),
        state.params["visual"],
        params["visual"],
    )
    assert all(jax.tree.leaves(moved))

    # What it says is judged, each completion with its example.
    batch = batch_at(2)

    @jax.jit
    def answer(params, batch):
        return rollout(model, params, batch, jax.random.key(1), sampling)

    drawn = answer(state.params, batch)
    texts = decode_completions(
        drawn.tokens[:, length:], tokenizer, sampling.stop_tokens
    )
    asked = [prompts.examples[i] for i in np.repeat(batch.index, 2)]
    with Judge("math", timeout_s=60.0) as judge:
        judgements = judge(asked, [each.text for each in texts])
        (right,) = judge(asked[:1], [rf"\boxed{{{asked[0].answer}}}"])
    assert len(judgements) == 4
    assert right.score == 1.0
    assert "failed" not in judge.counts


def test_images_that_cannot_be_used_are_named(tokenizer, processor, config, tmp_path):
    (tmp_path / "a.png").write_bytes(figure(0, (8, 8)))
    (tmp_path / "b.png").write_bytes(figure(0, (64, 64))[:900])
    rows = [
        {"images": ["a.png"], "problem": "<image>Find x.", "answer": "1"},
        {"images": ["b.png"], "problem": "<image>Find x.", "answer": "1"},
        {"images": ["c.png"], "problem": "<image>Find x.", "answer": "1"},
        {"images": ["a.png"], "problem": "Find x.", "answer": "1"},
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ValueError, match="row 2: the image is damaged") as error:
        read_source(f"geometry3k={path}")
    assert f"row 3: the image {tmp_path / 'c.png'} is missing" in str(error.value)
    assert "row 4: has 1 images and 0 <image> marks" in str(error.value)
    path.write_text(json.dumps(rows[0]) + "\n")
    examples = read_source(f"geometry3k={path}")
    with pytest.raises(ValueError, match="line 1: .* tokens with its images"):
        encode(examples, tokenizer, processor, config, limit=20)
    with pytest.raises(ValueError, match="none is left; all 1"):
        encode(examples, tokenizer, processor, config, limit=20, overlong="drop")
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="no chat template for them"):
        encode(examples, tokenizer, processor, config)
