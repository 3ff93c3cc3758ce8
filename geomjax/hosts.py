"""Several processes as one run: how they start, agree, and let one of them write.

`jax.distributed` connects them and ends them all when one dies. What is here is what a
run needs besides: process 0 alone writes shared files, and the others wait for it, or
fail with it; values that all have alike, or that each has a part of, become arrays over
all devices, and such arrays come back. Waiting goes through JAX's coordination service,
so that a process waits as long as the one it waits for is alive, up to 24 days.
"""

import _thread
import itertools
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

# The service has no public handle for keys and barriers; Orbax and Flax take this one.
from jax._src import clusters, distributed
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding

HEARTBEAT_S = 30
"""A process that was silent for so long is dead, and the others end with an error."""

SHUTDOWN_S = 10
"""How long a process that ends waits for the others to end too."""

VISIBLE_S = 30.0
"""How long a file that one process has written may take to appear on another host."""

START_S = 300.0
"""How long processes wait for each other at the start."""

_FOREVER_MS = 2**31 - 1  # The longest that the service takes: 24 days.
# Where JAX notes that a process was told to end; what reads it has no public handle.
_NOTICE = "RECEIVED_PREEMPTION_NOTICE"
_POLL_S = 0.5
_alone = False
_calls = itertools.count()
_polls = itertools.count()

T = TypeVar("T")


class Preempted(BaseException):
    """The run was told to end; started again, it goes on where it was.

    No `Exception`, as KeyboardInterrupt is none: what handles errors lets it pass.
    """


def initialize(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    timeout_s: float = START_S,
) -> None:
    """Connects this process with the others of its run; before any other use of JAX.

    Without arguments the environment decides: a TPU pod, Slurm or Open MPI job of more
    than one process is found as `jax.distributed.initialize` finds it, and anything
    else is one process alone, for which nothing is done.

    Args:
      coordinator: Address of process 0, `host:port`.
      num_processes: How many there are, the same in each.
      process_id: Which one this is, from 0.
      timeout_s: How long to wait for all of them, in seconds.

    Raises:
      ValueError: Some arguments are given and others not, or the processes do not agree
        on how many they are.
      OSError: The coordinator cannot be reached, or not all processes came in time.
    """
    given = coordinator, num_processes, process_id
    if given == (None, None, None):
        environment = _environment()
        if environment is None:
            return
        coordinator = environment.get_coordinator_address(timeout_s, None)
        num_processes = environment.get_process_count()
        process_id = environment.get_process_id()
    if coordinator is None or num_processes is None or process_id is None:
        raise ValueError(
            f"coordinator {coordinator}, num_processes {num_processes} and process_id "
            f"{process_id}: give all three, or none to read them from the environment"
        )
    if not 0 <= process_id < num_processes:
        raise ValueError(
            f"process_id {process_id} is not one of the {num_processes} processes, "
            f"which are counted from 0"
        )
    end = time.monotonic() + timeout_s
    if process_id:
        _reach(coordinator, end)
    _connect(coordinator, num_processes, process_id, end)
    counts = _counts(num_processes)
    if len(set(counts)) > 1:
        raise ValueError(
            f"the processes were started with different num_processes: {counts}; "
            "start all of them again with one"
        )


def count() -> int:
    """Number of processes that work together."""
    return 1 if _alone else distributed.global_state.num_processes or 1


@contextmanager
def alone() -> Iterator[None]:
    """Makes process 0 a run of its own, while the others wait for it elsewhere."""
    global _alone
    _alone = True
    try:
        yield
    finally:
        _alone = False


def index() -> int:
    """Which of them this is."""
    return distributed.global_state.process_id or 0


def is_main() -> bool:
    """Whether this is process 0, which alone writes what all share."""
    return index() == 0


def barrier() -> None:
    """Waits until every process is here."""
    if count() > 1:
        _client().wait_at_barrier(f"geomjax/barrier/{next(_calls)}", _FOREVER_MS)


def gather(value: Any) -> list[Any]:
    """Every process's value, in their order.

    Args:
      value: JSON data.
    """
    if count() == 1:
        return [value]
    key = f"geomjax/gather/{next(_calls)}"
    _client().key_value_set(f"{key}/{index()}", json.dumps(value))
    return [
        json.loads(_client().blocking_key_value_get(f"{key}/{i}", _FOREVER_MS))
        for i in range(count())
    ]


