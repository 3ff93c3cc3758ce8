"""A run that is told to end saves itself between two steps, and goes on as if not."""

import os
import signal
import threading

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from geomjax.train.errors import Preempted
from geomjax.train.log import FILE, read_rows
from geomjax.train.loop import Schedule, run
from geomjax.train.step import init_state

TX = optax.adam(0.1)
SCHEDULE = Schedule(num_steps=9, evaluate_every=4, save_every=3)


def _start():
    return init_state({"weight": jnp.arange(6.0).reshape(2, 3)}, TX)


@jax.jit
def _update(state, batch):
    loss, gradients = jax.value_and_grad(
        lambda p: jnp.sum((p["weight"] - batch[:, None]) ** 2)
    )(state.params)
    updates, opt_state = TX.update(gradients, state.opt_state)
    params = optax.apply_updates(state.params, updates)
    return type(state)(state.step + 1, params, opt_state), {"loss": loss[None]}


def _relaxed(state, batch):
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        return _update(state, jax.device_put(batch))


def _advance(state, step):
    return _relaxed(state, np.full(2, step, np.float32))


def _evaluate(params):
    return {"norm": float(optax.tree.norm(params))}


def _bits(tree):
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


def _told_at(told, number):
    def advance(state, step):
        if step == told:
            os.kill(os.getpid(), number)
        return _advance(state, step)

    return advance


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("told", [0, 1, 3, 7, 8])
def test_a_run_told_to_end_goes_on_with_the_same_bits(tmp_path, number, told):
    expected = run(tmp_path / "whole", _start(), _advance, _evaluate, SCHEDULE)
    directory = tmp_path / "told"
    before = signal.getsignal(number)
    with pytest.raises(Preempted, match=f"is saved at step {told + 1}"):
        run(directory, _start(), _told_at(told, number), _evaluate, SCHEDULE)
    assert signal.getsignal(number) is before
    # The evaluation of that step is left to the next process.
    evaluated = [r["step"] for r in read_rows(directory) if r["kind"] == "eval"]
    assert evaluated == [step for step in (0, 4, 8) if step < told + 1]
    steps = []

    def counting(state, step):
        steps.append(step)
        return _advance(state, step)

    final = run(directory, _start(), counting, _evaluate, SCHEDULE)
    assert steps == list(range(told + 1, 9))
    assert _bits(final) == _bits(expected)
    assert (directory / FILE).read_bytes() == (tmp_path / "whole" / FILE).read_bytes()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_what_comes_after_the_last_step_is_passed_on(tmp_path, number):
    """Else a process of several runs would begin the next one."""
    heard, evaluated = [], []

    def evaluate(params):
        evaluated.append(params)
        if len(evaluated) == 4:  # After steps 0, 4, 8 and 9, the last.
            os.kill(os.getpid(), number)
        return _evaluate(params)

    before = signal.signal(number, lambda n, frame: heard.append(n))
    try:
        final = run(tmp_path, _start(), _advance, evaluate, SCHEDULE)
    finally:
        signal.signal(number, before)
    assert heard == [number]
    assert int(final.step) == 9


def test_an_evaluation_that_was_put_off_is_done_once(tmp_path):
    run(tmp_path / "whole", _start(), _advance, _evaluate, SCHEDULE)
    directory = tmp_path / "told"

    def stop_at(stop):
        def advance(state, step):
            if step == stop:
                raise InterruptedError
            return _advance(state, step)

        return advance

    with pytest.raises(Preempted):
        run(directory, _start(), _told_at(3, signal.SIGTERM), _evaluate, SCHEDULE)
    # Killed before the next checkpoint, after the evaluation: twice the same start.
    for stop in (4, 5):
        with pytest.raises(InterruptedError):
            run(directory, _start(), stop_at(stop), _evaluate, SCHEDULE)
    run(directory, _start(), _advance, _evaluate, SCHEDULE)
    assert (directory / FILE).read_bytes() == (tmp_path / "whole" / FILE).read_bytes()


def test_a_second_interrupt_ends_at_once(tmp_path):
    def advance(state, step):
        if step == 4:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
        return _advance(state, step)

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, _start(), advance, _evaluate, SCHEDULE)
    assert run(tmp_path, _start(), _advance, _evaluate, SCHEDULE).step == 9


def test_a_thread_leaves_the_signals_alone(tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    found = []

    def advance(state, step):
        found.append(signal.getsignal(signal.SIGTERM))
        return _advance(state, step)

    thread = threading.Thread(
        target=run, args=(tmp_path, _start(), advance, _evaluate, SCHEDULE)
    )
    thread.start()
    thread.join()
    assert found == [before] * 9


def test_a_transfer_in_passing_is_an_error(tmp_path):
    def advance(state, step):
        with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
            return _update(state, np.zeros(2, np.float32))

    with pytest.raises(Exception, match="Disallowed host-to-device transfer"):
        run(tmp_path, _start(), advance, _evaluate, SCHEDULE)


class _Batches:
    """A data iterator that draws as it goes, so that its place is more than a step."""

    def __init__(self):
        self._generator = np.random.default_rng(3)

    def __next__(self):
        return self._generator.standard_normal(2).astype(np.float32)

    def get_state(self):
        return self._generator.bit_generator.state

    def set_state(self, state):
        self._generator.bit_generator.state = state


@pytest.mark.parametrize("told", [1, 2, 6])
def test_the_iterators_place_is_saved_with_the_state(tmp_path, told):
    def train(directory, told=None):
        data = _Batches()

        def advance(state, step):
            if step == told:
                os.kill(os.getpid(), signal.SIGTERM)
            return _relaxed(state, next(data))

        return run(directory, _start(), advance, _evaluate, SCHEDULE, data=data)

    expected = train(tmp_path / "whole")
    directory = tmp_path / "told"
    with pytest.raises(Preempted):
        train(directory, told)
    assert _bits(train(directory)) == _bits(expected)
    assert (directory / FILE).read_bytes() == (tmp_path / "whole" / FILE).read_bytes()


def test_a_checkpoint_without_the_iterators_place_is_refused(tmp_path):
    with pytest.raises(Preempted):
        run(tmp_path, _start(), _told_at(1, signal.SIGTERM), _evaluate, SCHEDULE)
    with pytest.raises(ValueError, match="places of 0 data iterators"):
        run(tmp_path, _start(), _advance, _evaluate, SCHEDULE, data=_Batches())


def test_another_configurations_run_is_refused(tmp_path):
    with pytest.raises(Preempted):
        run(tmp_path, _start(), _told_at(1, signal.SIGTERM), _evaluate, SCHEDULE)
    with pytest.raises(ValueError, match="another configuration"):
        run(tmp_path, _start(), _advance, _evaluate, SCHEDULE, config_hash="other")
