"""The training loop: dispatch, read, evaluate, save, resume."""

import logging
import math
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import numpy as np

from geomjax import hosts
from geomjax.checkpoints.train_state import KEPT, TrainCheckpoints
from geomjax.optim.roles import dotted, leaf_paths
from geomjax.train.errors import NonFiniteError, Preempted
from geomjax.train.log import EVENTS, MetricsLog
from geomjax.train.preemption import PreemptionNotice
from geomjax.train.profile import Profiler, ProfileSteps
from geomjax.train.step import FINITE, StepMetrics, TrainState
from geomjax.train.throughput import Stopwatch, Work, peak_flops, rates
from geomjax.typing import Params

_LOGGER = logging.getLogger(__name__)


class Schedule(NamedTuple):
    """When a run does what, in training steps.

    Attributes:
      num_steps: Length of the run.
      evaluate_every: Steps between evaluations; step 0 and the last are always
        evaluated.
      save_every: Steps between checkpoints; the last step is always saved.
      keep: Checkpoints kept.
      profile: Steps of which a trace is made.
    """

    num_steps: int
    evaluate_every: int
    save_every: int
    keep: int = KEPT
    profile: ProfileSteps | None = None

    def evaluates(self, step: int) -> bool:
        """Whether the state after `step` steps is evaluated."""
        return step % self.evaluate_every == 0 or step == self.num_steps

    def saves(self, step: int) -> bool:
        """Whether the state after `step` steps is saved."""
        return step % self.save_every == 0 or step == self.num_steps


@runtime_checkable
class DataIterator(Protocol):
    """Where a run stands in its data, if the step's number does not say it.

    grain's iterators are such; what they hand out is taken in `advance`.
    """

    def get_state(self) -> Any:
        """The place of the next batch, JSON data."""

    def set_state(self, state: Any) -> None:
        """Goes to a place."""


def run(
    directory: Path,
    state: TrainState,
    advance: Callable[[TrainState, int], tuple[TrainState, StepMetrics]],
    evaluate: Callable[[Params], dict[str, float]],
    schedule: Schedule,
    on_step: Callable[[int, dict[str, float]], None] = lambda step, values: None,
    *,
    config_hash: str = "",
    data: DataIterator | None = None,
    work: Callable[[dict[str, np.ndarray]], Work] | None = None,
    tell: Callable[[str], None] = _LOGGER.warning,
) -> TrainState:
    """Trains to the end of the schedule, from the newest checkpoint if there is one.

    Step N is dispatched before the metrics of step N - 1 are read, so the device never
    waits for the host. What `advance` does at a step must be a function of the state,
    the step's number and the iterator's place alone; a run that is killed and started
    again then ends with the same bits, in its parameters and in its metrics (same
    machine, jaxlib and number of devices).

    Several processes call this alike, with a state laid out over the devices of all:
    each takes part in every step, evaluation and checkpoint, and process 0 writes.

    Args:
      directory: The run's folder: checkpoints, `metrics.jsonl`, `timing.jsonl`,
        TensorBoard events.
      state: The state before the first step; not used if a checkpoint is found, which
        is restored as this one is laid out. It is donated.
      advance: Takes the state and the number of steps done, returns the new state and
        metrics, one value an optimizer update. It moves data between host and device
        by `jax.device_put` and `device_get` alone: transfers in passing, which would
        wait for the device, raise an error.
      evaluate: From parameters to scalars.
      schedule: When to evaluate and save.
      on_step: Called after each step with the steps done and its scalars, for progress.
      config_hash: Names the configuration; a checkpoint of another is refused.
      data: The iterator whose place is saved with the state.
      work: What a step did, from its metrics, for the speeds in `timing.jsonl`.
      tell: Takes what a person should know.

    Returns:
      The final state.

    Raises:
      Preempted: The process was told to end, by SIGTERM or SIGINT. The state after the
        step is on disk.
      NonFiniteError: A loss, gradient or parameter is not finite; names the step and
        the tensors. The last good checkpoint is on disk.
      ValueError: The checkpoint found is of another run.
      OSError: The disk is full; the last good checkpoint is whole.
    """
    checkpoints = TrainCheckpoints(
        directory / "checkpoints", config_hash=config_hash, keep=schedule.keep
    )
    # A signal that comes late is passed on when the last save has ended.
    with PreemptionNotice() as notice, closing(checkpoints):
        restored = checkpoints.restore(state)
        for step in checkpoints.skipped:
            tell(
                f"{checkpoints.directory}: the checkpoint of step {step} is damaged or "
                "unfinished, and passed over for the one before"
            )
        resume_step = None
        if restored is not None:
            state = jax.tree.map(_committed_as, state, restored.state)
            resume_step = int(state.step)
            _go_to(data, restored.extra)
        del restored
        log = MetricsLog(directory, resume_step=resume_step)
        profiler = Profiler(directory / EVENTS, schedule.profile)
        with closing(log), closing(profiler):
            reader = _Reader(directory, log, checkpoints, on_step, work, state)
            start = resume_step or 0
            due = schedule.evaluates(start)
            if due and not hosts.on_main(lambda: log.evaluated(start)):
                log.write("eval", start, evaluate(state.params))
            for step in range(start, schedule.num_steps):
                profiler.between(step, state)
                with (
                    jax.transfer_guard("disallow"),
                    jax.profiler.StepTraceAnnotation("train", step_num=step),
                ):
                    state, metrics = advance(state, step)
                reader.read_previous()
                reader.pending = step + 1, metrics
                done = step + 1
                stopping = notice.requested()
                if stopping or schedule.evaluates(done) or schedule.saves(done):
                    reader.read_previous()
                if schedule.evaluates(done) and not stopping:
                    log.write("eval", done, evaluate(state.params))
                if schedule.saves(done) or stopping:
                    reader.check_params(done, state.params)
                    log.sync()
                    checkpoints.save(done, state, _place(data))
                if stopping:
                    checkpoints.wait()
                    raise Preempted(
                        f"told to end; {directory} is saved at step {done}. Start the "
                        "same again to go on from there"
                    )
            profiler.between(schedule.num_steps, state)
    return state


