import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from geomjax.data.batches import (
    batch_index,
    epoch_order,
    longest,
    make_batches,
    pad_prompts,
)


def prompts(*lengths):
    return [np.arange(10, 10 + n, dtype=np.int32) for n in lengths]


def test_pad_prompts_by_hand():
    batch = pad_prompts(prompts(2, 4, 1), 4, pad_id=7)
    np.testing.assert_array_equal(
        batch.tokens, [[7, 7, 10, 11], [10, 11, 12, 13], [7, 7, 7, 10]]
    )
    np.testing.assert_array_equal(
        batch.positions, [[0, 0, 0, 1], [0, 1, 2, 3], [0, 0, 0, 0]]
    )
    np.testing.assert_array_equal(
        batch.segment_ids, [[0, 0, 1, 1], [1, 1, 1, 1], [0, 0, 0, 1]]
    )
    np.testing.assert_array_equal(batch.index, [0, 1, 2])
    assert {array.dtype for array in batch[:4]} == {np.dtype(np.int32)}


@pytest.mark.parametrize(("lengths", "said"), [((2, 5), "1 has 5"), ((0,), "0 has 0")])
def test_pad_prompts_refuses_empty_and_overlong(lengths, said):
    with pytest.raises(ValueError, match=rf"prompt {said} tokens .*1 to 4"):
        pad_prompts(prompts(*lengths), 4, pad_id=0)


@settings(deadline=None)
@given(
    size=st.integers(1, 40), batch_size=st.integers(1, 40), seed=st.integers(0, 2**64)
)
def test_each_epoch_visits_each_prompt_once(size, batch_size, seed):
    batch_size = min(batch_size, size)
    steps = -(-3 * size // batch_size)
    visited = np.concatenate(
        [
            batch_index(step, seed=seed, batch_size=batch_size, size=size)
            for step in range(steps)
        ]
    )
    assert visited.shape == (steps * batch_size,)
    for epoch in range(3):
        part = visited[epoch * size : (epoch + 1) * size]
        np.testing.assert_array_equal(np.sort(part), np.arange(size))


def test_order_differs_between_epochs_and_seeds():
    orders = {
        tuple(epoch_order(seed, epoch, 50)) for seed in range(3) for epoch in range(3)
    }
    assert len(orders) == 9


def test_order_is_the_same_in_every_release():
    # Written down once: a run must go on as it began after an upgrade.
    assert epoch_order(0, 0, 8).tolist() == [3, 2, 1, 6, 0, 7, 4, 5]
    assert epoch_order(7, 3, 8).tolist() == [2, 4, 7, 3, 5, 1, 0, 6]


def test_any_step_can_be_made_first():
    token_ids = prompts(*range(1, 12))
    settings = {"batch_size": 4, "seed": 5, "pad_id": 0}
    in_turn = make_batches(token_ids, **settings)
    earlier = [in_turn(step) for step in range(9)]
    epoch_order.cache_clear()
    resumed = make_batches(token_ids, **settings)(8)
    for expected, got in zip(earlier[8], resumed, strict=True):
        np.testing.assert_array_equal(expected, got)


def test_rows_belong_to_their_index_and_shape_is_fixed():
    token_ids = prompts(*range(1, 12))
    batch_at = make_batches(token_ids, batch_size=3, seed=0, pad_id=0)
    for step in range(8):
        batch = batch_at(step)
        assert batch.tokens.shape == (3, longest(token_ids)) == (3, 11)
        assert batch.index.dtype == np.int32
        for row, real, i in zip(
            batch.tokens, batch.segment_ids, batch.index, strict=True
        ):
            np.testing.assert_array_equal(row[real == 1], token_ids[i])


def test_length_may_be_shared_between_datasets():
    batch_at = make_batches(prompts(2, 3), batch_size=2, seed=0, pad_id=0, length=9)
    assert batch_at(0).tokens.shape == (2, 9)


def test_bad_requests():
    token_ids = prompts(1, 2, 3)
    with pytest.raises(ValueError, match="got 4 with 3 prompts"):
        make_batches(token_ids, batch_size=4, seed=0, pad_id=0)
    with pytest.raises(ValueError, match="got 1 with 0 prompts"):
        make_batches([], batch_size=1, seed=0, pad_id=0)
    with pytest.raises(ValueError, match="got 0 with 3 prompts"):
        make_batches(token_ids, batch_size=0, seed=0, pad_id=0)
    with pytest.raises(ValueError, match="expected 1 to 2"):
        make_batches(token_ids, batch_size=1, seed=0, pad_id=0, length=2)
    with pytest.raises(ValueError, match="seed -1"):
        make_batches(token_ids, batch_size=1, seed=-1, pad_id=0)
    with pytest.raises(ValueError, match="step -1"):
        batch_index(-1, seed=0, batch_size=1, size=3)
