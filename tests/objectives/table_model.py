"""A language model small enough to work out by hand: one hidden state a token."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from geomjax.meshes import ONE_DEVICE, Placement
from geomjax.objectives.base import Batch


class TableModel(NamedTuple):
    """`hidden = table[token]`, `logits = hidden @ head.T`; the context is one token.

    Parameters: `table` `[V, D]` and `head` `[V, D]`.
    """

    vocab_size: int
    dtype: Any = jnp.float32
    precision: jax.lax.Precision = jax.lax.Precision.HIGHEST
    placement: Placement = ONE_DEVICE

    def unembedding(self, params):
        return params["head"]

    def apply(self, params, tokens, positions, segment_ids, last=None):
        return params["table"][tokens if last is None else tokens[:, -last:]]

    def prefill(self, params, tokens, positions, segment_ids, cache_length, last=None):
        return self.apply(params, tokens, positions, segment_ids, last), ()

    def decode(self, params, token, position, segment_id, cache):
        return params["table"][token], cache

    def split_layers(self, params):
        return params


def table_params(seed, vocab_size, width, dtype=np.float32):
    generator = np.random.default_rng(seed)
    return {
        name: jnp.asarray(generator.standard_normal((vocab_size, width)), dtype)
        for name in ("table", "head")
    }


def log_prob_params(log_probs):
    """Parameters whose logits after token c are `log_probs[c]`."""
    table = jnp.asarray(log_probs)
    return {"table": table, "head": jnp.eye(table.shape[1], dtype=table.dtype)}


def make_batch(tokens, weights, behaviour=None, dtype=np.float32):
    tokens = np.asarray(tokens, np.int32)
    zeros = np.zeros(tokens.shape)
    return Batch(
        tokens=jnp.asarray(tokens),
        positions=jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape),
        segment_ids=jnp.ones_like(tokens),
        weights=jnp.asarray(weights, dtype),
        behaviour_log_probs=jnp.asarray(
            zeros if behaviour is None else behaviour, dtype
        ),
    )


def random_batch(seed, vocab_size, rows, length, dtype=np.float32):
    """Random tokens; the first two slots of a row are its prompt."""
    generator = np.random.default_rng(seed)
    completion = np.tile(np.arange(length) >= 2, (rows, 1))
    behaviour = -generator.uniform(1, 3, (rows, length))
    return make_batch(
        generator.integers(0, vocab_size, (rows, length)),
        completion / completion.sum(),
        np.where(completion, behaviour, 0.0),
        dtype,
    )
