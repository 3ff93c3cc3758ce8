"""KV-cached sampling: one jittable function from prompts to completed sequences."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from geomjax.typing import LanguageModel, Params, PRNGKey


class Rollout(NamedTuple):
    """Prompts with their completions, in the slots in which they were sampled.

    Prompts are padded on the left, so completions start at one slot, S = P + the
    number of new tokens. Token ids are stored once: what was sampled is trained on.

    Attributes:
      tokens: `[B, S]` int32.
      positions: `[B, S]` int32, place in the sequence without its padding, on which
        it is 0.
      segment_ids: `[B, S]` int32, 1 for prompt and completion, 0 for padding.
      completion: `[B, S]` bool, True for sampled tokens, the stop token included.
      log_probs: `[B, S]` float32, log-probability with which each completion token
        was sampled, at the sampling temperature; 0 elsewhere.
      images: The images of the rows' prompts, as the model's `with_images` takes them;
        None for text.
    """

    tokens: Int[Array, "B S"]
    positions: Int[Array, "B S"]
    segment_ids: Int[Array, "B S"]
    completion: Bool[Array, "B S"]
    log_probs: Float[Array, "B S"]
    images: Any = None


def sample_token(
    logits: Float[Array, "B V"], keys: PRNGKey, temperature: float, top_p: float = 1.0
) -> tuple[Int[Array, " B"], Float[Array, " B"]]:
    """Draws one token a row from `softmax(logits / temperature)`; 0 is greedy.

    Args:
      logits: Float32.
      keys: One key a row.
      temperature: Not negative. Greedy tokens are scored at temperature 1.
      top_p: Below 1, draws from the `nucleus` alone.

    Returns:
      The tokens (int32) and the log-probabilities (float32) with which they were drawn.
    """
    if temperature > 0:
        log_probs = jax.nn.log_softmax(logits / temperature)
        if top_p < 1:
            log_probs = nucleus(log_probs, top_p)
        token = jax.vmap(jax.random.categorical)(keys, log_probs)
    else:
        log_probs = jax.nn.log_softmax(logits)
        token = jnp.argmax(logits, axis=-1)
    picked = jnp.take_along_axis(log_probs, token[:, None], axis=-1)[:, 0]
    return token.astype(jnp.int32), picked


def nucleus(log_probs: Float[Array, "B V"], top_p: float) -> Float[Array, "B V"]:
    """The most likely tokens that hold a mass of `top_p`, renormalized.

    A token belongs to them if all that are more likely hold less than `top_p`
    together, so that tokens of equal probability share one fate, and the most likely
    one always belongs.

    Args:
      log_probs: Normalized, float32.
      top_p: Above 0.

    Returns:
      Log-probabilities, minus infinity outside the nucleus.
    """
    ordered = -jnp.sort(-log_probs, axis=-1)
    mass = jnp.exp(ordered)
    before = jnp.cumsum(mass, axis=-1) - mass
    least = jnp.min(
        ordered, axis=-1, keepdims=True, where=before < top_p, initial=jnp.inf
    )
    return jax.nn.log_softmax(jnp.where(log_probs >= least, log_probs, -jnp.inf))


def check_sampling(max_new_tokens: int, temperature: float, top_p: float) -> None:
    """Raises ValueError where a setting of `sample` has no meaning."""
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}; expected 1 or more")
    if not temperature >= 0:
        raise ValueError(f"temperature is {temperature}; expected 0 (greedy) or more")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p is {top_p}; expected above 0, and at most 1")


def output_head(model: LanguageModel, params: Params) -> Float[Array, "W D"]:
    """The unembedding as `next_logits` takes it, padded until the mesh divides it."""
    return model.placement.decoding.pad(model.unembedding(params), "vocab", None)


def next_logits(
    model: LanguageModel, head: Float[Array, "W D"], hidden: Float[Array, "B D"]
) -> Float[Array, "B W"]:
    """Logits of the next token, float32; minus infinity on rows that pad the head."""
    logits = jnp.einsum(
        "bd,vd->bv",
        hidden,
        head,
        precision=model.precision,
        preferred_element_type=jnp.float32,
    )
    logits = model.placement.decoding.constrain(logits, "batch", "vocab")
    if head.shape[0] == model.vocab_size:
        return logits
    token = jnp.arange(head.shape[0])[None, :] < model.vocab_size
    return jnp.where(token, logits, -jnp.inf)


def sample(
    model: LanguageModel,
    params: Params,
    tokens: Int[Array, "B P"],
    positions: Int[Array, "B P"],
    segment_ids: Int[Array, "B P"],
    key: PRNGKey,
    *,
    max_new_tokens: int,
    stop_tokens: tuple[int, ...],
    temperature: float,
    pad_token: int = 0,
    top_p: float = 1.0,
) -> Rollout:
    """Completes each prompt by sampling from the model's distribution.

    The prompt is prefilled in one pass; then one token a step is decoded through the
    cache until every row has stopped. The weights are cast and unstacked once, before
    the loop, and on a mesh laid out for decoding, so that the loop gathers none. The
    draw of token t of row b depends on (key, b, t) alone.

    Args:
      model: The model to sample from.
      params: Its parameters.
      tokens: Prompts padded on the left.
      positions: Place of each token in its prompt.
      segment_ids: 1 for prompt tokens, 0 for padding.
      key: Random key of this rollout.
      max_new_tokens: Most tokens sampled a row.
      stop_tokens: Ids that end a row; the one drawn belongs to the completion.
      temperature: Softmax temperature; 0 takes the most likely token.
      pad_token: Id written after the end of a row.
      top_p: Mass of the nucleus drawn from, in (0, 1]. Training samples from the full
        distribution, 1.

    Returns:
      The sequences, with the log-probability of each sampled token.

    Raises:
      ValueError: `max_new_tokens` is below 1, the temperature negative, or `top_p` not
        in (0, 1].
    """
    check_sampling(max_new_tokens, temperature, top_p)
    batch, prompt_length = tokens.shape
    length = prompt_length + max_new_tokens
    params = jax.tree.map(lambda weight: weight.astype(model.dtype), params)
    params = jax.lax.optimization_barrier(model.split_layers(params))
    place = model.placement.decoding
    unembedding = output_head(model, params)
    tokens, positions, segment_ids = (
        place.constrain(x, "batch", None) for x in (tokens, positions, segment_ids)
    )
    # All keys at once: drawn one step at a time, they cost as much as the tokens.
    fold_rows = jax.vmap(jax.random.fold_in, (0, None))
    keys = jax.vmap(fold_rows, (None, 0))(
        jax.random.split(key, batch), jnp.arange(max_new_tokens)
    )
    stops = jnp.asarray(stop_tokens, jnp.int32)

    def logits_of(hidden):
        return next_logits(model, unembedding, hidden)

    def draw(logits, step, alive, out):
        """Samples slot P + step for the rows still alive."""
        token, log_prob = sample_token(logits, keys[step], temperature, top_p)
        token = jnp.where(alive, token, pad_token)
        slot = prompt_length + step

        def put(array, column):
            column = column.astype(array.dtype)[:, None]
            return jax.lax.dynamic_update_slice_in_dim(array, column, slot, axis=1)

        out = Rollout(
            tokens=put(out.tokens, token),
            positions=put(out.positions, jnp.where(alive, last_position + 1 + step, 0)),
            segment_ids=put(out.segment_ids, alive),
            completion=put(out.completion, alive),
            log_probs=put(out.log_probs, jnp.where(alive, log_prob, 0.0)),
        )
        stopped = (token[:, None] == stops[None, :]).any(axis=-1)
        return token, alive & ~stopped, out

    def pad(array, value=0):
        return jnp.pad(array, ((0, 0), (0, max_new_tokens)), constant_values=value)

    last_position = positions[:, -1]
    out = Rollout(
        tokens=pad(tokens.astype(jnp.int32), pad_token),
        positions=pad(positions),
        segment_ids=pad(segment_ids),
        completion=jnp.zeros((batch, length), bool),
        log_probs=jnp.zeros((batch, length), jnp.float32),
    )
    hidden, cache = model.prefill(
        params, tokens, positions, segment_ids, length, last=1
    )
    alive = jnp.ones(batch, bool)
    token, alive, out = draw(logits_of(hidden[:, -1]), jnp.int32(0), alive, out)

    def unfinished(carry):
        step, _, alive, _, _ = carry
        return (step < max_new_tokens) & alive.any()

    def decode(carry):
        step, token, alive, cache, out = carry
        position, segment = last_position + step, alive.astype(jnp.int32)
        hidden, cache = model.decode(params, token, position, segment, cache)
        token, alive, out = draw(logits_of(hidden), step, alive, out)
        return step + 1, token, alive, cache, out

    carry = (jnp.int32(1), token, alive, cache, out)
    return jax.lax.while_loop(unfinished, decode, carry)[-1]
