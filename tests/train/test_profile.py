"""Which steps are traced, and that TensorBoard finds the trace."""

import jax
import jax.numpy as jnp
import optax
import pytest

from geomjax.train.loop import Schedule, run
from geomjax.train.profile import ProfileSteps, parse_steps
from geomjax.train.step import init_state

TX = optax.sgd(0.1)


def test_steps_are_read():
    assert parse_steps("") is None
    assert parse_steps("10:15") == ProfileSteps(10, 15)


@pytest.mark.parametrize("text", ["10", "15:10", "3:3", "a:b", "-1:4", "1:2:3"])
def test_what_is_no_range_of_steps_is_refused(text):
    with pytest.raises(ValueError, match="profile_steps"):
        parse_steps(text)


@jax.jit
def _advance_once(state):
    params = jax.tree.map(lambda x: 0.5 * x, state.params)
    return state._replace(step=state.step + 1, params=params), {"loss": jnp.ones(1)}


def _traces(directory):
    folder = directory / "tensorboard" / "plugins" / "profile"
    return [path for path in folder.glob("*/*.xplane.pb") if path.stat().st_size]


@pytest.mark.parametrize(
    ("steps", "count"), [(ProfileSteps(1, 3), 1), (ProfileSteps(4, 9), 1), (None, 0)]
)
def test_a_trace_is_written_where_tensorboard_looks(tmp_path, steps, count):
    state = init_state({"weight": jnp.ones(3)}, TX)
    run(
        tmp_path,
        state,
        lambda state, index: _advance_once(state),
        lambda params: {"norm": 1.0},
        Schedule(5, 9, 9, profile=steps),
    )
    found = _traces(tmp_path)
    assert len(found) == count
    if found:
        # The steps are named in it; "train" annotations carry their numbers.
        assert b"train" in found[0].read_bytes()
