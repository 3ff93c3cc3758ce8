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

    from geomjax.train.errors import Preempted
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
    try:
        schedule = Schedule(int(sys.argv[2]), 7, 3)
        final = run(Path(sys.argv[1]), state, advance, evaluate, schedule)
    except Preempted as stop:
        print(stop)
        sys.exit(75)
    print(jax.tree.map(lambda leaf: jax.device_get(leaf).tobytes().hex(), final))
    """
)


def _start_killable(directory, num_steps):
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(directory), str(num_steps)],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"XLA_FLAGS": ""},
    )
    assert process.stdout.readline() == "started\n"
    return process


def _finish_killable(directory, num_steps):
    output, _ = _start_killable(directory, num_steps).communicate(timeout=300)
    return output


def _last_step(directory):
    return max((row["step"] for row in read_rows(directory)), default=-1)


def _unfinished(directory):
    """What Orbax writes under a temporary name."""
    return set((directory / "checkpoints" / "states").glob("*orbax-checkpoint-tmp*"))


def _kill(directory, num_steps, generator, number, target, in_save):
    """Starts the run and sends a signal at some moment; whether it ended by it."""
    before = _unfinished(directory)  # Left by an earlier kill, and no sign of a save.
    process = _start_killable(directory, num_steps)
    while process.poll() is None:
        before &= _unfinished(directory)
        saving = bool(_unfinished(directory) - before)
        if _last_step(directory) >= target and (saving or not in_save):
            break
        time.sleep(0.001)
    if not in_save:
        time.sleep(generator.uniform(0.0, 0.03))
    process.send_signal(number)
    output, _ = process.communicate(timeout=300)
    if number == signal.SIGKILL:
        return process.returncode == -signal.SIGKILL
    # Before the loop begins, the signal does what it always does.
    saved = process.returncode == 75 and "is saved at step" in output
    return saved or process.returncode == -signal.SIGTERM


def _survives(tmp_path, kills, num_steps):
    """Kills a run so often, and compares its end with that of one left alone."""
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed of the kills: {seed}")  # noqa: T201, shown when the test fails
    generator = random.Random(seed)
    expected = _finish_killable(tmp_path / "whole", num_steps)
    assert expected.startswith("TrainState(")
    directory = tmp_path / "killed"
    landed, last = [], -1
    for i in range(kills):
        number = signal.SIGKILL if i % 3 else signal.SIGTERM
        in_save = i % 4 == 3
        target = last + generator.randint(0, num_steps // kills // 2)
        if _kill(directory, num_steps, generator, number, target, in_save):
            landed.append((number.name, in_save))
        last = _last_step(directory)
    print(f"landed: {landed}, at step {last}")  # noqa: T201
    assert _finish_killable(directory, num_steps) == expected
    metrics = (directory / FILE).read_bytes()
    assert metrics == (tmp_path / "whole" / FILE).read_bytes()
    assert metrics.count(b"\n") == num_steps + -(-num_steps // 7) + 1
    return landed


def test_a_process_killed_at_random_moments_ends_with_the_same_bits(tmp_path):
    landed = _survives(tmp_path, kills=5, num_steps=60)
    assert len(landed) == 5


@pytest.mark.slow
def test_twenty_kills_at_random_moments_change_no_bit(tmp_path):
    landed = _survives(tmp_path, kills=20, num_steps=240)
    assert len(landed) >= 18
    assert sum(name == "SIGTERM" for name, _ in landed) >= 5
    assert sum(in_save for _, in_save in landed) >= 4
