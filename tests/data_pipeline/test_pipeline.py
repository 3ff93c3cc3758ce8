"""The pipeline keeps the order, resumes exactly, and does not keep a step waiting."""

import json
import threading
import time

import jax
import numpy as np
import pytest

from geomjax.data.batches import Shard, make_batches
from geomjax.data.pipeline import Pipeline

SETTINGS = {"batch_size": 6, "seed": 3, "pad_id": 0}


@pytest.fixture
def token_ids():
    generator = np.random.default_rng(0)
    return [generator.integers(1, 99, n).astype(np.int32) for n in range(1, 26)]


def same(a, b):
    for left, right in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert left.dtype == right.dtype
        np.testing.assert_array_equal(left, right)


def test_the_order_is_that_of_the_steps_whatever_the_threads(token_ids):
    batch_at = make_batches(token_ids, **SETTINGS)
    for threads, ahead in ((1, 1), (1, 4), (3, 5)):
        with Pipeline(batch_at, threads=threads, ahead=ahead) as pipeline:
            for step in range(13):  # Over several epochs of 25 prompts.
                same(pipeline.at(step), batch_at(step))


def test_a_state_in_json_leads_to_the_same_example(token_ids):
    batch_at = make_batches(token_ids, **SETTINGS)
    with Pipeline(batch_at) as pipeline:
        for step in range(7):
            pipeline.at(step)
        state = json.loads(json.dumps(pipeline.get_state()))
        expected = [pipeline.at(step) for step in (7, 8)]
    with Pipeline(batch_at) as resumed:
        resumed.set_state(state)
        same(resumed.at(7), expected[0])
        assert resumed.get_state() != state
        same(resumed.at(8), expected[1])
    with Pipeline(batch_at) as jumped:
        same(jumped.at(8), expected[1])
        same(jumped.at(7), expected[0])


@pytest.mark.parametrize("count", [1, 2, 3, 6])
def test_what_processes_make_together_is_what_one_makes(token_ids, count):
    whole = make_batches(token_ids, **SETTINGS)
    parts = [
        make_batches(token_ids, **SETTINGS, shard=Shard(i, count)) for i in range(count)
    ]
    for step in range(9):
        made = [part(step) for part in parts]
        joined = jax.tree.map(lambda *rows: np.concatenate(rows), *made)
        same(joined, whole(step))


def test_shards_that_do_not_fit_are_refused(token_ids):
    with pytest.raises(ValueError, match="part 0 of 4 of a batch of 6"):
        make_batches(token_ids, **SETTINGS, shard=Shard(0, 4))
    with pytest.raises(ValueError, match="part 2 of 2"):
        make_batches(token_ids, **SETTINGS, shard=Shard(2, 2))


def test_a_step_does_not_wait_for_a_slow_source():
    """A batch takes 20 ms to make and a step 60 ms: only the first is waited for."""

    def slow(step):
        time.sleep(0.02)
        return step

    with Pipeline(slow) as pipeline:
        for step in range(8):
            assert pipeline.at(step) == step
            time.sleep(0.06)
    assert pipeline.wait.batches == 8
    # Made one after the other, the seven would be waited for for 0.14 s; on an idle
    # machine it is 0.1 ms.
    assert pipeline.wait.total_s - pipeline.wait.longest_s < 0.07, pipeline.wait


def test_threads_make_batches_at_the_same_time():
    """Eight batches of 50 ms in threads of four, at no step's cost: some 100 ms."""
    running, most = [0], [0]
    lock = threading.Lock()

    def slow(step):
        with lock:
            running[0] += 1
            most[0] = max(most[0], running[0])
        time.sleep(0.05)
        with lock:
            running[0] -= 1
        return step

    with Pipeline(slow, threads=4, ahead=4) as pipeline:
        assert [pipeline.at(step) for step in range(8)] == list(range(8))
    assert 1 < most[0] <= 4


def test_what_a_batch_raises_is_raised_by_its_step_and_threads_end():
    def bad(step):
        if step == 2:
            raise ValueError("prompt 5 is broken")
        return step

    before = threading.active_count()
    with Pipeline(bad) as pipeline:
        assert [pipeline.at(0), pipeline.at(1)] == [0, 1]
        with pytest.raises(ValueError, match="prompt 5 is broken"):
            pipeline.at(2)
    deadline = time.monotonic() + 10
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() <= before


def test_bad_settings_are_refused():
    with pytest.raises(ValueError, match="0 batches ahead"):
        Pipeline(int, ahead=0)
