"""A training run on two processes of four devices each, compared with one of eight."""

import os
import signal
import socket
import subprocess
import sys
import textwrap
import time

import numpy as np
import pytest

from geomjax.train.log import FILE

PROGRAM = textwrap.dedent(
    """
    import os, resource, sys, time
    from pathlib import Path

    directory, count, index, port, mode = sys.argv[1:]
    devices = 8 // int(count)
    os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={devices}"

    import jax, jax.numpy as jnp, numpy as np, optax
    from jax.experimental import multihost_utils
    from jax.sharding import NamedSharding, PartitionSpec as P

    from geomjax import hosts
    from geomjax.meshes import mesh_from_string
    from geomjax.train.errors import Preempted
    from geomjax.train.layout import like_parameters
    from geomjax.train.loop import Schedule, run
    from geomjax.train.step import TrainState

    if int(count) > 1:
        hosts.initialize(f"localhost:{port}", int(count), int(index), timeout_s=100)
    assert jax.device_count() == 8 and jax.process_count() == int(count)
    mesh = mesh_from_string("data=2,fsdp=4")
    rows, whole = NamedSharding(mesh, P(("data", "fsdp"))), NamedSharding(mesh, P())
    split = NamedSharding(mesh, P(None, "fsdp"))
    tx = optax.adam(0.05)

    width = 16 if mode == "wide" else 12
    params = np.linspace(-1, 1, 4 * width, dtype=np.float32).reshape(4, width)
    params = {"weight": params}
    params = jax.device_put(params, {"weight": split})
    opt_state = jax.eval_shape(tx.init, params)
    layout = TrainState(whole, {"weight": split}, like_parameters(opt_state, params))
    init = jax.jit(
        lambda p: TrainState(jnp.int32(0), p, tx.init(p)), out_shardings=layout
    )

    def step(state, batch):
        def loss(p):
            return jnp.mean((batch[:, :4] @ p["weight"] - batch[:, 4 : 4 + width]) ** 2)

        value, gradients = jax.value_and_grad(loss)(state.params)
        updates, opt_state = tx.update(gradients, state.opt_state)
        params = optax.apply_updates(state.params, updates)
        state = TrainState(state.step + 1, params, opt_state)
        return state, {"loss": value[None]}

    step = jax.jit(step, donate_argnums=0, out_shardings=(layout, whole))
    first = hosts.index() * 16 // hosts.count()

    def advance(state, done):
        if mode == "slow":
            time.sleep(0.2)
        if mode == "full" and done == 5 and hosts.index() == 1:
            saved = Path(directory) / "checkpoints" / "states" / "3"
            while not saved.exists():  # It is written beside the steps.
                time.sleep(0.1)
            _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (1, hard))
        batch = np.random.default_rng(done).standard_normal((16, 20), np.float32)
        mine = batch[first : first + 16 // hosts.count()]
        return step(state, hosts.global_batch(mine, rows))

    norm = jax.jit(lambda p: jnp.linalg.norm(p["weight"]), out_shardings=whole)

    def evaluate(params):
        return {"norm": float(norm(params))}

    print("started", flush=True)
    try:
        final = run(
            Path(directory), init(params), advance, evaluate, Schedule(12, 5, 3)
        )
    except Preempted as stop:
        print(stop, flush=True)
        hosts.barrier()
        sys.exit(75)
    except (OSError, ValueError) as error:  # As an experiment ends.
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        hosts.leave(1)
    assert final.params["weight"].sharding == split
    leaves = multihost_utils.process_allgather(jax.tree.leaves(final), tiled=True)
    np.savez(f"{directory}.{index}.npz", *map(np.asarray, leaves))
    hosts.barrier()
    """
)


def _start(directory, count, mode="fast"):
    with socket.socket() as found:
        found.bind(("localhost", 0))
        port = found.getsockname()[1]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    return [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM]
            + [str(x) for x in (directory, count, i, port, mode)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for i in range(count)
    ]


