"""A small Qwen2.5-VL, and prompts with images of several sizes for it."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from tiny_vision import random_rows

from geomjax.data.placeholders import expand_placeholders
from geomjax.models.config import DecoderConfig
from geomjax.models.load import make_model
from geomjax.models.qwen2_5_vl import place_images
from geomjax.models.qwen2_5_vl_config import Qwen25VLConfig
from geomjax.models.vision_config import VisionConfig

IMAGE, VIDEO, START, END = 30, 31, 32, 33
CONFIG = Qwen25VLConfig(
    text=DecoderConfig(
        architecture="Qwen2ForCausalLM",
        vocab_size=40,
        hidden_size=12,
        intermediate_size=20,
        num_layers=2,
        num_heads=2,
        num_kv_heads=1,
        head_dim=6,
        rms_norm_eps=1e-6,
        rope_theta=1e4,
        tie_word_embeddings=False,
        max_position_embeddings=256,
        qk_norm=False,
        qkv_bias=True,
    ),
    vision=VisionConfig(
        depth=2,
        hidden_size=16,
        intermediate_size=12,
        num_heads=2,
        in_channels=3,
        patch_size=2,
        temporal_patch_size=2,
        merge_size=2,
        window_size=8,
        full_attention_blocks=(1,),
        out_size=12,
        rope_theta=1e4,
    ),
    mrope_sections=(1, 1, 1),
    image_token=IMAGE,
    video_token=VIDEO,
)
MODEL = make_model(CONFIG)

# Text is a number of tokens, an image a grid: one image, several, none, only one.
PROMPTS = [
    (2, (1, 4, 6), 3),
    ((1, 2, 2), 1, (1, 6, 2), 2),
    (7,),
    ((1, 4, 4),),
]


class Batch(NamedTuple):
    """Prompts padded by `pads`, their images, and what both were made of."""

    tokens: np.ndarray
    positions: np.ndarray
    segment_ids: np.ndarray
    images: object
    prompts: list
    rows: list

    @property
    def inputs(self):
        return tuple(map(jnp.asarray, self[:3]))


def prompts_and_images(config, seed=0, parts=tuple(PROMPTS)):
    """Token ids with expanded placeholders, and random images."""
    generator = np.random.default_rng(seed)
    grids = [[part for part in row if not isinstance(part, int)] for row in parts]
    prompts = []
    for row, row_grids in zip(parts, grids, strict=True):
        tokens = []
        for part in row:
            text = isinstance(part, int)
            tokens += generator.integers(0, 29, part).tolist() if text else []
            tokens += [] if text else [START, IMAGE, END]
        prompts.append(
            expand_placeholders(
                tokens,
                row_grids,
                image_token=IMAGE,
                video_token=VIDEO,
                merge_size=config.vision.merge_size,
            )
        )
    return prompts, random_rows(seed, grids, config.vision.patch_values)


def ragged_batch(config, pads, seed=0):
    """Rows padded by (left, right), to a common length, with images on the device."""
    prompts, rows = prompts_and_images(config, seed)
    length = max(len(p) + sum(pad) for p, pad in zip(prompts, pads, strict=True))
    tokens = np.random.default_rng(9).integers(0, 29, (len(prompts), length))
    tokens, segments = (
        tokens.astype(np.int32),
        np.zeros((len(prompts), length), np.int32),
    )
    for b, (prompt, (left, right)) in enumerate(zip(prompts, pads, strict=True)):
        left = left if right else length - len(prompt)
        tokens[b, left : left + len(prompt)] = prompt
        segments[b, left : left + len(prompt)] = 1
    positions = np.maximum(np.cumsum(segments, axis=1) - 1, 0) * segments
    images = jax.tree.map(jnp.asarray, place_images(config, prompts, rows))
    return Batch(tokens, positions.astype(np.int32), segments, images, prompts, rows)


def random_params(model, seed=0):
    """Parameters with random norms and biases, drawn by NumPy."""
    generator = np.random.default_rng(seed)

    def draw(shape):
        values = generator.standard_normal(shape.shape).astype(np.float32)
        scale = np.float32(np.prod(shape.shape[-1:]) ** -0.5)
        return jnp.asarray(scale * values + np.float32(0.1))

    return jax.tree.map(draw, model.shapes)


def variant(**fields):
    return dataclasses.replace(CONFIG, **fields)
