"""The training loop in a process of its own: on a full disk, and killed."""

import os
import random
import resource
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from geomjax.train.log import FILE, read_rows

FULL_DISK = textwrap.dedent(
    """
    import errno, resource, sys
    from pathlib import Path

    import jax, jax.numpy as jnp, optax

    from geomjax.train.loop import Schedule, run
    from geomjax.train.step import TrainState

    limit = int(sys.argv[2])
    tx = optax.sgd(0.1)
    params = {"weight": jax.random.normal(jax.random.key(0), (256, 1024))}
    state = TrainState(jnp.int32(0), params, tx.init(params))

    @jax.jit
    def halve(state, divisor):
        params = jax.tree.map(lambda x: x * 0.5, state.params)
        state = TrainState(state.step + 1, params, state.opt_state)
        return state, {"loss": jnp.full((1,), 1.0) / divisor}

    def advance(state, step):
        # Checkpoint 2 was finished before 4 was begun; 4 may be under way.
        if step == 5 and limit:
            _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        return halve(state, jax.device_put(step + 1.0))

    def evaluate(params):
        return {"norm": float(optax.tree.norm(params))}

    try:
        final = run(Path(sys.argv[1]), state, advance, evaluate, Schedule(8, 8, 2))
    except OSError as error:
        assert error.errno == errno.EFBIG, error
        print("OSError")
    else:
        print(float(final.params["weight"].sum()))
    """
)


def _run_on_disk(directory, limit):
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(directory), str(limit)],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"XLA_FLAGS": ""},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("limit", [200_000, 1], ids=["checkpoint", "every file"])
def test_a_full_disk_stops_the_run_and_costs_no_checkpoint(tmp_path, limit):
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[1] == resource.RLIM_INFINITY
    whole, full = tmp_path / "whole", tmp_path / "full"
    assert _run_on_disk(full, limit) == "OSError"
    states = full / "checkpoints" / "states"
    assert (states / "2").is_dir()
    assert not (states / "6").exists()
    result = _run_on_disk(full, 0)  # There is room again.
    assert result == _run_on_disk(whole, 0)
    assert (full / FILE).read_bytes() == (whole / FILE).read_bytes()


KILLED = textwrap.dedent(
    """
    import sys, time
    from pathlib import Path

    import jax, jax.numpy as jnp, optax

    from geomjax.train.loop import Schedule, run
    from geomjax.train.step import init_state

    tx = optax.adam(0.1)
    state = init_state({"weight": jnp.arange(12.0).reshape(3, 4)}, tx)

    @jax.jit
    def update(state, index):
        key = jax.random.fold_in(jax.random.key(0), index)
        gradients = {"weight": jax.random.normal(key, (3, 4)) + state.params["weight"]}
        updates, opt_state = tx.update(gradients, state.opt_state)
        params = optax.apply_updates(state.params, updates)
        loss = jnp.sum(params["weight"] ** 2)[None]
        return type(state)(state.step + 1, params, opt_state), {"loss": loss}

    def advance(state, index):
        time.sleep(0.01)
        return update(state, jax.device_put(index))

    def evaluate(params):
        return {"mean": float(params["weight"].mean())}

    print("started", flush=True)
    final = run(Path(sys.argv[1]), state, advance, evaluate, Schedule(60, 7, 3))
    print(jax.tree.map(lambda leaf: jax.device_get(leaf).tobytes().hex(), final))
    """
)


def _start_killable(directory):
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(directory)],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"XLA_FLAGS": ""},
    )
    assert process.stdout.readline() == "started\n"
    return process


def _finish_killable(directory):
    output, _ = _start_killable(directory).communicate(timeout=300)
    return output


def _last_step(directory):
    return max((row["step"] for row in read_rows(directory)), default=-1)


def test_a_process_killed_at_random_moments_ends_with_the_same_bits(tmp_path):
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed of the kills: {seed}")  # noqa: T201, shown when the test fails
    generator = random.Random(seed)
    expected = _finish_killable(tmp_path / "whole")
    assert expected.startswith("TrainState(")
    directory = tmp_path / "killed"
    steps = [-1]
    for _ in range(5):
        target = steps[-1] + generator.randint(0, 10)
        process = _start_killable(directory)
        while _last_step(directory) < target and process.poll() is None:
            time.sleep(0.001)
        time.sleep(generator.uniform(0.0, 0.03))
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        steps.append(_last_step(directory))
    print(f"steps on disk at each kill: {steps[1:]}")  # noqa: T201
    assert _finish_killable(directory) == expected
    metrics = (directory / FILE).read_bytes()
    assert metrics == (tmp_path / "whole" / FILE).read_bytes()
    assert metrics.count(b"\n") == 60 + 10
