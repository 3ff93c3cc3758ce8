"""Storage in bfloat16 between updates: both roundings, exactly and on average."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from geomjax.meshes import mesh_from_string
from geomjax.optim import apply_updates, stochastic_round, stored_bfloat16

KEY = jax.random.key(0)


def is_bfloat16(x):
    x = np.asarray(x, np.float32)
    return x.astype(ml_dtypes.bfloat16).astype(np.float32) == x


def test_rounds_to_a_neighbour_with_the_right_odds():
    """1 + 3/4 of a unit in the last place, 2**-7: up three times in four."""
    x = jnp.full(100_000, 1 + 0.75 * 2**-7)
    got = np.asarray(stochastic_round(KEY, x))
    assert set(np.unique(got)) == {1.0, 1 + 2**-7}
    # Standard deviation of the share: sqrt(3/16/1e5) = 0.0014.
    assert np.mean(got > 1) == pytest.approx(0.75, abs=0.006)
    lower = np.asarray(stochastic_round(KEY, -x))
    assert np.mean(lower < -1) == pytest.approx(0.75, abs=0.006)


def test_what_is_bfloat16_already_stays():
    values = np.float32(
        [0.0, -0.0, 1.0, -3.5, 2.0**-126, 3.3895314e38, np.inf, -np.inf]
    )
    got = np.asarray(stochastic_round(KEY, jnp.asarray(values)))
    np.testing.assert_array_equal(got.view(np.uint32), values.view(np.uint32))
    assert np.isnan(stochastic_round(KEY, jnp.array([jnp.nan]))).all()


@settings(deadline=None)
@given(
    st.floats(-(2.0**100), 2.0**100, width=32, allow_subnormal=False),
    st.integers(0, 1000),
)
def test_the_result_is_one_of_the_two_neighbours(value, seed):
    got = stochastic_round(jax.random.key(seed), jnp.array([value], jnp.float32))
    got = float(got[0])
    assert is_bfloat16(got)
    bits = np.float32(value).view(np.uint32)
    down = (bits & np.uint32(0xFFFF0000)).view(np.float32)
    up = ((bits & np.uint32(0xFFFF0000)) + np.uint32(0x10000)).view(np.float32)
    assert got in (float(down), float(up))


def test_other_dtypes_are_refused():
    with pytest.raises(ValueError, match="expected float32"):
        stochastic_round(KEY, jnp.ones(3, jnp.bfloat16))


def run(rounding, update, steps, start=1.0, shape=(64, 64)):
    params = {"w": jnp.full(shape, start)}
    tx = stored_bfloat16(rounding, optax.sgd(1.0))
    state, step = tx.init(params), jax.jit(tx.update)
    for _ in range(steps):
        updates, state = step({"w": jnp.full(shape, -update)}, state, params)
        params = apply_updates(params, updates)
    return np.asarray(params["w"])


def test_nearest_loses_small_updates_and_stochastic_keeps_their_mean():
    """Steps of 2**-10, a quarter of the half unit at 1: lost, or kept on average."""
    assert (run("nearest", 2**-10, 40) == 1).all()
    got = run("stochastic", 2**-10, 40)
    assert is_bfloat16(got).all()
    # 40 draws of 2**-7 with odds 1/8: deviation 2**-7 sqrt(40 * 7/64) / 64 of the mean.
    assert got.mean() - 1 == pytest.approx(40 * 2**-10, abs=5 * 2**-7 * 2.1 / 64)


def test_nearest_is_the_rounding_of_the_sum():
    generator = np.random.default_rng(0)
    params = jnp.asarray(generator.standard_normal(500), jnp.float32)
    params = params.astype(jnp.bfloat16).astype(jnp.float32)
    gradient = jnp.asarray(generator.standard_normal(500) * 0.01, jnp.float32)
    tx = stored_bfloat16("nearest", optax.sgd(1.0))
    updates, _ = tx.update(gradient, tx.init(params), params)
    expected = np.asarray(params - gradient).astype(ml_dtypes.bfloat16)
    got = np.asarray(apply_updates(params, updates))
    np.testing.assert_array_equal(got, expected.astype(np.float32))


@settings(deadline=None)
@given(
    st.floats(2**-60, 2**60, width=32),
    st.floats(2**-14, 2**14, width=32),
    st.sampled_from([-1.0, 1.0]),
)
def test_the_sum_is_exact_where_it_is_said_to_be(p, ratio, sign):
    p = np.float32(p).astype(ml_dtypes.bfloat16).astype(np.float32)
    target = np.float32(sign * p * np.float32(ratio))
    new = target.astype(ml_dtypes.bfloat16).astype(np.float32)
    assert np.float32(p + np.float32(new - p)) == new


def test_draws_differ_by_step_leaf_and_seed():
    def updates(seed, steps):
        params = {"a": jnp.ones(1000), "b": jnp.ones(1000)}
        tx = stored_bfloat16("stochastic", optax.sgd(1.0), seed=seed)
        state = tx.init(params)
        gradient = jax.tree.map(lambda p: jnp.full_like(p, -(2**-8)), params)
        for _ in range(steps):
            got, state = tx.update(gradient, state, params)
        return np.asarray(got["a"]), np.asarray(got["b"])

    first, other_leaf = updates(0, 1)
    assert (first == updates(0, 1)[0]).all()
    for different in (other_leaf, updates(0, 2)[0], updates(1, 1)[0]):
        assert 0.3 < np.mean(first != different) < 0.7


def test_runs_of_other_seeds_share_a_step_and_draw_as_the_seed_alone_would():
    params = {"a": jnp.ones(1000)}
    gradient = {"a": jnp.full(1000, -(2**-8))}
    step = jax.jit(stored_bfloat16("stochastic", optax.sgd(1.0), seed=9).update)
    for seed in (0, 1, 2**32 + 1):
        own = stored_bfloat16("stochastic", optax.sgd(1.0), seed=seed)
        got, _ = step(gradient, own.init(params), params)
        low = seed % 2**32
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(low), 0), 0)
        expected = stochastic_round(key, params["a"] - gradient["a"]) - params["a"]
        np.testing.assert_array_equal(got["a"], expected)
    assert step._cache_size() == 1


def test_a_mesh_draws_as_one_device_does():
    mesh = mesh_from_string("data=2,fsdp=2,tensor=2")
    generator = np.random.default_rng(0)
    specs = {"a": jax.P("fsdp", "tensor"), "b": jax.P("tensor")}
    shapes = {"a": (16, 32), "b": (32,)}
    params, gradient = (
        {name: generator.normal(1, 0.1, shapes[name]).astype(dtype) for name in shapes}
        for dtype in (ml_dtypes.bfloat16, np.float32)
    )
    params = jax.tree.map(lambda x: x.astype(np.float32), params)
    gradient = jax.tree.map(lambda x: x * np.float32(2**-9), gradient)
    tx = stored_bfloat16("stochastic", optax.sgd(1.0), seed=3)
    step = jax.jit(tx.update)

    def moved(params, gradient):
        state = tx.init(params)
        for _ in range(2):
            updates, state = step(gradient, state, params)
            params = apply_updates(params, updates)
        return params

    one = moved(*jax.device_put((params, gradient)))
    layout = {name: jax.NamedSharding(mesh, spec) for name, spec in specs.items()}
    many = moved(*jax.device_put((params, gradient), (layout, layout)))
    for name, found in many.items():
        assert found.sharding.is_equivalent_to(layout[name], found.ndim)
        np.testing.assert_array_equal(found, one[name])
    # Both were drawn: of a quarter to a half of a unit, some go down and some stay.
    assert 0.1 < np.mean(np.asarray(one["a"]) == params["a"]) < 0.9


def test_bad_use_is_refused():
    with pytest.raises(ValueError, match="rounding: got 'up'"):
        stored_bfloat16("up", optax.sgd(1.0))
    tx = stored_bfloat16("nearest", optax.sgd(1.0))
    with pytest.raises(ValueError, match="needs the parameters"):
        tx.update(jnp.ones(2), tx.init(jnp.ones(2)))
