"""Functions of the logits, computed in chunks of tokens from hidden states.

At a vocabulary of 151,936 the float32 logits of 8,192 tokens take 5 GB. Here no more
than one chunk's exist at a time, in the forward and in the backward pass.

On a mesh the vocabulary is split as well: `head` lays the unembedding out by its rows,
once, and each chunk of hidden states is gathered to all of them. Chunks alone would
gather the head for every chunk. The placement says which of the two it is; a function
of the logits is written once, for both.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from geomjax.meshes import ONE_DEVICE, Placement
from geomjax.typing import LanguageModel, Params

DEFAULT_CHUNK_TOKENS = 1024


_HIDDEN = -1e30
"""Logit of a row that pads the vocabulary; finite, so that no gradient is NaN."""


def map_tokens(
    function: Callable[..., Float[Array, " c"]],
    heads: tuple[Float[Array, "W _"], ...],
    arrays: tuple[Array, ...],
    chunk_tokens: int,
    placement: Placement = ONE_DEVICE,
) -> Float[Array, "B s"]:
    """Applies a function of tokens to all of them, in chunks one after another.

    On a mesh a chunk is some slots of every sequence, so that each group of devices
    that shares the vocabulary has its own sequences, and the gradients of the heads are
    summed over these groups once, after the last chunk.

    Args:
      function: From the heads and slices `[c, ...]` of the arrays to one float32 a
        token, `[c]`.
      heads: What every chunk needs whole, from `head`.
      arrays: Arrays `[B, s, ...]`.
      chunk_tokens: Most tokens whose whole logits a device is to hold. A device that
        holds a part of the vocabulary takes as many more at a time.
      placement: Where the arrays lie.

    Returns:
      The values of all tokens.
    """
    batch, slots = arrays[0].shape[:2]
    if placement.mesh is None:
        flat = tuple(a.reshape(batch * slots, *a.shape[2:]) for a in arrays)
        of_tokens = partial(function, *heads)
        return map_token_chunks(of_tokens, flat, chunk_tokens).reshape(batch, slots)
    of_rows = partial(_map_slots, function, len(heads), chunk_tokens, placement)
    local = placement.local(
        of_rows,
        [(None, None)] * len(heads)
        + [("rows", *[None] * (a.ndim - 1)) for a in arrays],
        ("rows", None),
        along="rows",
    )
    return placement.constrain(local(*heads, *arrays), "batch", None)


def _map_slots(function, count, chunk_tokens, placement, *arguments):
    """`map_tokens` of the sequences of one group of devices."""
    heads, arrays = arguments[:count], arguments[count:]
    rows, slots = arrays[0].shape[:2]
    chunk = max(1, chunk_tokens * placement.parts("loss_vocab") // rows)
    chunks = -(-slots // chunk)

    def of_slots(heads, arrays):
        whole = [_gather(a, placement) for a in arrays]
        flat = [a.reshape(-1, *a.shape[2:]) for a in whole]
        return function(*heads, *flat).reshape(rows, -1)

    if chunks == 1:
        return of_slots(heads, arrays)

    def split(array):
        padding = [(0, 0), (0, chunks * chunk - slots)] + [(0, 0)] * (array.ndim - 2)
        shape = (rows, chunks, chunk, *array.shape[2:])
        by_chunk = jnp.moveaxis(jnp.pad(array, padding).reshape(shape), 1, 0)
        return placement.constrain(by_chunk, None, "batch", *[None] * (array.ndim - 1))

    body = jax.checkpoint(of_slots)
    values = jax.lax.map(partial(body, heads), tuple(split(a) for a in arrays))
    return jnp.moveaxis(values, 0, 1).reshape(rows, -1)[:, :slots]


def _gather(rows, placement):
    """Rows of all devices that share the vocabulary; gradients go back to their own.

    The gradient of a constraint has its layout: each device would get, and drop, those
    of the others.
    """
    rest = [None] * (rows.ndim - 1)
    if not jnp.issubdtype(rows.dtype, jnp.inexact):
        return placement.constrain(rows, "rows", *rest)

    @jax.custom_vjp
    def gather(rows):
        return placement.constrain(rows, "rows", *rest)

    gather.defvjp(
        lambda rows: (gather(rows), None),
        lambda _, gradient: (placement.constrain(gradient, "batch", *rest),),
    )
    return gather(rows)


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


def head(
    model: LanguageModel, params: Params, placement: Placement = ONE_DEVICE
) -> Float[Array, "W D"]:
    """The unembedding as `logits` takes it, W >= V.

    On a mesh it is in the compute dtype, and its rows, as many as divide, are split
    over `loss_vocab`: it is moved once, before the chunks.
    """
    unembedding = model.unembedding(params)
    if placement.mesh is None:
        return unembedding
    parts = placement.parts("loss_vocab")
    rows = -(-model.vocab_size // parts) * parts
    cut = unembedding.astype(model.dtype)[:rows]
    return placement.pad(cut, "loss_vocab", None)


def logits(
    model: LanguageModel,
    head: Float[Array, "W D"],
    hidden: Float[Array, "n D"],
    temperature: float,
    placement: Placement = ONE_DEVICE,
) -> Float[Array, "n W"]:
    """Logits over temperature, float32 (float64 of a float64 model).

    Those of rows that pad the vocabulary are so low that they have no probability.
    """
    wide = jnp.float64 if model.dtype == jnp.float64 else jnp.float32
    product = jnp.einsum(
        "nd,vd->nv",
        hidden,
        head.astype(model.dtype),
        precision=model.precision,
        preferred_element_type=wide,
    )
    product = placement.constrain(product, "rows", "loss_vocab") / temperature
    if head.shape[0] == model.vocab_size:
        return product
    token = jnp.arange(head.shape[0])[None, :] < model.vocab_size
    return jnp.where(token, product, jnp.asarray(_HIDDEN, product.dtype))


def pick(
    scores: Float[Array, "n W"],
    target: Int[Array, " n"],
    placement: Placement = ONE_DEVICE,
) -> Float[Array, " n"]:
    """The score of each token's target.

    On a mesh as a sum with one term that is not zero, the same number: the gradient of
    an indexed read is a scatter, which the partitioner does by tokens, and moves every
    score to where its part of the vocabulary is.
    """
    if placement.mesh is None:
        return jnp.take_along_axis(scores, target[:, None], axis=-1)[:, 0]
    mine = jnp.arange(scores.shape[-1])[None, :] == target[:, None]
    return jnp.sum(jnp.where(mine, scores, jnp.zeros_like(scores)), axis=-1)


def likeliest(
    scores: Float[Array, "n W"], k: int, placement: Placement = ONE_DEVICE
) -> Int[Array, "n k"]:
    """The k tokens with the highest scores, the highest first, of equals the first.

    On a mesh each device finds those of its own part of the vocabulary, and the scores
    of these alone are gathered, at most k a token from each.
    """
    if placement.mesh is None:
        return jax.lax.top_k(scores, k)[1]

    def of_part(scores, tokens):
        found, place = jax.lax.top_k(scores, min(k, len(tokens)))
        return found, tokens[place]

    split = None, "loss_vocab"
    of_parts = placement.local(of_part, [split, split[1:]], split, along="loss_vocab")
    tokens = jnp.arange(scores.shape[1], dtype=jnp.int32)
    # Parts in the order of their tokens, so that of equals the first still wins.
    found, token = (
        placement.constrain(a, "rows", None) for a in of_parts(scores, tokens)
    )
    best = jax.lax.top_k(found, k)[1]
    chosen = jnp.take_along_axis(token, best, axis=-1)
    return placement.constrain(chosen, "rows", None)


def pick_each(
    scores: Float[Array, "n W"],
    index: Int[Array, "n k"],
    placement: Placement = ONE_DEVICE,
) -> Float[Array, "n k"]:
    """The scores of several tokens a row.

    On a mesh each device reads those of its own part of the vocabulary, and their sum
    over the devices has one term that is not zero, as in `pick`.
    """
    if placement.mesh is None:
        return jnp.take_along_axis(scores, index, axis=-1)

    def of_part(scores, tokens, index):
        place, mine = _place_in(tokens, index)
        own = jnp.take_along_axis(scores, jnp.where(mine, place, 0), axis=-1)
        own = jnp.where(mine, own, jnp.zeros_like(own))
        axes = placement.mesh_axes("loss_vocab")
        return jax.lax.psum(own, axes) if axes else own

    return _of_parts(of_part, placement, scores, index, (None, None))


def without(
    scores: Float[Array, "n W"],
    index: Int[Array, "n k"],
    placement: Placement = ONE_DEVICE,
) -> Float[Array, "n W"]:
    """The scores, minus infinity for some tokens of each row."""

    def hide(scores, place):
        rows = jnp.arange(scores.shape[0])[:, None]
        return scores.at[rows, place].set(-jnp.inf)

    if placement.mesh is None:
        return hide(scores, index)

    def of_part(scores, tokens, index):
        place, mine = _place_in(tokens, index)
        # What is written behind the end is dropped.
        return hide(scores, jnp.where(mine, place, len(tokens)))

    return _of_parts(of_part, placement, scores, index, (None, "loss_vocab"))


def _of_parts(function, placement, scores, index, out_axes):
    """A function of a device's scores, the tokens that they are of, and the index."""
    split = None, "loss_vocab"
    of_parts = placement.local(
        function, [split, split[1:], (None, None)], out_axes, along="loss_vocab"
    )
    return of_parts(scores, jnp.arange(scores.shape[1], dtype=index.dtype), index)


def _place_in(tokens, index):
    """Where tokens are in a part of the vocabulary, and whether they are in it."""
    place = index - tokens[0]
    return place, (place >= 0) & (place < len(tokens))


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
    placement = model.placement
    unembedding = head(model, params, placement)

    def log_probs(unembedding, hidden, target):
        scores = logits(model, unembedding, hidden, temperature, placement)
        return pick(scores, target, placement) - jax.nn.logsumexp(scores, axis=-1)

    arrays = hidden, targets
    return map_tokens(log_probs, (unembedding,), arrays, chunk_tokens, placement)
