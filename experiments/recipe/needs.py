"""Memory and time of a training step, estimated from shapes and counts alone.

Leading terms: parameters, moments, gradients, the cache, one layer's activations and
saved block inputs for memory; matrix products and the reads of decoding for time. What
a compiler adds is not in it.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections

from experiments.recipe.published import shaped
from geomjax.models.decoder import Decoder
from geomjax.models.flops import forward_flops
from geomjax.models.load import Model

MOMENTS = {"adamw": 2, "adam": 2, "lamb": 2, "lion": 1, "muon": 1, "sgd": 0}
"""Copies of the parameters in an optimizer's state."""

_FLOAT32 = 4


class Line(NamedTuple):
    """One term of an estimate.

    Attributes:
      what: What it is.
      amount: Bytes, or operations.
      how: How it was counted.
    """

    what: str
    amount: float
    how: str


def count(model: Model) -> int:
    """Parameters of a model."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(model.shapes))


def _decoder(model: Any) -> Decoder:
    return model if isinstance(model, Decoder) else model.decoder


def _lengths(config: ml_collections.ConfigDict) -> tuple[int, int, int]:
    """Sequences a step, and tokens of the prompt and of the response, at most."""
    if "sequences_per_step" in config:
        return config.sequences_per_step, 0, config.max_sequence_tokens
    sequences = config.prompts_per_step * config.samples_per_prompt
    return sequences, config.max_prompt_tokens, config.max_new_tokens


def memory(config: ml_collections.ConfigDict) -> list[Line]:
    """Bytes over all devices together, every sequence at its longest."""
    student = shaped(config.student, config.compute_dtype)
    weights, narrow = count(student), jnp.dtype(config.compute_dtype).itemsize
    sequences, prompt, response = _lengths(config)
    optimizers = config.optimizers.values()
    copies = max(MOMENTS.get(each.transform, 2) for each in optimizers)
    lines = [
        Line("student", _FLOAT32 * weights, f"{weights / 1e9:.2f} B, float32"),
        Line("gradients", _FLOAT32 * weights, "float32"),
        Line("moments", _FLOAT32 * copies * weights, f"{copies} copies, float32"),
    ]
    if "teacher" in config:
        size = count(shaped(config.teacher, config.compute_dtype))
        how = f"{size / 1e9:.2f} B, float32"
        lines.append(Line("teacher", _FLOAT32 * size, how))
    text = _decoder(student).config
    length = prompt + response
    if prompt:
        entries = sequences * length * text.num_layers * 2 * text.num_kv_heads
        how = f"{sequences} sequences of {length} tokens"
        lines += [
            Line("rollout weights", narrow * weights, config.compute_dtype),
            Line("rollout cache", narrow * entries * text.head_dim, how),
        ]
    parts = config.get("mini_batches", 1) * config.micro_batches
    rows = math.ceil(sequences / parts)
    saved = rows * length * text.hidden_size * text.num_layers * narrow
    wide = rows * length * (3 * text.intermediate_size + 4 * text.hidden_size) * narrow
    how = f"{rows} sequences at a time, blocks recomputed"
    return [*lines, Line("activations", saved + wide, how)]


def operations(config: ml_collections.ConfigDict) -> list[Line]:
    """Floating-point operations of one step, every sequence at its longest."""
    student = _decoder(shaped(config.student, config.compute_dtype))
    sequences, prompt, response = _lengths(config)
    forward = sequences * forward_flops(student, float(prompt + response))
    lines = [Line("student's update", 4 * forward, "forward, again, and backward")]
    if "teacher" in config:
        teacher = _decoder(shaped(config.teacher, config.compute_dtype))
        scored = sequences * forward_flops(teacher, float(prompt + response))
        lines.append(Line("teacher's scores", scored, "forward"))
    if prompt:
        lines.append(Line("rollout", forward, "forward, a token at a time"))
    return lines


def decode_bytes(config: ml_collections.ConfigDict) -> float:
    """Bytes read by decoding one step's responses: the weights and the cache so far."""
    sequences, prompt, response = _lengths(config)
    if not prompt:
        return 0.0
    student = shaped(config.student, config.compute_dtype)
    text, narrow = _decoder(student).config, jnp.dtype(config.compute_dtype).itemsize
    slot = text.num_layers * 2 * text.num_kv_heads * text.head_dim * narrow
    cached = sequences * slot * response * (prompt + response / 2)
    return float(response * narrow * count(student) + cached)
