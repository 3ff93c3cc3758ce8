"""Packed rows give the losses and gradients of the same sequences apart."""

import time
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from geomjax.data import packing
from geomjax.data.batches import Shard
from geomjax.data.packing import (
    OPEN_ROWS,
    TokenSequence,
    join_rows,
    make_packed_batches,
    pack_order,
)
from geomjax.data.supervised import pad_responses
from geomjax.models.config import DecoderConfig
from geomjax.models.load import make_decoder
from geomjax.objectives.base import Batch, token_mean
from geomjax.objectives.sft import cross_entropy

CONFIG = DecoderConfig(
    architecture="Qwen3ForCausalLM",
    vocab_size=24,
    hidden_size=16,
    intermediate_size=20,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    rms_norm_eps=1e-6,
    rope_theta=1e4,
    tie_word_embeddings=False,
    max_position_embeddings=64,
)


def sequences(count, seed=0, longest=12):
    generator = np.random.default_rng(seed)
    made = []
    for _ in range(count):
        length = int(generator.integers(2, longest))
        prompt = int(generator.integers(1, length))
        tokens = generator.integers(0, 24, length).astype(np.int32)
        made.append(TokenSequence(tokens, np.arange(length) >= prompt))
    return made


def packed_rows(made):
    """All of them, each once."""
    order = pack_order([len(each.tokens) for each in made], range(len(made)), 20)
    return join_rows(made, order, 20, 0)


def batch_of(rows):
    return Batch(
        tokens=jnp.asarray(rows.tokens),
        positions=jnp.asarray(rows.positions),
        segment_ids=jnp.asarray(rows.segment_ids),
        weights=token_mean(jnp.asarray(rows.completion)),
        behaviour_log_probs=jnp.zeros(rows.tokens.shape, jnp.float32),
    )


def test_packed_equals_unpacked():
    made = sequences(9)
    packed = packed_rows(made)
    assert packed.segment_ids.max() > 1, "nothing was packed"
    assert packed.completion.sum() == sum(each.completion.sum() for each in made)
    apart = pad_responses(
        [each.tokens[~each.completion] for each in made],
        [each.tokens[each.completion] for each in made],
        prompt_length=12,
        response_length=12,
        pad_id=0,
    )
    model = make_decoder(CONFIG, 24)
    params = model.init(jax.random.key(0))
    objective = jax.jit(jax.value_and_grad(cross_entropy(model), has_aux=True))
    (loss, _), gradients = objective(params, {}, batch_of(packed))
    (expected, _), wanted = objective(params, {}, batch_of(apart))
    np.testing.assert_allclose(loss, expected, rtol=2e-6)
    for got, want in zip(*map(jax.tree.leaves, (gradients, wanted)), strict=True):
        scale = float(jnp.abs(want).max())
        np.testing.assert_allclose(got, want, rtol=0, atol=2e-6 * max(scale, 1e-3))


def test_without_segments_packed_would_differ():
    """The test above can fail: neighbours that are seen change the loss."""
    made = sequences(9)
    packed = packed_rows(made)
    model = make_decoder(CONFIG, 24)
    params = model.init(jax.random.key(0))
    merged = packed._replace(segment_ids=np.minimum(packed.segment_ids, 1))
    loss = jax.jit(cross_entropy(model))
    right, _ = loss(params, {}, batch_of(packed))
    wrong, _ = loss(params, {}, batch_of(merged))
    assert abs(float(right - wrong)) > 1e-3


def test_rows_by_hand():
    # 5 and 4 leave 1; 3 opens the second row, where 6 fits; 1 goes back to the first.
    assert pack_order([5, 4, 3, 6, 1], [0, 1, 2, 3, 4], 10) == [[0, 1, 4], [2, 3]]
    many = [2] * (OPEN_ROWS + 1) + [1]
    rows = pack_order(many, range(len(many)), 2)
    assert len(rows) == len(many)
    assert sorted(sum(rows, [])) == list(range(len(many)))


def test_each_epoch_holds_every_sequence_once_in_another_order():
    made = [TokenSequence(s.tokens + 0, s.completion) for s in sequences(40)]
    for i, each in enumerate(made):
        each.tokens[0] = 100 + i  # Names the sequence.
    batch_at = make_packed_batches(made, batch_rows=1, row_length=16, seed=3, pad_id=0)
    epochs, current = [[]], []
    for step in range(60):
        tokens = batch_at(step).tokens
        current += [int(t) for t in tokens[tokens >= 100]]
        if len(current) == len(made):
            epochs[-1], current = current, []
            epochs.append([])
    assert len(epochs) >= 3
    for epoch in epochs[:-1]:
        assert sorted(epoch) == list(range(100, 140))
    assert epochs[0] != epochs[1]


def test_steps_in_any_order_and_by_process_are_the_same():
    made = sequences(50)
    settings = {"batch_rows": 4, "row_length": 16, "seed": 0, "pad_id": 0}
    in_turn = make_packed_batches(made, **settings)
    expected = [in_turn(step) for step in range(12)]
    late = make_packed_batches(made, **settings)(11)
    parts = [
        make_packed_batches(made, **settings, shard=Shard(i, 2))(11) for i in (0, 1)
    ]
    for field, want, one, two in zip(late, expected[11], *parts, strict=True):
        np.testing.assert_array_equal(field, want)
        np.testing.assert_array_equal(np.concatenate([one, two]), want)


def test_threads_that_reach_an_epoch_together_agree(monkeypatch):
    made = sequences(12)
    settings = {"batch_rows": 2, "row_length": 16, "seed": 0, "pad_id": 0}
    expected = [make_packed_batches(made, **settings)(step) for step in range(16)]

    def slowly(*args):
        time.sleep(0.01)  # So that the others get as far.
        return pack_order(*args)

    monkeypatch.setattr(packing, "pack_order", slowly)
    batch_at = make_packed_batches(made, **settings)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(batch_at, range(16)))
    for got, want in zip(found, expected, strict=True):
        for field, other in zip(got, want, strict=True):
            np.testing.assert_array_equal(field, other)


def test_sequences_that_cannot_be_packed_are_named():
    good = TokenSequence(np.arange(3, dtype=np.int32), np.array([False, True, True]))
    settings = {"batch_rows": 1, "row_length": 4, "seed": 0, "pad_id": 0}
    bad = good._replace(completion=np.ones(3, bool))
    with pytest.raises(ValueError, match="sequence 1: .*got the first"):
        make_packed_batches([good, bad], **settings)
    bad = good._replace(completion=np.zeros(3, bool))
    with pytest.raises(ValueError, match="sequence 0: .*got none"):
        make_packed_batches([bad], **settings)
    long = TokenSequence(np.zeros(5, np.int32), np.arange(5) > 0)
    with pytest.raises(ValueError, match="sequence 1 has 5 tokens, expected 1 to 4"):
        make_packed_batches([good, long], **settings)
    with pytest.raises(ValueError, match="no sequence"):
        make_packed_batches([], **settings)
