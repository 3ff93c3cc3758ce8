"""A small decoder and ragged sequences for it."""

import dataclasses

import jax.numpy as jnp
import numpy as np

from geomjax.models.config import DecoderConfig

CONFIG = DecoderConfig(
    architecture="Qwen3ForCausalLM",
    vocab_size=24,
    hidden_size=16,
    intermediate_size=20,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=6,
    rms_norm_eps=1e-6,
    rope_theta=1e4,
    tie_word_embeddings=False,
    max_position_embeddings=64,
)


def variant(**fields):
    return dataclasses.replace(CONFIG, **fields)


def ragged(seed, vocab_size, pads, length):
    """Tokens, positions and segments of rows padded by `pads` = [(left, right), ...].

    Padding holds random tokens, so that a model that looks at it is found out.
    """
    generator = np.random.default_rng(seed)
    tokens = generator.integers(0, vocab_size, (len(pads), length)).astype(np.int32)
    slots = np.arange(length)[None, :]
    left, right = np.array(pads, np.int64).T[..., None]
    segment_ids = ((slots >= left) & (slots < length - right)).astype(np.int32)
    positions = np.where(segment_ids, slots - left, 0).astype(np.int32)
    return tokens, positions, segment_ids


def on_device(arrays):
    return tuple(jnp.asarray(array) for array in arrays)


def random_params(model, seed):
    """Parameters with random norms, drawn by NumPy: nothing is compiled."""
    generator = np.random.default_rng(seed)

    def fill(tree):
        if isinstance(tree, dict):
            return {name: fill(child) for name, child in sorted(tree.items())}
        draw = generator.standard_normal(tree.shape).astype(np.float32)
        return jnp.asarray(np.float32(tree.shape[-1] ** -0.5) * draw + np.float32(0.1))

    return fill(model.shapes)
