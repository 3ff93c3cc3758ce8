"""How every experiment starts, and how it reports errors."""

import atexit
import logging as stdlib_logging
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout
from types import FrameType
from typing import NoReturn

from absl import app, flags, logging
from jax._src import xla_bridge  # The clients have no public handle.

from experiments.common import compilation_cache
from experiments.common.workdir import refuse_address
from geomjax import hosts
from geomjax.train.errors import NonFiniteError, Preempted

PREEMPTED_STATUS = 75
"""Exit status of a run that was told to end: start the same command again.

It is EX_TEMPFAIL of sysexits.h, and no status of an error.
"""

INTERRUPTED_STATUS = 130
"""Exit status of a run interrupted outside of training: 128 + SIGINT, as in shells."""

EXPECTED = (ValueError, OSError, NonFiniteError)
"""Errors that speak to the user; anything else is a defect and shows its traceback."""


_FOLDERS = ("workdir", "output", "folder")
"""Flags that name a folder to write in."""


def define_process_flags() -> None:
    """Defines what every experiment has: its place among processes, and the cache."""
    flags.DEFINE_string(
        "coordinator",
        None,
        "host:port of process 0, for a run of several processes. On a TPU pod and "
        "under Slurm or Open MPI it is found.",
    )
    flags.DEFINE_integer("num_processes", None, "How many there are; likewise.")
    flags.DEFINE_integer("process_id", None, "Which one this is, from 0; likewise.")
    flags.DEFINE_float(
        "start_timeout_s", hosts.START_S, "How long processes wait for each other."
    )
    flags.DEFINE_string(
        "compilation_cache",
        None,
        "Folder of compiled programs, kept between runs; one of this machine under "
        "~/.cache if unset, none if empty.",
    )


def main(
    run: Callable[[], None],
    define_flags: Callable[[], None] = lambda: None,
    *,
    cache: bool = True,
    shared: bool = False,
) -> None:
    """Parses flags and runs; an expected error becomes one message and status 1.

    With `--verbosity=1` its traceback is shown too. A run that is told to end, by
    SIGTERM or by an interrupt while it trains, has `PREEMPTED_STATUS`; of several
    processes JAX takes SIGTERM, and training loops, `evaluate` and the analysis of
    checkpoints heed it. Another interrupt has `INTERRUPTED_STATUS`.

    Args:
      run: The experiment.
      define_flags: Defines its flags, where importing it does not. ml_collections reads
        `--config` and its fields then, and raises what is wrong with them.
      shared: Whether several processes divide the work; otherwise process 0 does all of
        it while the others wait.
      cache: Whether compiled programs may be kept; benchmarks compile anew, and what is
        compiled for devices that are not there cannot be read again.
    """
    # Progress bars and messages of libraries stay out of ours.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    # JAX notes every backend that it does not find, such as a TPU on a laptop.
    # So it does of every connection.
    for name in ("xla_bridge", "distributed"):
        logger = stdlib_logging.getLogger(f"jax._src.{name}")
        logger.setLevel(stdlib_logging.WARNING)
    with _bad_flags_exit():
        if "coordinator" not in flags.FLAGS:
            define_process_flags()
        define_flags()

    def parse(argv: list[str]) -> list[str]:
        with _bad_flags_exit():
            return flags.FLAGS(argv)

    def guarded(argv: list[str]) -> None:
        if len(argv) > 1:
            sys.exit(f"error: unexpected arguments: {argv[1:]}")
        before = signal.signal(signal.SIGTERM, _stop)
        try:
            _run_as_process(run, cache, shared)
        except Preempted as stop:
            _end(PREEMPTED_STATUS, f"preempted: {stop}")
        except KeyboardInterrupt:
            _end(INTERRUPTED_STATUS, "interrupted: start the same again to go on")
        except EXPECTED as error:
            if logging.level_debug():
                traceback.print_exc()
            if hosts.count() > 1:
                print(f"error: {error}", file=sys.stderr)
                hosts.leave(1)
            sys.exit(f"error: {error}")
        finally:
            signal.signal(signal.SIGTERM, before)

    app.run(guarded, flags_parser=parse)


def _run_as_process(run: Callable[[], None], cache: bool, shared: bool) -> None:
    """Runs as one of the processes, and ends with them."""
    values = flags.FLAGS
    for name in _FOLDERS:
        if name in values:
            refuse_address(values[name].value or "")
    compilation_cache.enable(values.compilation_cache if cache else "")
    hosts.initialize(
        values.coordinator,
        values.num_processes,
        values.process_id,
        timeout_s=values.start_timeout_s,
    )
    with ExitStack() as stack:
        if not hosts.is_main():  # What is printed is the same in all of them.
            nothing = stack.enter_context(open(os.devnull, "w"))
            stack.enter_context(redirect_stdout(nothing))
        try:
            if shared:
                run()
            elif hosts.is_main():
                with hosts.alone():
                    run()
        except SystemExit:
            hosts.barrier()
            raise
        hosts.barrier()


def _end(status: int, message: str) -> NoReturn:
    """Ends a process that was interrupted, without the interpreter's own last steps.

    Compilation that was interrupted goes on in a thread of JAX. Where the device that
    it compiles for is let go of, which Python does as it ends, that thread reads what
    is no longer there, and the process ends in a segmentation fault (jaxlib 0.10).
    """
    _held = dict(xla_bridge._backends)  # JAX lets go of them in its exit function.
    try:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)  # It is ending.
        if logging.level_debug():
            traceback.print_exc()
        print(message, file=sys.stderr)
        if status == INTERRUPTED_STATUS and hosts.count() > 1:
            hosts.leave(status)  # The others are at work, and take no leave.
        # CPython's own name for what it does first at the end. JAX says goodbye to
        # other processes there.
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:  # Whoever read what it prints may be gone.
        os._exit(status)


def _stop(number: int, frame: FrameType | None) -> None:
    """Ends what is not training, which has nothing to save and takes care of itself."""
    raise Preempted("told to end outside of training; start the same again to go on")


@contextmanager
def _bad_flags_exit() -> Iterator[None]:
    """Turns what is wrong with flags into one message and status 1."""
    try:
        yield
    except (AttributeError, KeyError) as error:
        name = str(error).strip("\"'")
        sys.exit(f"error: the configuration has no field {name!r}")
    except (flags.Error, TypeError, ValueError, OSError) as error:
        # ml_collections wraps what a configuration file raises in its traceback.
        cause: BaseException = error
        while "Traceback" in str(cause) and cause.__context__ is not None:
            cause = cause.__context__
        sys.exit(f"error: {cause}")
