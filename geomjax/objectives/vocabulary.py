"""Functions of the logits, computed in chunks of tokens from hidden states.

At a vocabulary of 151,936 the float32 logits of 8,192 tokens take 5 GB. Here no more
than one chunk's exist at a time, in the forward and in the backward pass.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from geomjax.typing import LanguageModel, Params

DEFAULT_CHUNK_TOKENS = 1024


def map_token_chunks(
    function: Callable[..., Float[Array, " c"]],
    arrays: tuple[Array, ...],
    chunk_tokens: int,
) -> Float[Array, " n"]:
    """Applies a function of tokens to chunks of them, one after another.

    Each chunk is recomputed in the backward pass, so the memory of `function` is held
    for one chunk alone.

    Args:
      function: From slices `[c, ...]` of the arrays to one float32 a token, `[c]`.
      arrays: Arrays `[n, ...]` with the tokens first.
      chunk_tokens: Most tokens a chunk.

    Returns:
      The values of all tokens.
    """
    count = arrays[0].shape[0]
    if count <= chunk_tokens:
        return function(*arrays)
    chunks = -(-count // chunk_tokens)

    def split(array):
        padding = [(0, chunks * chunk_tokens - count)] + [(0, 0)] * (array.ndim - 1)
        return jnp.pad(array, padding).reshape(chunks, chunk_tokens, *array.shape[1:])

    body = jax.checkpoint(lambda chunk: function(*chunk))
    return jax.lax.map(body, tuple(split(a) for a in arrays)).reshape(-1)[:count]


def logits(
    model: LanguageModel,
    unembedding: Float[Array, "V D"],
    hidden: Float[Array, "n D"],
    temperature: float,
) -> Float[Array, "n V"]:
    """Logits over temperature, float32 (float64 of a float64 model)."""
    wide = jnp.float64 if model.dtype == jnp.float64 else jnp.float32
    product = jnp.einsum(
        "nd,vd->nv",
        hidden,
        unembedding.astype(model.dtype),
        precision=model.precision,
        preferred_element_type=wide,
    )
    return product / temperature


def token_log_probs(
    model: LanguageModel,
    params: Params,
    hidden: Float[Array, "B s D"],
    targets: Int[Array, "B s"],
    *,
    temperature: float,
    chunk_tokens: int = DEFAULT_CHUNK_TOKENS,
) -> Float[Array, "B s"]:
    """Log-probability of each target under `softmax(logits / temperature)`.

    Args:
      model: The model.
      params: Its parameters, for the unembedding.
      hidden: Hidden states that predict the targets.
      targets: Token ids.
      temperature: Softmax temperature, positive.
      chunk_tokens: Tokens whose logits exist at a time.

    Returns:
      Float32 log-probabilities.
    """
    unembedding = model.unembedding(params)

    def log_probs(hidden, target):
        scores = logits(model, unembedding, hidden, temperature)
        picked = jnp.take_along_axis(scores, target[:, None], axis=-1)[:, 0]
        return picked - jax.nn.logsumexp(scores, axis=-1)

    flat = (hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1))
    return map_token_chunks(log_probs, flat, chunk_tokens).reshape(targets.shape)
