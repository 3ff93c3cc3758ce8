"""Stacked layers train as separate ones do, matrix-wise transforms included."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax.contrib import MuonDimensionNumbers

from geomjax.optim import apply_updates, lamb, muon, per_matrix, standard_promotion
from geomjax.optim.roles import Role, map_with_roles

TOLERANCE = dict(rtol=2e-7, atol=2e-7)
STEPS = 3


def _unstack(tree, roles):
    """{path: tensor}, with one entry for every layer of a stacked leaf."""
    tensors = {}

    def take(path, leaf, role):
        if role.stack_depth == 0:
            tensors[path] = leaf
        else:
            for layer, tensor in enumerate(leaf):
                tensors[(*path, layer)] = tensor

    map_with_roles(take, tree, roles)
    return tensors


def _train(tx, draw_gradients, params):
    tx = standard_promotion(tx)
    state = tx.init(params)
    for step in range(STEPS):
        updates, state = jax.jit(tx.update)(draw_gradients(step), state, params)
        params = apply_updates(params, updates)
    return params


def _compare(stacked_tx, separate_tx, draw, roles):
    params = draw(0)
    stacked = _train(stacked_tx, lambda step: draw(step + 1), params)
    separate = _train(
        separate_tx,
        lambda step: _unstack(draw(step + 1), roles),
        _unstack(params, roles),
    )
    stacked = _unstack(stacked, roles)
    assert stacked.keys() == separate.keys()
    for path, tensor in separate.items():
        np.testing.assert_allclose(stacked[path], tensor, **TOLERANCE)


@pytest.fixture
def muon_separate(draw, roles):
    """Muon over separate tensors, matrices by path."""
    labels = {
        path: MuonDimensionNumbers(1, 0) if "mlp" in path else None
        for path in _unstack(draw(0), roles)
    }
    return optax.contrib.muon(1e-2, muon_weight_dimension_numbers=labels)


def test_lamb_by_per_matrix(draw, roles):
    tx = optax.lamb(1e-2, weight_decay=0.1)
    _compare(per_matrix(tx, roles), tx, draw, roles)


def test_lamb(draw, roles):
    _compare(
        lamb(1e-2, weight_decay=0.1, roles=roles),
        optax.lamb(1e-2, weight_decay=0.1),
        draw,
        roles,
    )


def test_lamb_without_per_matrix_is_wrong(draw, roles):
    """So the comparison above can fail."""
    tx = optax.lamb(1e-2, weight_decay=0.1)
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        _compare(tx, tx, draw, roles)


def test_trust_ratio(draw, roles):
    tx = optax.chain(optax.scale_by_trust_ratio(), optax.scale(-1e-2))
    _compare(per_matrix(tx, roles), tx, draw, roles)


def test_muon(draw, roles, muon_separate):
    _compare(muon(1e-2, roles=roles), muon_separate, draw, roles)


def test_muon_by_per_matrix(draw, roles):
    def scaled(numbers):
        return optax.chain(
            optax.contrib.scale_by_muon(weight_dimension_numbers=numbers),
            optax.scale(-1e-2),
        )

    mlp = {path: role for path, role in roles.items() if "mlp" in path}

    def draw_mlp(seed):
        return {"layers": {"mlp": draw(seed)["layers"]["mlp"]}}

    numbers = {path: MuonDimensionNumbers(1, 0) for path in _unstack(draw_mlp(0), mlp)}
    one_matrix = scaled(MuonDimensionNumbers(1, 0))
    _compare(per_matrix(one_matrix, mlp), scaled(numbers), draw_mlp, mlp)


def test_muon_left_to_itself_is_wrong(draw, roles, muon_separate):
    """It takes stacked norms for matrices and stacked matrices for neither."""
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        _compare(optax.contrib.muon(1e-2), muon_separate, draw, roles)


def test_muon_update_is_orthogonal_and_scaled_by_out_over_in(draw, roles):
    """A wrong choice of axes would scale up_proj by 1 and down_proj by sqrt(6/4)."""
    tx = standard_promotion(muon(1.0, ns_steps=12, roles=roles))
    updates, _ = tx.update(draw(1), tx.init(draw(0)), draw(0))
    for name, scale in (("up_proj", np.sqrt(6 / 4)), ("down_proj", 1.0)):
        update = np.asarray(updates["layers"]["mlp"][name]["weight"])
        singular_values = np.linalg.svd(update, compute_uv=False)
        # Muon's polynomial stops within (0.68, 1.21) of orthogonal, by design.
        assert singular_values.min() > 0.65 * scale
        assert singular_values.max() < 1.25 * scale


def test_two_stack_axes(draw):
    """Layers and experts: every one of the 2 x 3 matrices has its own trust ratio."""
    role = Role(2, "matrix", -2, -1, ("layers", "experts", "mlp", "embed"))
    rng = np.random.default_rng(0)
    w, g = (jnp.asarray(rng.normal(size=(2, 3, 5, 4)), jnp.float32) for _ in range(2))
    tx = per_matrix(optax.scale_by_trust_ratio(), {("w",): role})
    updates, _ = tx.update({"w": g}, tx.init({"w": w}), {"w": w})
    norm = lambda x: np.linalg.norm(x, axis=(-2, -1), keepdims=True)  # noqa: E731
    np.testing.assert_allclose(updates["w"], g * norm(w) / norm(g), rtol=1e-6)


def test_one_state_per_leaf_with_the_stack_in_front(draw, roles):
    state = per_matrix(optax.scale_by_adam(), roles).init(draw(0))
    leaf = state.inner_states["layers"]["mlp"]["up_proj"]["weight"]
    assert leaf.count.shape == (3,)
    assert leaf.mu.shape == (3, 6, 4)
    assert state.inner_states["norm"]["weight"].count.shape == ()


def test_params_may_be_absent_and_extra_arguments_pass(draw, roles):
    def update(updates, state, params=None, *, factor):
        assert params is None
        return updates * factor, state

    inner = optax.GradientTransformationExtraArgs(lambda p: optax.EmptyState(), update)
    tx = per_matrix(inner, roles)
    updates, _ = tx.update(draw(1), tx.init(draw(0)), factor=2.0)
    jax.tree.map(lambda u, g: np.testing.assert_array_equal(u, 2 * g), updates, draw(1))


def test_a_leaf_without_a_role_is_an_error(draw, roles):
    del roles[("norm", "weight")]
    with pytest.raises(ValueError, match=r"norm\.weight: no role"):
        per_matrix(optax.adam(1.0), roles).init(draw(0))


def test_sharded_stacks_equal_unsharded_ones():
    """Three layers over the in axis of four devices."""
    mesh = jax.make_mesh((4,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.sharding.NamedSharding(mesh, jax.P(None, None, "fsdp"))
    roles = {("w",): Role(1, "matrix", -2, -1, ("layers", "mlp", "embed"))}
    rng = np.random.default_rng(0)
    w, g = ({"w": jnp.asarray(rng.normal(size=(3, 6, 8)), jnp.float32)} for _ in "wg")
    tx = lamb(1e-2, roles=roles)
    tx = standard_promotion(tx)
    expected, _ = tx.update(g, tx.init(w), w)
    sharded_w, sharded_g = (jax.device_put(x, {"w": sharding}) for x in (w, g))
    got, _ = jax.jit(tx.update)(sharded_g, tx.init(sharded_w), sharded_w)
    assert got["w"].sharding.is_equivalent_to(sharding, 3)
    np.testing.assert_allclose(got["w"], expected["w"], rtol=1e-6)
