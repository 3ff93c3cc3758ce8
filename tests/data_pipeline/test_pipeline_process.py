"""The input pipeline in two processes, one of them killed and both begun again."""

import json
import signal
import subprocess
import sys
import textwrap

import numpy as np
import pytest

from geomjax.data.batches import Shard, make_batches

PROMPTS, BATCH, STEPS = 25, 6, 13
WORK = textwrap.dedent(
    """
    import json, sys, time
    import numpy as np
    from geomjax.data.batches import Shard, make_batches
    from geomjax.data.pipeline import Pipeline

    index, count, steps, state, linger = json.loads(sys.argv[1])
    token_ids = [np.full(i % 5 + 1, i, np.int32) for i in range(25)]
    batch_at = make_batches(
        token_ids, batch_size=6, seed=3, pad_id=0, shard=Shard(index, count)
    )
    with Pipeline(batch_at, ahead=3, threads=2) as pipeline:
        if state is not None:
            pipeline.set_state(state)
        first = pipeline.get_state()["next_index"]
        for step in range(first, first + steps):
            batch = pipeline.at(step)
            row = [step, batch.index.tolist(), batch.tokens.tolist()]
            print(json.dumps([row, pipeline.get_state()]), flush=True)
        if linger:
            time.sleep(600)
    """
)


def start(index, steps, state=None, linger=False):
    argument = json.dumps([index, 2, steps, state, linger])
    return subprocess.Popen(
        [sys.executable, "-c", WORK, argument], stdout=subprocess.PIPE, text=True
    )


def take(process, steps):
    """So many rows of a process, and its place after each."""
    return [json.loads(process.stdout.readline()) for _ in range(steps)]


@pytest.mark.timeout(300)
def test_two_processes_share_every_batch_and_resume_exactly_after_a_kill():
    cut, rows = 5, {0: [], 1: []}
    processes = [start(i, cut, linger=True) for i in (0, 1)]
    states = {}
    for i, process in enumerate(processes):
        # The second has come two steps further than its checkpoint when it is killed.
        taken = take(process, cut)
        kept = taken[: cut - 2] if i == 1 else taken
        rows[i] += [row for row, _ in kept]
        states[i] = kept[-1][1]
        process.send_signal(signal.SIGKILL)
        process.stdout.close()
        assert process.wait() == -signal.SIGKILL
    for i in (0, 1):
        left = STEPS - len(rows[i])
        with start(i, left, states[i]) as process:
            rows[i] += [row for row, _ in take(process, left)]
        assert process.returncode == 0

    token_ids = [np.full(i % 5 + 1, i, np.int32) for i in range(PROMPTS)]
    whole = make_batches(token_ids, batch_size=BATCH, seed=3, pad_id=0)
    seen = []
    for step in range(STEPS):
        expected = whole(step)
        for i in (0, 1):
            found, index, tokens = rows[i][step]
            part = Shard(i, 2).rows(BATCH)
            assert found == step
            assert index == expected.index[part].tolist()
            assert tokens == expected.tokens[part].tolist()
        both = [set(rows[i][step][1]) for i in (0, 1)]
        seen += [*rows[0][step][1], *rows[1][step][1]]
        if step < PROMPTS // BATCH:  # Within an epoch no prompt is in both.
            assert not both[0] & both[1]
    # Every prompt once an epoch, whatever was killed.
    for epoch in range(STEPS * BATCH // PROMPTS):
        own = seen[epoch * PROMPTS : (epoch + 1) * PROMPTS]
        assert sorted(own) == list(range(PROMPTS))