def on_main(action: Callable[[], T]) -> T:
    """Does something in process 0 alone, and returns its result in each.

    Args:
      action: Returns JSON data. For it, process 0 is `alone`.

    Raises:
      ValueError: It raised one; so does every process.
      OSError: Likewise.
      RuntimeError: It raised another error, which process 0 raises as it is.
    """
    if count() == 1:
        return action()
    key = f"geomjax/main/{next(_calls)}"
    if not is_main():
        return _unpack(json.loads(_client().blocking_key_value_get(key, _FOREVER_MS)))
    try:
        with alone():
            value = action()
    except Exception as error:
        _client().key_value_set(key, json.dumps({"error": _pack(error)}))
        raise
    _client().key_value_set(key, json.dumps({"value": value}))
    return value


def await_file(path: Path) -> None:
    """Waits until a file that process 0 has written is seen by this process too.

    A file system of several hosts may show it `VISIBLE_S` later; whoever opens a file
    that is still not there says so.
    """
    end = time.monotonic() + (VISIBLE_S if count() > 1 else 0.0)
    while not path.exists() and time.monotonic() < end:
        time.sleep(0.5)


def preempted() -> bool:
    """Whether any process was told to end, with SIGTERM, and all are to stop here.

    It is true in all of them at the same call; they must make the same calls.
    """
    if count() == 1:
        return False
    return multihost_utils.reached_preemption_sync_point(next(_polls))


def independently(action: Callable[[], None]) -> None:
    """Does what every process does by itself, until any of them is told to end.

    SIGTERM to one interrupts all, in the midst of it: the handler that Python had for
    it before JAX took it is called in each, as soon as its main thread is in Python.

    Args:
      action: To be repeated where it was interrupted; waits for no other process.

    Raises:
      Preempted: In each, if the handler raised it in any before all were done.
    """
    if count() == 1:
        return action()
    told = False
    try:
        with _interrupted_when_told():
            action()
    except Preempted:
        told = True
    if any(gather(told)):
        raise Preempted("told to end; start the same again to go on")


@contextmanager
def _interrupted_when_told() -> Iterator[None]:
    over = threading.Event()

    def watch() -> None:
        while not over.wait(_POLL_S):
            try:
                _client().key_value_try_get(_NOTICE)
            except jax.errors.JaxRuntimeError:  # There is none yet.
                continue
            _thread.interrupt_main(signal.SIGTERM)
            return

    watcher = threading.Thread(target=watch, name="told to end", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        over.set()
        watcher.join()


def put(tree: Any, shardings: Any) -> Any:
    """`jax.device_put` of what every process has alike, and does not compare.

    Args:
      tree: Arrays, random keys among them; those over all devices are laid out anew.
      shardings: One for all of them, or a tree of them; None for the default device.
    """
    if count() == 1:
        return jax.device_put(tree, shardings)
    if shardings is None or isinstance(shardings, NamedSharding):
        return jax.tree.map(lambda leaf: _put(leaf, shardings), tree)
    return jax.tree.map(_put, tree, shardings)


def _put(leaf: Any, sharding: NamedSharding | None) -> jax.Array:
    if sharding is None or (
        isinstance(leaf, jax.Array) and not leaf.is_fully_addressable
    ):
        return jax.device_put(leaf, sharding)
    if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        data = _put(jax.random.key_data(leaf), sharding)
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(leaf))
    value = np.asarray(jax.device_get(leaf))
    with jax.transfer_guard_host_to_device("allow"):  # It is asked for.
        return jax.make_array_from_callback(
            value.shape, sharding, lambda index: value[index]
        )


def global_batch(
    local: Any, sharding: NamedSharding | None, size: int | None = None
) -> Any:
    """Arrays over all devices, made of the rows that each process has read.

    Args:
      local: A tree of arrays `[b, ...]`, this process's rows of a batch, in the order
        of the processes; the same number of rows in each.
      sharding: How the whole batch lies on the mesh, for every array; None for the
        default device of one process.
      size: B, the rows of the whole batch; b of all processes together by default. With
        `b = B` every process has them all, and its devices take what they hold.

    Returns:
      The tree of global arrays `[B, ...]`.
    """
    if sharding is None:
        return jax.device_put(local)

    def of_rows(rows: Any) -> jax.Array:
        rows = np.asarray(rows)
        shape = None if size is None else (size, *rows.shape[1:])
        return jax.make_array_from_process_local_data(sharding, rows, shape)

    # A transfer that is asked for, which JAX's guard takes for one in passing.
    with jax.transfer_guard_host_to_device("allow"):
        return jax.tree.map(of_rows, local)


