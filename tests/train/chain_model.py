"""A language model of one hidden state a token, for tests of the training code."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from geomjax.meshes import ONE_DEVICE, Placement


class ChainModel(NamedTuple):
    """`hidden = table[token]`, `logits = hidden @ head.T`; the context is one token."""

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


def chain_params(seed, vocab_size, width=4):
    generator = np.random.default_rng(seed)
    return {
        name: jnp.asarray(generator.standard_normal((vocab_size, width)), jnp.float32)
        for name in ("table", "head")
    }
