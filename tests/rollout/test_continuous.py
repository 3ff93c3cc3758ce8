"""Continuous sampling against the plain loop, and what it saves."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from geomjax.data.batches import pad_prompts
from geomjax.meshes import Placement, mesh_from_string
from geomjax.models.cache import Cache, LayerCache
from geomjax.models.config import DecoderConfig
from geomjax.models.decoder import Decoder
from geomjax.rollout import continuous
from geomjax.rollout.chunks import Drawing
from geomjax.rollout.continuous import ContinuousSampler, sample_continuously
from geomjax.rollout.sample import sample
from geomjax.rollout.slots import repack

VOCAB, PAD, NEW = 13, 12, 24
CONFIG = DecoderConfig(
    architecture="Qwen3ForCausalLM",
    vocab_size=16,
    hidden_size=16,
    intermediate_size=20,
    num_layers=1,
    num_heads=4,
    num_kv_heads=2,
    head_dim=4,
    rms_norm_eps=1e-6,
    rope_theta=1e4,
    tie_word_embeddings=False,
    max_position_embeddings=64,
)
MODEL = Decoder(CONFIG, VOCAB)
# One layer sees only its three nearest tokens.
SLIDING = Decoder(
    dataclasses.replace(CONFIG, num_layers=2, sliding_window=3, sliding_layers=(0,)),
    VOCAB,
)
STOPS = (3,)


def random_prompts(count, longest, seed=0):
    generator = np.random.default_rng(seed)
    lengths = generator.integers(1, longest + 1, count)
    return [generator.integers(0, VOCAB, n).astype(np.int32) for n in lengths]


PROMPTS = random_prompts(23, 9)


@pytest.fixture(scope="module")
def params():
    return MODEL.init(jax.random.key(5))


def both(params, model=MODEL, prompts=PROMPTS, rows=5, chunk_steps=3, **changes):
    """The plain loop's rollout and ours, as NumPy arrays."""
    batch = pad_prompts(prompts, 9, PAD)
    settings = {
        "max_new_tokens": NEW,
        "stop_tokens": STOPS,
        "temperature": 1.0,
        "pad_token": PAD,
        **changes,
    }
    given = [jnp.asarray(array) for array in batch[:3]]
    key = jax.random.key(7)
    plain = jax.jit(lambda p, *a: sample(model, p, *a, **settings))(params, *given, key)
    ours = sample_continuously(
        model, params, *given, key, rows=rows, chunk_steps=chunk_steps, **settings
    )
    return jax.tree.map(np.asarray, plain), jax.tree.map(np.asarray, ours)


def assert_same_rollout(plain, ours):
    for name in ("tokens", "positions", "segment_ids", "completion"):
        np.testing.assert_array_equal(getattr(ours, name), getattr(plain, name), name)
        assert getattr(ours, name).dtype == getattr(plain, name).dtype
    np.testing.assert_allclose(ours.log_probs, plain.log_probs, atol=1e-5)


@pytest.mark.parametrize(("rows", "chunk_steps"), [(5, 3), (64, 64)])
def test_tokens_are_those_of_the_plain_loop(params, rows, chunk_steps):
    plain, ours = both(params, rows=rows, chunk_steps=chunk_steps)
    assert_same_rollout(plain, ours)
    lengths = plain.completion.sum(axis=1)
    assert lengths.min() < 4 < 20 < lengths.max()  # Mixed, or little is shown.


@pytest.mark.parametrize(
    "changes",
    [
        {"temperature": 0.0},
        {"temperature": 0.6, "top_p": 0.9},
        {"max_new_tokens": 1},
        {"stop_tokens": tuple(range(VOCAB))},
    ],
    ids=["greedy", "nucleus", "one token", "all stop at once"],
)
def test_settings_mean_what_they_mean_to_the_plain_loop(params, changes):
    assert_same_rollout(*both(params, **changes))


def test_on_a_mesh_the_tokens_are_those_of_one_device(params):
    """The last prompt is prefilled alone, beside rows that are there for the mesh."""
    mesh = mesh_from_string("data=2,fsdp=2,tensor=2")
    placed = dataclasses.replace(MODEL, placement=Placement(mesh))
    drawing = Drawing(NEW, STOPS, 1.0, pad_token=PAD)
    keys = jax.random.split(jax.random.key(7), len(PROMPTS))
    drawn = []
    for model in (MODEL, placed):
        there = jax.device_put(params, model.placement.sharding())
        sampler = ContinuousSampler(model, there, drawing, rows=6, chunk_steps=8)
        drawn.append({c.index: c for c in sampler.run(PROMPTS, keys)})
    assert sampler.rows == 8
    assert len(PROMPTS) % 4 == 3
    for index, here in drawn[0].items():
        np.testing.assert_array_equal(drawn[1][index].tokens, here.tokens)
        np.testing.assert_allclose(drawn[1][index].log_probs, here.log_probs, atol=1e-5)


def test_layers_with_a_sliding_window():
    assert_same_rollout(*both(SLIDING.init(jax.random.key(6)), SLIDING))


def test_draws_depend_on_the_key_of_the_sequence_alone(params):
    """Any company, any order: the tokens of a sequence stay."""
    keys = jax.random.split(jax.random.key(1), len(PROMPTS))
    drawing = Drawing(NEW, STOPS, 1.0, pad_token=PAD)
    sampler = ContinuousSampler(MODEL, params, drawing, rows=5, chunk_steps=3)
    every = {c.index: c.tokens.tolist() for c in sampler.run(PROMPTS, keys)}
    assert sorted(every) == list(range(len(PROMPTS)))
    chosen = [17, 2, 11]
    some = sampler.run([PROMPTS[i] for i in chosen], keys[jnp.array(chosen)])
    assert {chosen[c.index]: c.tokens.tolist() for c in some} == {
        i: every[i] for i in chosen
    }
    for tokens in every.values():
        assert tokens[-1] in STOPS or len(tokens) == NEW
        assert not set(tokens[:-1]) & set(STOPS)


