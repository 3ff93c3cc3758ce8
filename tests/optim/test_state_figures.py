"""Adam's figures against float64, wherever in a state the moments are."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from geomjax.optim import (
    OptimizerSpec,
    adam_state_figures,
    build,
    make,
    muon,
    per_matrix,
    standard_promotion,
)

STEPS = 3


def _after_steps(tx, draw):
    state = tx.init(draw(0))
    for step in range(STEPS):
        _, state = jax.jit(tx.update)(draw(step + 1), state, draw(0))
    return draw(STEPS), state


def _oracle(draw, select):
    """Moments of the selected coordinates, run in float64 by hand."""
    m = v = 0.0
    for step in range(STEPS):
        g = np.concatenate([np.ravel(x) for x in select(draw(step + 1))])
        g = g.astype(np.float64)
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
    cosine = m @ g / np.linalg.norm(m) / np.linalg.norm(g)
    return cosine, np.sqrt(v).std() / np.sqrt(v).mean(), g.size


def _check(figures, expected):
    np.testing.assert_allclose(figures, expected, rtol=1e-5)


@pytest.mark.parametrize("name", ["adam", "adamw", "lamb"])
def test_whole_model(draw, roles, name):
    gradients, state = _after_steps(make(name, 1e-2, roles=roles), draw)
    _check(
        jax.jit(adam_state_figures)(gradients, state), _oracle(draw, jax.tree.leaves)
    )


def test_frozen_groups_do_not_count(draw, roles):
    spec = OptimizerSpec(name="adamw", learning_rate=1e-2, frozen=("embed", "norm"))
    gradients, state = _after_steps(build(spec, roles), draw)
    expected = _oracle(draw, lambda g: jax.tree.leaves(g["layers"]["mlp"]))
    _check(adam_state_figures(gradients, state), expected)


def test_masked_coordinates_alone_count(draw, draw_mask, roles):
    mask = draw_mask(5)
    mask["norm"] = None
    spec = OptimizerSpec(name="adamw", learning_rate=1e-2, frozen=("embed_tokens",))
    gradients, state = _after_steps(build(spec, roles, mask), draw)
    gradients["layers"] = jax.tree.map(
        lambda m, g: jnp.where(m, g, jnp.nan), mask["layers"], gradients["layers"]
    )

    def select(g):
        layers = jax.tree.map(
            lambda m, x: x[np.asarray(m)], mask["layers"], g["layers"]
        )
        return [g["norm"]["weight"], *jax.tree.leaves(layers)]

    _check(adam_state_figures(gradients, state), _oracle(draw, select))


def test_states_within_per_matrix(draw, roles):
    gradients, state = _after_steps(
        standard_promotion(per_matrix(optax.adam(1e-2), roles)), draw
    )
    _check(adam_state_figures(gradients, state), _oracle(draw, jax.tree.leaves))


def test_muon_reports_what_it_leaves_to_adam(draw, roles):
    tx = standard_promotion(muon(1e-2, nesterov=False, roles=roles))
    gradients, state = _after_steps(tx, draw)

    def select(g):
        return [
            g["embed_tokens"]["weight"],
            g["norm"]["weight"],
            g["layers"]["input_layernorm"]["weight"],
        ]

    _check(adam_state_figures(gradients, state), _oracle(draw, select))


@pytest.mark.parametrize("name", ["sgd", "lion", "rmsprop", "adagrad"])
def test_none_without_both_moments(draw, roles, name):
    gradients, state = _after_steps(make(name, 1e-2, roles=roles), draw)
    assert adam_state_figures(gradients, state) is None


def test_vmap_over_seeds(draw, draw_mask, roles):
    spec = OptimizerSpec(name="adamw", learning_rate=1e-2)

    def run(gradients, mask):
        tx = build(spec, roles, mask)
        _, state = tx.update(gradients, tx.init(draw(0)), draw(0))
        _, state = tx.update(draw(9), state, draw(0))
        return adam_state_figures(gradients, state)

    def stack(*trees):
        return jax.tree.map(lambda *x: jnp.stack(x), *trees)

    together = jax.jit(jax.vmap(run))(
        stack(draw(1), draw(2)), stack(draw_mask(1), draw_mask(2))
    )
    separate = [run(draw(s), draw_mask(s)) for s in (1, 2)]
    np.testing.assert_allclose(together, np.transpose(separate), rtol=1e-5)


def test_at_the_start_momentum_is_the_gradient(draw, roles):
    tx = make("adamw", 1e-2, roles=roles)
    state = tx.init(draw(0))
    assert tuple(map(float, adam_state_figures(draw(1), state)[:2])) == (0.0, 0.0)
    _, state = tx.update(draw(1), state, draw(0))
    np.testing.assert_allclose(adam_state_figures(draw(1), state)[0], 1.0, rtol=1e-6)


def test_many_nearly_equal_coordinates():
    """Forty million terms, and a variation of 1e-3 that a sum of squares would lose."""
    shape = (4, 5000, 2000)
    rng = np.random.default_rng(0)
    root = (1 + 1e-3 * rng.standard_normal(shape, dtype=np.float32)) * 1e-6
    state = optax.ScaleByAdamState(
        count=jnp.zeros((), jnp.int32),
        mu={"w": jnp.full(shape, 3e-7)},
        nu={"w": jnp.asarray(root**2)},
    )
    figures = jax.jit(adam_state_figures)({"w": jnp.full(shape, 2e-7)}, state)
    s = np.sqrt(np.asarray(root**2), dtype=np.float64)
    np.testing.assert_allclose(figures, (1.0, s.std() / s.mean(), s.size), rtol=2e-5)


def test_bfloat16_moments_are_summed_in_float32():
    shape = (300, 700)
    ones = {"w": jnp.ones(shape, jnp.bfloat16)}
    state = optax.ScaleByAdamState(jnp.zeros((), jnp.int32), mu=ones, nu=ones)
    figures = adam_state_figures(ones, state)
    assert figures.momentum_gradient_cosine.dtype == jnp.float32
    np.testing.assert_allclose(figures, (1.0, 0.0, 300 * 700), rtol=1e-6)


def test_sharded_leaves(draw, roles):
    mesh = jax.make_mesh((4,), ("fsdp",))  # explicit axes: no silent resharding
    sharding = jax.sharding.NamedSharding(mesh, jax.P(None, "fsdp"))
    rng = np.random.default_rng(0)
    w, g = (jnp.asarray(rng.normal(size=(3, 8, 4)), jnp.float32) for _ in range(2))
    state = optax.ScaleByAdamState(jnp.zeros((), jnp.int32), {"w": w}, {"w": w**2})
    expected = adam_state_figures({"w": g}, state)
    state, gradients = jax.device_put((state._replace(count=None), {"w": g}), sharding)
    with jax.set_mesh(mesh):
        got = jax.jit(adam_state_figures)(gradients, state)
    np.testing.assert_allclose(got, expected, rtol=1e-6)


def test_states_that_do_not_fit_are_errors(draw, roles):
    tx = make("adam", 1e-2, roles=roles)
    gradients, state = _after_steps(tx, draw)
    with pytest.raises(ValueError, match="norm.weight has two pairs of moments"):
        adam_state_figures(
            {"norm": gradients["norm"]},
            tuple(tx.init({"norm": gradients["norm"]}) for _ in range(2)),
        )
    del gradients["norm"]
    with pytest.raises(ValueError, match="norm.weight, which has no gradient"):
        adam_state_figures(gradients, state)
