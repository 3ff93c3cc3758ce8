"""The compiled parts of continuous sampling; the host loop is in `continuous`."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt32

from geomjax.models.cache import Cache, LayerCache
from geomjax.rollout.sample import next_logits, output_head, sample_token
from geomjax.rollout.slots import fill_rows, repack
from geomjax.typing import LanguageModel, Params, prompted


class Drawing(NamedTuple):
    """How tokens are drawn.

    Attributes:
      max_new_tokens: Most tokens of a completion.
      stop_tokens: Ids that end one; the one drawn belongs to it.
      temperature: Softmax temperature; 0 takes the most likely token.
      top_p: Mass of the nucleus drawn from; 1 for the full distribution.
      pad_token: Id on padding.
    """

    max_new_tokens: int
    stop_tokens: tuple[int, ...]
    temperature: float
    top_p: float = 1.0
    pad_token: int = 0


class Living(NamedTuple):
    """Where each row is.

    Attributes:
      token: The token drawn last, which is not in the cache yet.
      position: The position that `decode` takes: its place in its sequence, and what
        the images of its prompt add to it.
      drawn: How many tokens were drawn.
      alive: Whether the row decodes a sequence.
      key_data: The sequence's key, as `jax.random.key_data` gives it.
    """

    token: Int[Array, " R"]
    position: Int[Array, " R"]
    drawn: Int[Array, " R"]
    alive: Bool[Array, " R"]
    key_data: UInt32[Array, "R k"]


class Chunk(NamedTuple):
    """What a chunk of c steps drew: entries from `steps` on mean nothing.

    Attributes:
      tokens: Sampled ids.
      log_probs: With which log-probability.
      drawn: Whether a row was alive, so that its token counts.
      steps: Steps that were run.
    """

    tokens: Int[Array, "c R"]
    log_probs: Float[Array, "c R"]
    drawn: Bool[Array, "c R"]
    steps: Int[Array, ""]


@partial(jax.jit, static_argnames="model")
def prepare(params: Params, model: LanguageModel) -> Params:
    """The weights in the compute dtype, unstacked for prefill and decoding."""
    cast = jax.tree.map(lambda weight: weight.astype(model.dtype), params)
    return model.split_layers(cast)


@partial(jax.jit, static_argnames=("model", "rows", "slots", "table"))
def empty(
    params: Params,
    length: Int[Array, ""],
    model: LanguageModel,
    rows: int,
    slots: int,
    table: int,
) -> Cache:
    """A cache without a token, with rotary angles for `table` positions."""

    def prefill(rows, cache_length):
        padding = jnp.zeros((rows, 1), jnp.int32)
        return model.prefill(params, padding, padding, padding, cache_length, last=1)[1]

    cache = repack(prefill(rows, 1), jnp.arange(rows), length, slots)
    angles = prefill(model.placement.parts("batch"), table).angles
    return _laid_out(cache._replace(angles=angles), model)


@partial(jax.jit, static_argnames=("slots", "model"))
def move(
    cache: Cache,
    rows: Int[Array, " r"],
    length: Int[Array, ""],
    slots: int,
    model: LanguageModel,
) -> Cache:
    """As `repack`."""
    return _laid_out(repack(cache, rows, length, slots), model)


@partial(jax.jit, static_argnames=("model", "drawing"), donate_argnames="cache")
def admit(
    params: Params,
    cache: Cache,
    prompts: tuple[Int[Array, "r P"], Int[Array, "r P"], Int[Array, "r P"]],
    rows: Int[Array, " r"],
    key_data: UInt32[Array, "r k"],
    images: Any,
    model: LanguageModel,
    drawing: Drawing,
) -> tuple[Cache, Int[Array, " r"], Float[Array, " r"]]:
    """Prefills prompts into rows of the cache and draws their first tokens.

    Args:
      params: As `prepare` returns them.
      cache: With at least P slots filled; donated.
      prompts: Tokens, positions and segment ids, padded on the left.
      rows: The row of each; one that the cache does not have drops the prompt.
      key_data: The key of each sequence.
      images: The images of the prompts; None for text.
      model: The model.
      drawing: How tokens are drawn.

    Returns:
      The cache, first tokens and their log-probabilities.
    """
    seeing = prompted(model, images)
    hidden, newcomers = seeing.prefill(params, *prompts, prompts[0].shape[1], last=1)
    keys = _keys(key_data, jnp.zeros_like(rows))
    logits = next_logits(model, output_head(model, params), hidden[:, -1])
    token, log_prob = sample_token(logits, keys, drawing.temperature, drawing.top_p)
    cache = _laid_out(fill_rows(cache, rows, newcomers), model)
    whole = model.placement.constrain
    return cache, whole(token, None), whole(log_prob, None)


@partial(jax.jit, static_argnames=("model", "drawing", "size"), donate_argnames="cache")
def advance(
    params: Params,
    cache: Cache,
    living: Living,
    steps: Int[Array, ""],
    model: LanguageModel,
    drawing: Drawing,
    size: int,
) -> tuple[Cache, Chunk]:
    """Decodes until `steps` steps are done or every row has ended.

    Args:
      params: As `prepare` returns them.
      cache: With `steps` free slots; donated.
      living: The rows.
      steps: At most `size`.
      model: The model.
      drawing: How tokens are drawn.
      size: c, the steps that the result has room for.

    Returns:
      The cache and what was drawn.
    """
    stops = jnp.asarray(drawing.stop_tokens, jnp.int32)
    head = output_head(model, params)
    # All keys at once, as in `sample`.
    keys = jax.vmap(lambda i: _keys(living.key_data, living.drawn + i))(
        jnp.arange(size)
    )

    def unfinished(carry):
        step, rows, _, _ = carry
        return (step < steps) & rows.alive.any()

    def decode(carry):
        step, rows, cache, out = carry
        hidden, cache = model.decode(
            params, rows.token, rows.position, rows.alive.astype(jnp.int32), cache
        )
        token, log_prob = sample_token(
            next_logits(model, head, hidden),
            keys[step],
            drawing.temperature,
            drawing.top_p,
        )
        out = Chunk(
            tokens=out.tokens.at[step].set(token),
            log_probs=out.log_probs.at[step].set(log_prob),
            drawn=out.drawn.at[step].set(rows.alive),
            steps=step + 1,
        )
        stopped = (token[:, None] == stops[None, :]).any(axis=-1)
        drawn = rows.drawn + 1
        rows = rows._replace(
            token=token,
            # An ended row stays where it is, within the table of angles.
            position=rows.position + rows.alive.astype(jnp.int32),
            drawn=drawn,
            alive=rows.alive & ~stopped & (drawn < drawing.max_new_tokens),
        )
        return step + 1, rows, cache, out

    count = living.token.shape[0]
    out = Chunk(
        tokens=jnp.zeros((size, count), jnp.int32),
        log_probs=jnp.zeros((size, count), jnp.float32),
        drawn=jnp.zeros((size, count), bool),
        steps=jnp.int32(0),
    )
    carry = (jnp.int32(0), living, cache, out)
    _, _, cache, out = jax.lax.while_loop(unfinished, decode, carry)
    whole = model.placement.constrain
    tokens, log_probs, drawn = (whole(x, None, None) for x in out[:3])
    return _laid_out(cache, model), Chunk(tokens, log_probs, drawn, out.steps)


def _keys(key_data, steps):
    return jax.vmap(jax.random.fold_in)(jax.random.wrap_key_data(key_data), steps)


def _laid_out(cache: Cache, model: LanguageModel) -> Cache:
    """A cache whose layout on a mesh is that of every other program's."""
    place = model.placement.constrain
    return Cache(
        layers=tuple(
            LayerCache(*(place(x, "batch", "kv_heads", None, None) for x in layer))
            for layer in cache.layers
        ),
        positions=place(cache.positions, "batch", None),
        segment_ids=place(cache.segment_ids, "batch", None),
        length=place(cache.length),
        angles=(
            place(cache.angles[0], None, None, None, None),
            place(cache.angles[1], None, None, None, None),
        ),
    )