def fetch(tree: Any) -> Any:
    """Whole arrays on the host of every process: `jax.device_get` across processes.

    All processes must call it alike. Beyond the result, a device holds one whole leaf
    at a time.
    """
    return jax.tree.map(_fetch, tree)


def _fetch(leaf: Any) -> Any:
    if isinstance(leaf, jax.Array) and not (
        leaf.is_fully_addressable or leaf.is_fully_replicated
    ):
        with jax.transfer_guard_device_to_host("allow"):  # It is asked for.
            return multihost_utils.process_allgather(leaf, tiled=True)
    return jax.device_get(leaf)


def leave(status: int) -> None:
    """Ends this process at once, without the goodbye in which JAX waits for all.

    For a process that failed while others may be at work: they end with an error when
    its connections close, or when it has been silent for `HEARTBEAT_S`.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    if is_main():
        time.sleep(1.0)  # Those that found the same error may say so themselves.
    os._exit(status)


def _environment() -> Any | None:
    """The cluster that this process is one of several of."""
    for found in clusters.ClusterEnv._cluster_types:
        if not found.opt_in_only_method and found.is_env_present():
            return found if found.get_process_count() > 1 else None
    return None


def _reach(coordinator: str, end: float) -> None:
    """Waits until process 0 listens, as the service itself would abort the process."""
    host, _, port = coordinator.rpartition(":")
    while True:
        try:
            socket.create_connection((host, int(port)), timeout=5.0).close()
            return
        except ValueError:
            raise ValueError(
                f"coordinator {coordinator!r}: expected host:port"
            ) from None
        except OSError as error:
            if time.monotonic() > end:
                raise OSError(
                    f"the coordinator {coordinator} cannot be reached: {error}. Is "
                    "process 0 running there, and the port open?"
                ) from error
        time.sleep(0.2)


def _connect(coordinator: str, num_processes: int, process_id: int, end: float) -> None:
    remaining = max(1.0, end - time.monotonic())
    failed: list[Exception] = []

    def connect() -> None:
        try:
            jax.distributed.initialize(
                coordinator,
                num_processes,
                process_id,
                # When it is over, JAX aborts the process; we say why before.
                initialization_timeout=int(remaining) + 60,
                heartbeat_timeout_seconds=HEARTBEAT_S,
                shutdown_timeout_seconds=SHUTDOWN_S,
            )
        except (RuntimeError, ValueError) as error:
            failed.append(error)

    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(remaining)
    if thread.is_alive():
        raise TimeoutError(
            f"process {process_id} of {num_processes} waited {remaining:.0f} s at "
            f"{coordinator} for the others; start all {num_processes} with the same "
            "coordinator and number"
        )
    if failed:
        raise OSError(f"cannot join the run at {coordinator}: {failed[0]}")


def _counts(num_processes: int) -> list[int]:
    """What each process believes their number to be, as process 0 collects it."""
    key = "geomjax/count"
    _client().key_value_set(f"{key}/{index()}", str(num_processes))

    def collect() -> list[int]:
        return [
            int(_client().blocking_key_value_get(f"{key}/{i}", _FOREVER_MS))
            for i in range(num_processes)
        ]

    return on_main(collect)


def _client() -> Any:
    client = distributed.global_state.client
    assert client is not None
    return client


def _pack(error: Exception) -> dict[str, Any]:
    if isinstance(error, OSError) and error.errno is not None:
        path = None if error.filename is None else str(error.filename)
        return {"os": [error.errno, error.strerror, path]}
    kind = "value" if isinstance(error, ValueError) else "other"
    return {kind: str(error)}


def _unpack(found: dict[str, Any]) -> Any:
    if "value" in found:
        return found["value"]
    ((kind, what),) = found["error"].items()
    if kind == "os":
        raise OSError(*what)
    if kind == "value":
        raise ValueError(what)
    raise RuntimeError(f"process 0 failed: {what}")
