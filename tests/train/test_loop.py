"""The order of things in a run, and what is left when it stops."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from geomjax.checkpoints.train_state import CHECKSUMS, TrainCheckpoints
from geomjax.train.errors import NonFiniteError
from geomjax.train.log import FILE, read_rows
from geomjax.train.loop import Schedule, run
from geomjax.train.step import TrainState, init_state

UPDATES = 2
TX = optax.sgd(0.1, momentum=0.9)
SCHEDULE = Schedule(num_steps=7, evaluate_every=3, save_every=2)


def _params():
    return {
        "dense": {"weight": jnp.arange(6.0).reshape(2, 3) / 7.0},
        "norm": {"weight": jnp.ones((3,))},
    }


def _start():
    return init_state(_params(), TX)


@jax.jit
def _update(state, key):
    """Two noisy updates of a quadratic loss, with the metrics of a real step."""
    metrics = []
    params, opt_state = state.params, state.opt_state
    for i in range(UPDATES):
        noise = jax.random.normal(jax.random.fold_in(key, i), (3,))
        loss, gradients = jax.value_and_grad(
            lambda p, noise=noise: jnp.sum(
                (p["dense"]["weight"] * p["norm"]["weight"] - noise) ** 2
            )
        )(params)
        updates, opt_state = TX.update(gradients, opt_state, params)
        params = optax.apply_updates(params, updates)
        finite = {
            f"finite/{name}.weight": jnp.isfinite(gradients[name]["weight"])
            .all()
            .astype(jnp.float32)
            for name in ("dense", "norm")
        }
        metrics.append({"loss": loss, **finite})
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *metrics)
    return TrainState(state.step + 1, params, opt_state), stacked


_donating = jax.jit(_update.__wrapped__, donate_argnums=0)


KEY = jax.random.key(3)


def _advance(state, step):
    index = jax.device_put(np.uint32(step))
    with jax.numpy_rank_promotion("allow"):
        return _donating(state, jax.random.fold_in(KEY, index))


def _evaluate(params):
    return {"norm": float(optax.tree.norm(params))}


def _bits(tree):
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


def _restorable(directory):
    """The step of the newest whole checkpoint."""
    checkpoints = TrainCheckpoints(directory / "checkpoints")
    state = checkpoints.restore(_start())
    checkpoints.close()
    return None if state is None else int(state.state.step)


class _Recorder:
    """A device that does steps later, and what the loop asks of it."""

    def __init__(self, metrics=lambda step: {"loss": np.full((UPDATES,), 1.0 / step)}):
        self.events, self.metrics = [], metrics

    def advance(self, state, step):
        assert int(state.step) == step
        self.events.append(("dispatch", step + 1))
        recorder = self

        class Value:
            """A metric whose reading is seen."""

            def __init__(self, name, value):
                self.name, self.value = name, value

            def __array__(self, dtype=None, copy=None):
                recorder.events.append(("read", step + 1))
                return self.value

        values = self.metrics(step + 1)
        metrics = {name: Value(name, value) for name, value in values.items()}
        return state._replace(step=jax.device_put(np.int32(step + 1))), metrics

    def evaluate(self, params):
        self.events.append(("evaluate",))
        return {"accuracy": 0.5}

    def on_step(self, step, values):
        self.events.append(("report", step, values["loss"]))


def _run_recorded(directory, schedule, **kwargs):
    recorder = _Recorder(**kwargs)
    # A reading goes through jax.device_get, which leaves other objects as they are.
    state = run(
        directory,
        _start(),
        recorder.advance,
        recorder.evaluate,
        schedule,
        recorder.on_step,
    )
    return recorder.events, state


def test_a_step_is_dispatched_before_the_one_before_it_is_read(tmp_path):
    events, _ = _run_recorded(tmp_path, Schedule(5, 100, 100))
    expected = [("evaluate",), ("dispatch", 1)]
    for step in range(2, 6):
        expected += [
            ("dispatch", step),
            ("read", step - 1),
            ("report", step - 1, 1.0 / (step - 1)),
        ]
    expected += [("read", 5), ("report", 5, 0.2), ("evaluate",)]
    assert events == expected


def test_every_step_is_reported_once_and_in_order(tmp_path):
    reported = []
    run(
        tmp_path,
        _start(),
        _advance,
        _evaluate,
        SCHEDULE,
        lambda step, values: reported.append((step, values["loss"])),
    )
    assert [step for step, _ in reported] == list(range(1, 8))
    last = [row for row in read_rows(tmp_path) if row["kind"] == "train"]
    assert [loss for _, loss in reported] == [row["loss"] for row in last[1::2]]


@pytest.mark.parametrize(
    ("schedule", "evaluated", "saved"),
    [
        (Schedule(7, 3, 2), [0, 3, 6, 7], [2, 4, 6, 7]),
        (Schedule(6, 3, 2), [0, 3, 6], [2, 4, 6]),
        (Schedule(2, 5, 9), [0, 2], [2]),
        (Schedule(3, 1, 1), [0, 1, 2, 3], [1, 2, 3]),
    ],
)
def test_evaluations_and_checkpoints_are_at_their_steps(
    tmp_path, monkeypatch, schedule, evaluated, saved
):
    steps = []
    save = TrainCheckpoints.save

    def record(self, step, state, extra):
        assert int(state.step) == step
        steps.append(step)
        save(self, step, state, extra)

    monkeypatch.setattr(TrainCheckpoints, "save", record)
    final = run(tmp_path, _start(), _advance, _evaluate, schedule)
    rows = read_rows(tmp_path)
    assert [row["step"] for row in rows if row["kind"] == "eval"] == evaluated
    assert steps == saved
    kept = sorted(int(p.name) for p in (tmp_path / "checkpoints/states").iterdir())
    assert kept == saved[-2:]
    assert int(final.step) == schedule.num_steps


def test_an_evaluation_sees_the_parameters_of_its_step(tmp_path):
    run(tmp_path, _start(), _advance, _evaluate, SCHEDULE)
    state, norms = _start(), {}
    for step in range(8):
        norms[step] = _evaluate(state.params)["norm"]
        state, _ = _advance(state, step)
    for row in read_rows(tmp_path):
        if row["kind"] == "eval":
            assert row["norm"] == norms[row["step"]]


def test_rows_are_numbered_by_update(tmp_path):
    run(tmp_path, _start(), _advance, _evaluate, SCHEDULE)
    rows = [row for row in read_rows(tmp_path) if row["kind"] == "train"]
    assert [row["update"] for row in rows] == list(range(1, 15))
    assert [row["step"] for row in rows] == [s for s in range(1, 8) for _ in range(2)]
    assert all(set(row) == {"kind", "step", "update", "loss"} for row in rows)


def test_a_donated_state_is_not_used_again(tmp_path):
    donated = []

    def advance(state, step):
        result = _advance(state, step)
        for leaf in jax.tree.leaves(state):
            leaf.delete()  # As an accelerator would; the CPU may spare it.
        donated.append(step)
        return result

    final = run(tmp_path / "a", _start(), advance, _evaluate, SCHEDULE)
    expected = run(tmp_path / "b", _start(), _advance, _evaluate, SCHEDULE)
    assert donated == list(range(7))
    assert _bits(final) == _bits(expected)
    assert (tmp_path / "a" / FILE).read_bytes() == (tmp_path / "b" / FILE).read_bytes()


class _StoppedError(Exception):
    """Stands for a kill."""


@pytest.mark.parametrize("stop", range(7))
def test_a_run_stopped_at_any_step_ends_with_the_same_bits(tmp_path, stop):
    expected = run(tmp_path / "whole", _start(), _advance, _evaluate, SCHEDULE)
    directory = tmp_path / "stopped"

    def stopping(state, step):
        if step == stop:
            raise _StoppedError
        return _advance(state, step)

    with pytest.raises(_StoppedError):
        run(directory, _start(), stopping, _evaluate, SCHEDULE)
    steps = []

    def counting(state, step):
        steps.append(step)
        return _advance(state, step)

    final = run(directory, _start(), counting, _evaluate, SCHEDULE)
    assert steps == list(range(stop - stop % 2, 7))
    assert _bits(final) == _bits(expected)
    assert (directory / FILE).read_bytes() == (tmp_path / "whole" / FILE).read_bytes()


@pytest.mark.parametrize("tied", [False, True])
def test_a_run_that_is_resumed_compiles_nothing_again(tmp_path, tied):
    # Functions of its own: JAX counts programs by function, not by `jit`.
    step = jax.jit(lambda state, key: _update(state, key), donate_argnums=0)
    norm = jax.jit(lambda params: optax.tree.norm(params))

    def start():
        return jax.device_put(_start(), jax.devices()[0]) if tied else _start()

    def advance(state, index):
        with jax.numpy_rank_promotion("allow"):
            return step(
                state, jax.random.fold_in(KEY, jax.device_put(np.uint32(index)))
            )

    def stopping(state, index):
        if index == 4:
            raise _StoppedError
        return advance(state, index)

    def evaluate(params):
        return {"norm": float(norm(params))}

    with pytest.raises(_StoppedError):
        run(tmp_path, start(), stopping, evaluate, SCHEDULE)
    assert (step._cache_size(), norm._cache_size()) == (1, 1)
    final = run(tmp_path, start(), advance, evaluate, SCHEDULE)
    assert (step._cache_size(), norm._cache_size()) == (1, 1)
    # One that is complete is read back alike.
    for state in (final, run(tmp_path, start(), advance, evaluate, SCHEDULE)):
        assert all(leaf.committed == tied for leaf in jax.tree.leaves(state))


def test_a_run_that_falls_back_ends_with_the_same_bits(tmp_path):
    expected = run(tmp_path, _start(), _advance, _evaluate, SCHEDULE)
    metrics = (tmp_path / FILE).read_bytes()
    (tmp_path / "checkpoints" / "states" / "7" / CHECKSUMS).unlink()
    told = []
    final = run(tmp_path, _start(), _advance, _evaluate, SCHEDULE, tell=told.append)
    (message,) = told
    assert "the checkpoint of step 7 is damaged" in message
    assert _bits(final) == _bits(expected)
    assert (tmp_path / FILE).read_bytes() == metrics
    # The one that was damaged is whole again.
    assert _restorable(tmp_path) == 7


def test_a_complete_run_does_nothing_when_started_again(tmp_path):
    expected = run(tmp_path, _start(), _advance, _evaluate, SCHEDULE)
    metrics = (tmp_path / FILE).read_bytes()

    def refuse(*args):
        raise AssertionError("a complete run was continued")

    for _ in range(2):
        final = run(tmp_path, _start(), refuse, refuse, SCHEDULE, refuse)
        assert _bits(final) == _bits(expected)
        assert (tmp_path / FILE).read_bytes() == metrics


def test_a_run_of_other_shapes_is_refused_by_name(tmp_path):
    run(tmp_path, _start(), _advance, _evaluate, SCHEDULE)
    before = (tmp_path / FILE).read_bytes()
    params = _params()
    params["norm"]["weight"] = jnp.ones((4,))
    params["bias"] = jnp.ones((2,))
    with pytest.raises(ValueError, match="another run") as error:
        run(tmp_path, init_state(params, TX), _advance, _evaluate, SCHEDULE)
    message = str(error.value)
    assert "params.norm.weight: expected ((4,), 'float32'), found ((3,)" in message
    assert "params.bias: expected ((2,), 'float32'), found None" in message
    assert "params.dense.weight" not in message
    assert (tmp_path / FILE).read_bytes() == before
    assert _restorable(tmp_path) == 7


@jax.transfer_guard("allow")
def _spoil(state, where):
    params = jax.tree.map(lambda x: x, state.params)
    weight = params[where]["weight"]
    params[where]["weight"] = weight.at[(0,) * weight.ndim].set(jnp.nan)
    return state._replace(params=params)


def _with_metric(name, value):
    @jax.transfer_guard("allow")
    def change(state, metrics):
        return state, metrics | {name: metrics[name].at[1].set(value)}

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_with_metric("loss", jnp.nan), r"step 4: loss not finite"),
        (_with_metric("loss", -jnp.inf), r"step 4: loss not finite"),
        (
            _with_metric("finite/norm.weight", 0.0),
            r"step 4: gradients of norm\.weight not finite",
        ),
        (
            lambda state, metrics: (_spoil(state, "dense"), metrics),
            r"step 4: parameters dense\.weight not finite",
        ),
    ],
    ids=["nan loss", "infinite loss", "gradient", "parameter"],
)
def test_what_is_not_finite_stops_the_run_by_name(tmp_path, change, message):
    def advance(state, step):
        state, metrics = _advance(state, step)
        return change(state, metrics) if step == 3 else (state, metrics)

    with pytest.raises(NonFiniteError, match=message) as error:
        run(tmp_path, _start(), advance, _evaluate, SCHEDULE)
    assert str(tmp_path) in str(error.value)
    # The last good state, and the rows of the steps before.
    assert _restorable(tmp_path) == 2
    rows = [row for row in read_rows(tmp_path) if row["step"] < 4]
    assert [r["step"] for r in rows if r["kind"] == "train"] == [1, 1, 2, 2, 3, 3]
    assert [r["step"] for r in rows if r["kind"] == "eval"] == [0, 3]
    # Started again with the cause removed, it ends as if nothing had happened.
    expected = run(tmp_path / "whole", _start(), _advance, _evaluate, SCHEDULE)
    final = run(tmp_path, _start(), _advance, _evaluate, SCHEDULE)
    assert _bits(final) == _bits(expected)
    assert (tmp_path / FILE).read_bytes() == (tmp_path / "whole" / FILE).read_bytes()


def test_a_parameter_that_overflows_is_never_saved(tmp_path):
    def advance(state, step):
        state, metrics = _advance(state, step)
        return (_spoil(state, "norm") if step == 6 else state), metrics

    with pytest.raises(NonFiniteError, match=r"step 7: parameters norm\.weight"):
        run(tmp_path, _start(), advance, _evaluate, SCHEDULE)
    assert _restorable(tmp_path) == 6


def test_a_non_finite_last_but_one_step_stops_after_one_more_dispatch(tmp_path):
    dispatched = []

    def advance(state, step):
        dispatched.append(step + 1)
        state, metrics = _advance(state, step)
        if step == 4:
            _, metrics = _with_metric("loss", jnp.nan)(state, metrics)
        return state, metrics

    with pytest.raises(NonFiniteError, match="step 5: loss"):
        run(tmp_path, _start(), advance, _evaluate, Schedule(9, 100, 2))
    assert dispatched == [1, 2, 3, 4, 5, 6]
    assert _restorable(tmp_path) == 4