def _end(processes):
    try:
        found = [process.communicate(timeout=200) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [
        (process.returncode, *output)
        for process, output in zip(processes, found, strict=True)
    ]


def _finish(directory, count):
    """Bytes of the final state, a list a process.

    From files: the library that connects the processes prints too, into their lines.
    """
    ended = _end(_start(directory, count))
    assert [status for status, _, _ in ended] == [0] * count, ended
    return [_values(f"{directory}.{i}.npz") for i in range(count)]


def _values(path):
    with np.load(path) as leaves:
        return [leaves[name].tobytes() for name in leaves.files]


def _wait_for_rows(directory, count, processes):
    while not (directory / FILE).exists() or (
        (directory / FILE).read_bytes().count(b"\n") < count
    ):
        assert all(process.poll() is None for process in processes), _end(processes)
        time.sleep(0.02)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_processes_train_save_and_resume_as_one(tmp_path):
    (alone,) = _finish(tmp_path / "one", 1)
    two = tmp_path / "two"
    ours, theirs = _finish(two, 2)
    assert len(alone) == 5  # Step, weights, count and two moments.
    assert ours == theirs
    for a, b in zip(alone, ours, strict=True):
        one, both = np.frombuffer(a, np.float32), np.frombuffer(b, np.float32)
        # Sums over processes are in another order than those over devices.
        assert np.linalg.norm(one - both) <= 1e-6 * np.linalg.norm(one)
    assert (two / FILE).read_bytes().count(b"\n") == 12 + 4
    # One process is told to end: both stop at one step with the status of it.
    told = tmp_path / "told"
    processes = _start(told, 2, "slow")
    _wait_for_rows(told, 3, processes)
    processes[1].send_signal(signal.SIGTERM)
    ended = _end(processes)
    assert [status for status, _, _ in ended] == [75, 75], ended
    said = [output.splitlines()[-1] for _, output, _ in ended]
    assert said[0] == said[1]
    assert "is saved at step" in said[0]
    assert _finish(told, 2) == [ours, ours]
    assert (told / FILE).read_bytes() == (two / FILE).read_bytes()
    # A checkpoint of two processes is restored by one, on its own mesh.
    states = sorted((told / "checkpoints/states").iterdir(), key=lambda p: int(p.name))
    assert [path.name for path in states] == ["9", "12"]
    assert _finish(told, 1) == [ours]


@pytest.mark.slow
@pytest.mark.parametrize("dying", [0, 1])
def test_a_process_that_dies_in_a_step_ends_the_other(tmp_path, dying):
    processes = _start(tmp_path, 2, "slow")
    _wait_for_rows(tmp_path, 3, processes)
    processes[dying].kill()
    killed = time.monotonic()
    ended = _end(processes)
    assert time.monotonic() - killed < 60
    assert ended[dying][0] == -signal.SIGKILL
    status, _, errors = ended[1 - dying]
    assert status not in (0, 75)
    assert "another task died" in errors or "Connection closed by peer" in errors
    # What was saved is whole.
    ours, theirs = _finish(tmp_path, 2)
    assert ours == theirs


@pytest.mark.slow
def test_a_disk_that_is_full_for_one_ends_both_and_costs_no_checkpoint(tmp_path):
    full = tmp_path / "full"
    began = time.monotonic()
    ended = _end(_start(full, 2, "full"))
    assert time.monotonic() - began < 120
    assert 0 not in [status for status, _, _ in ended], ended
    assert ended[1][0] == 1
    assert (
        "the state was not saved, and checkpoints saved before are whole"
        in (ended[1][2])
    )
    states = {path.name for path in (full / "checkpoints/states").iterdir()}
    assert "3" in states
    assert "6" not in states
    assert _finish(full, 2) == _finish(tmp_path / "whole", 2)  # There is room again.
    assert (full / FILE).read_bytes() == (tmp_path / "whole" / FILE).read_bytes()
    # A model of other shapes is refused by both.
    for status, _, errors in _end(_start(full, 2, "wide")):
        assert status == 1
        assert "is of another run" in errors
        assert "params.weight: expected ((4, 16)" in errors