def test_the_same_run_gives_the_same_bits_in_the_same_order(params):
    drawing = Drawing(NEW, STOPS, 1.0, pad_token=PAD)
    keys = jax.random.split(jax.random.key(2), len(PROMPTS))

    def once():
        sampler = ContinuousSampler(MODEL, params, drawing, rows=5, chunk_steps=3)
        return [
            (c.index, c.tokens.tobytes(), c.log_probs.tobytes())
            for c in sampler.run(PROMPTS, keys)
        ]

    assert once() == once()


def test_work_is_counted_and_less_than_the_plain_loops(params):
    """A few long sequences, for which the plain loop waits in every batch."""
    prompts = random_prompts(64, 9, seed=3)
    rows = 5
    drawing = Drawing(NEW, STOPS, 1.0, pad_token=PAD)
    keys = jax.random.split(jax.random.key(3), len(prompts))
    sampler = ContinuousSampler(MODEL, params, drawing, rows=rows, chunk_steps=3)
    lengths = np.zeros(len(prompts), int)
    for found in sampler.run(prompts, keys):
        lengths[found.index] = len(found.tokens)
    # The first token of each comes of its prefill.
    needed = int((lengths - 1).sum())
    plain = sum(
        rows * (int(lengths[i : i + rows].max()) - 1) for i in range(0, 64, rows)
    )
    assert needed <= sampler.work.row_steps < 0.75 * plain
    assert needed > 0.6 * sampler.work.row_steps
    plain_reads = plain * (9 + NEW)
    assert sampler.work.slot_reads < plain_reads
    assert sampler.work.prompt_tokens == 64 * 9  # No row of padding.


def test_rows_and_slots_climb_their_ladders_within_bounds(params, monkeypatch):
    """Long completions: the cache grows and moves, and the last few rows are fewer."""
    shapes = []
    advance = continuous.chunks.advance

    def spy(params, cache, *args):
        shapes.append(cache.segment_ids.shape)
        return advance(params, cache, *args)

    monkeypatch.setattr(continuous.chunks, "advance", spy)
    monkeypatch.setattr(continuous, "_LEAST_SLOTS", 32)
    assert_same_rollout(*both(params, rows=16, max_new_tokens=50))
    assert {rows for rows, _ in shapes} == {16, 8}
    assert {slots for _, slots in shapes} == {32, 64}
    assert max(slots for _, slots in shapes) <= 9 + 50 + 4 * 3


@pytest.mark.parametrize(("length", "slots"), [(5, 8), (8, 8), (6, 16), (3, 4), (7, 7)])
def test_repacking_keeps_what_rows_hold(length, slots):
    """Against a copy, token by token."""
    generator = np.random.default_rng(0)
    held = [3, 0, 2]  # Tokens of each row, which end at slot 6 of 8.
    layers = 2

    def random(*shape):
        return jnp.asarray(generator.normal(size=shape), jnp.float32)

    slot = np.arange(8)
    segment_ids = np.stack([(slot >= 6 - n) & (slot < 6) for n in held])
    cache = Cache(
        layers=tuple(
            LayerCache(random(3, 2, 4, 8), random(3, 2, 8, 4)) for _ in range(layers)
        ),
        positions=jnp.asarray(generator.integers(0, 99, (3, 8)), jnp.int32),
        segment_ids=jnp.asarray(segment_ids, jnp.int32),
        length=jnp.int32(6),
        angles=(random(1, 8, 1, 2), random(1, 8, 1, 2)),
    )
    rows = [2, 0]
    moved = jax.jit(repack, static_argnames="slots")(
        cache, jnp.array(rows), jnp.int32(length), slots=slots
    )
    assert moved.length == length
    for new, old in enumerate(rows):
        count = held[old]
        inside = (np.arange(slots) >= length - count) & (np.arange(slots) < length)
        np.testing.assert_array_equal(moved.segment_ids[new], inside)
        there, here = slice(length - count, length), slice(6 - count, 6)
        np.testing.assert_array_equal(
            moved.positions[new, there], cache.positions[old, here]
        )
        for i in range(layers):
            np.testing.assert_array_equal(
                moved.layers[i].keys[new, :, :, there],
                cache.layers[i].keys[old, :, :, here],
            )
            np.testing.assert_array_equal(
                moved.layers[i].values[new, :, there],
                cache.layers[i].values[old, :, here],
            )


def test_bad_settings_are_refused(params):
    drawing = Drawing(NEW, STOPS, 1.0)
    for changes in ({"rows": 0}, {"rows": 1, "chunk_steps": 0}):
        with pytest.raises(ValueError, match="expected 1 or more"):
            ContinuousSampler(MODEL, params, drawing, **changes)
    with pytest.raises(ValueError, match="top_p is 0"):
        ContinuousSampler(MODEL, params, drawing._replace(top_p=0.0), rows=1)
    sampler = ContinuousSampler(MODEL, params, drawing, rows=1)
    with pytest.raises(ValueError, match="1 prompts with keys"):
        list(sampler.run(PROMPTS[:1], jax.random.split(jax.random.key(0), 2)))
    with pytest.raises(ValueError, match="a prompt has no token"):
        list(sampler.run([PROMPTS[0][:0]], jax.random.split(jax.random.key(0), 1)))
    assert list(sampler.run([], jax.random.split(jax.random.key(0), 0))) == []