def _committed_as(like: Any, restored: Any) -> Any:
    """A restored leaf, tied to its device only if the one it stands for is.

    Orbax ties all to theirs, for which every program would be compiled again.
    """
    if isinstance(like, jax.Array) and not like.committed:
        return jax.device_put(jax.device_get(restored), may_alias=False)
    return restored


def _place(data: DataIterator | None) -> list[Any] | None:
    """Where every process stands in its data."""
    return None if data is None else hosts.gather(data.get_state())


def _go_to(data: DataIterator | None, places: list[Any] | None) -> None:
    if data is None:
        return
    places = places or []
    if places and all(place == places[0] for place in places):
        places = [places[0]] * hosts.count()  # However many processes there are.
    if len(places) != hosts.count():
        raise ValueError(
            f"the checkpoint holds the places of {len(places)} data iterators, "
            f"but there are {hosts.count()} processes; resume with as many"
        )
    data.set_state(places[hosts.index()])


class _Reader:
    """Reads a step's metrics once the next step is under way."""

    def __init__(self, directory, log, checkpoints, on_step, work, state: TrainState):
        self.pending: tuple[int, StepMetrics] | None = None
        self._directory, self._log = directory, log
        self._checkpoints, self._on_step, self._work = checkpoints, on_step, work
        devices = jax.tree.leaves(state)[0].sharding.device_set
        self._devices = len(devices)
        self._peak = peak_flops(next(iter(devices)).device_kind)
        self._stopwatch = Stopwatch()

    def read_previous(self) -> None:
        """Logs the pending step; raises NonFiniteError if it went wrong."""
        if self.pending is None:
            self._stopwatch.reset()  # An evaluation or a save has come between.
            return
        (step, metrics), self.pending = self.pending, None
        values = {name: np.asarray(v) for name, v in jax.device_get(metrics).items()}
        seconds = self._stopwatch.lap()
        finite = {n: values.pop(n) for n in list(values) if n.startswith(FINITE)}
        self._check(step, values, finite)
        updates = len(values["loss"])
        for i in range(updates):
            row = {name: float(value[i]) for name, value in values.items()}
            self._log.write(
                "train", step, {"update": (step - 1) * updates + i + 1, **row}
            )
        if seconds is not None:
            work = None if self._work is None else self._work(values)
            figures = rates(work, seconds, self._devices, self._peak)
            self._log.write_timing(step, figures)
        self._on_step(step, row)

    def check_params(self, step: int, params: Params) -> None:
        """Raises NonFiniteError unless every parameter is finite."""
        leaves = jax.device_get(_all_finite(params))
        bad = [
            dotted(path)
            for path, good in zip(leaf_paths(params), leaves, strict=True)
            if not good
        ]
        if bad:
            self._fail(step, f"parameters {', '.join(bad)}")

    def _check(self, step: int, values: dict, finite: dict) -> None:
        gradients = [name[len(FINITE) :] for name, v in finite.items() if not v.all()]
        scalars = [name for name, v in values.items() if not all(map(math.isfinite, v))]
        if gradients:
            self._fail(step, f"gradients of {', '.join(gradients)}")
        if scalars:
            self._fail(step, ", ".join(scalars))

    def _fail(self, step: int, what: str) -> None:
        self._checkpoints.wait()
        raise NonFiniteError(
            f"step {step}: {what} not finite in {self._directory}; the last good "
            "checkpoint is kept. Lower the learning rate, or clip the gradients "
            "(clip_norm)"
        )


@jax.jit
def _all_finite(params: Params) -> list[jax.Array]:
    return [jax.numpy.isfinite(leaf).all() for leaf in jax.tree.leaves(params)]
