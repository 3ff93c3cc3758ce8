"""Training inside a subspace: by hand, by what leaves it, and by what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from geomjax.optim import (
    OptimizerSpec,
    apply_updates,
    build,
    leading_right_basis,
    load_basis,
    project_updates,
    random_basis,
    save_basis,
)
from geomjax.optim.roles import Role

UP = ("layers", "mlp", "up_proj", "weight")
MATRIX = {("w",): Role(0, "matrix", -2, -1, (None, None))}


def matrices(tree):
    mlp = tree["layers"]["mlp"]
    return {name: mlp[name]["weight"] for name in ("up_proj", "down_proj")}


def outside(delta, basis):
    """Largest share of a matrix's update that lies outside its subspace."""
    shares = []
    for d, v in zip(
        jax.tree.leaves(matrices(delta)), jax.tree.leaves(matrices(basis)), strict=True
    ):
        d, v = np.asarray(d, np.float64), np.asarray(v, np.float64)
        rest = d - d @ v @ np.swapaxes(v, -1, -2)
        shares.append((np.linalg.norm(rest, axis=(-2, -1)), np.linalg.norm(d)))
    return shares


def test_by_hand_with_sgd():
    """V = (3, 4)/5: the gradient (5, 0) becomes 5 * 3/5 * (3, 4)/5 = (9, 12)/5."""
    params = {"w": jnp.zeros((2, 2))}
    basis = {"w": jnp.array([[0.6], [0.8]])}
    tx = project_updates(basis, MATRIX, optax.sgd(1.0))
    gradient = {"w": jnp.array([[5.0, 0.0], [4.0, -3.0]])}
    updates, _ = tx.update(gradient, tx.init(params), params)
    np.testing.assert_allclose(updates["w"], [[-1.8, -2.4], [0, 0]], atol=1e-6)


def test_adam_leaves_the_subspace_by_itself_and_not_here():
    """The projected gradient (1.8, 2.4) becomes (1, 1) in Adam: 1.4 * (0.6, 0.8)."""
    params = {"w": jnp.zeros((1, 2))}
    basis = {"w": jnp.array([[0.6], [0.8]])}
    tx = project_updates(basis, MATRIX, optax.scale_by_adam(eps=1e-12))
    with jax.numpy_dtype_promotion("standard"):
        updates, state = tx.update({"w": jnp.array([[5.0, 0.0]])}, tx.init(params))
    np.testing.assert_allclose(updates["w"], [[0.84, 1.12]], rtol=1e-5)
    np.testing.assert_allclose(state.inner_state.mu["w"], [[0.18, 0.24]], rtol=1e-5)
    np.testing.assert_allclose(
        state.inner_state.nu["w"], [[0.00324, 0.00576]], rtol=1e-5
    )


def train(tx, params, gradient_of, steps):
    @jax.jit
    def step(params, state):
        updates, state = tx.update(gradient_of(params), state, params)
        return apply_updates(params, updates), state

    start, state = params, tx.init(params)
    for _ in range(steps):
        params, state = step(params, state)
    return jax.tree.map(lambda a, b: np.float64(a) - np.float64(b), params, start)


def pull(target):
    """Gradients of half the squared distance to a target, unevenly scaled."""

    def gradient_of(params):
        return jax.tree.map(
            lambda p, t: (
                (p - t) * jnp.linspace(0.1, 3, p.size, dtype=p.dtype).reshape(p.shape)
            ),
            params,
            target,
        )

    return gradient_of


@pytest.mark.parametrize("name", ["adamw", "lion", "rmsprop", "adagrad", "muon", "sgd"])
def test_a_run_never_leaves_its_subspace(name, draw, roles):
    """To 1e-6 of the weights in float32, where the weights themselves are rounded."""
    kwargs = {"adamw": {"weight_decay": 0.1}, "sgd": {"momentum": 0.9}}.get(name, {})
    spec = OptimizerSpec(name=name, learning_rate=1e-2, clip_norm=1.0, kwargs=kwargs)
    params = draw(0)
    basis = random_basis(jax.random.key(1), params, 2, roles)
    delta = train(build(spec, roles, basis=basis), params, pull(draw(1)), 60)
    for share, (rest, moved) in zip(
        jax.tree.leaves(matrices(params)), outside(delta, basis), strict=True
    ):
        weights = np.linalg.norm(np.asarray(share, np.float64))
        assert (rest < 1e-6 * weights).all()
        assert moved > 1e-2 * weights
    free = train(build(spec, roles), params, pull(draw(1)), 60)
    assert all(rest.max() > 0.1 * moved for rest, moved in outside(free, basis))


def test_a_run_in_float64_stays_to_1e_12_of_its_update(draw, roles):
    with jax.enable_x64(True):
        params = draw(0, jnp.float64)
        # A basis that is orthonormal in float64, not only to float32.
        basis = jax.tree.map(
            lambda v: jnp.asarray(np.linalg.qr(np.asarray(v, np.float64))[0]),
            random_basis(jax.random.key(1), params, 2, roles),
        )
        tx = project_updates(basis, roles, optax.adamw(1e-2, weight_decay=0.1))
        with jax.numpy_dtype_promotion("standard"):
            delta = train(tx, params, pull(draw(1, jnp.float64)), 60)
        assert all(
            (rest < 1e-12 * moved).all() for rest, moved in outside(delta, basis)
        )


def test_what_has_no_basis_is_trained_as_without_it(draw, roles):
    spec = OptimizerSpec(name="adamw", learning_rate=1e-2)
    params = draw(0)
    basis = random_basis(jax.random.key(1), params, 2, roles)
    projected = train(build(spec, roles, basis=basis), params, pull(draw(1)), 5)
    free = train(build(spec, roles), params, pull(draw(1)), 5)
    np.testing.assert_array_equal(projected["norm"]["weight"], free["norm"]["weight"])
    assert (projected["embed_tokens"]["weight"] == free["embed_tokens"]["weight"]).all()


def test_clipping_sees_the_norm_inside_the_subspace():
    """The gradient (3, 4) along V = (1, 0) has norm 3, and 3 is not clipped at 3."""
    params, basis = {"w": jnp.zeros((1, 2))}, {"w": jnp.array([[1.0], [0.0]])}
    spec = OptimizerSpec(name="sgd", learning_rate=1.0, clip_norm=3.0)
    tx = build(spec, MATRIX, basis=basis)
    updates, _ = tx.update({"w": jnp.array([[3.0, 4.0]])}, tx.init(params), params)
    np.testing.assert_allclose(updates["w"], [[-3.0, 0.0]], rtol=1e-6)


def test_frozen_parameters_keep_every_bit(draw, roles, bits):
    spec = OptimizerSpec(name="adamw", learning_rate=0.1, frozen=("embed", "norm"))
    params = draw(0)
    basis = random_basis(jax.random.key(1), params, 2, roles)
    tx = build(spec, roles, basis=basis)
    updates, _ = tx.update(draw(1), tx.init(params), params)
    after = apply_updates(params, updates)
    for name in ("embed_tokens", "norm"):
        np.testing.assert_array_equal(
            bits(after[name]["weight"]), bits(params[name]["weight"])
        )


def test_leading_basis_spans_the_update_and_no_more(draw, roles):
    generator = np.random.default_rng(0)
    delta = jax.tree.map(np.asarray, draw(0))
    left, right = (
        generator.standard_normal((3, 6, 2)),
        generator.standard_normal((3, 2, 4)),
    )
    delta["layers"]["mlp"]["up_proj"]["weight"] = left @ right
    basis = leading_right_basis(delta, 2, roles)
    v = basis["layers"]["mlp"]["up_proj"]["weight"]
    assert v.shape == (3, 4, 2)
    np.testing.assert_allclose(
        left @ right @ v @ v.swapaxes(-1, -2), left @ right, atol=1e-5
    )
    assert basis["norm"]["weight"] is None
    assert basis["embed_tokens"]["weight"] is None
    with pytest.raises(ValueError, match=r"up_proj.weight: .*fewer than 3 directions"):
        leading_right_basis(delta, 3, roles)


def test_leading_directions_are_those_of_largest_energy(draw, roles):
    delta = draw(3)
    basis = leading_right_basis(delta, 2, roles)
    for d, v in zip(
        jax.tree.leaves(matrices(delta)), jax.tree.leaves(matrices(basis)), strict=True
    ):
        inside = np.linalg.norm(np.asarray(d) @ v, axis=(-2, -1)) ** 2
        values = np.linalg.svd(np.asarray(d), compute_uv=False)
        np.testing.assert_allclose(inside, (values[:, :2] ** 2).sum(axis=-1), rtol=1e-5)


def test_random_bases_differ_by_key_and_leaf_and_are_orthonormal(draw, roles):
    one, other = (random_basis(jax.random.key(s), draw(0), 2, roles) for s in (0, 1))
    for tree in (one, other):
        for v in jax.tree.leaves(tree):
            eye = np.swapaxes(v, -1, -2) @ v
            np.testing.assert_allclose(
                eye, np.broadcast_to(np.eye(2), eye.shape), atol=1e-6
            )
    mlp = one["layers"]["mlp"]
    assert abs(mlp["up_proj"]["weight"][0] - mlp["up_proj"]["weight"][1]).max() > 0.1
    assert all(
        abs(a - b).max() > 0.1
        for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    )


@pytest.mark.parametrize("rank", [0, 5])
def test_ranks_that_no_matrix_has_are_refused(rank, draw, roles):
    for make in (
        lambda: leading_right_basis(draw(0), rank, roles),
        lambda: random_basis(jax.random.key(0), draw(0), rank, roles),
    ):
        with pytest.raises(ValueError, match=r"up_proj.*\n.*|down_proj") as caught:
            make()
        assert "a matrix [6, 4] has ranks from 1 to 4" in str(caught.value)


def test_every_matrix_without_the_directions_is_named(draw, roles):
    """Of the two, one has too few directions in its shape, the other in its values."""
    delta = draw(0)
    mlp = delta["layers"]["mlp"]
    mlp["down_proj"]["weight"] = mlp["down_proj"]["weight"][..., :1]
    mlp["up_proj"]["weight"] = jnp.zeros_like(mlp["up_proj"]["weight"])
    with pytest.raises(ValueError, match="a basis of rank 2") as caught:
        leading_right_basis(delta, 2, roles)
    _, *problems = str(caught.value).split("\n")
    assert len(problems) == 2
    assert "down_proj.weight: a matrix" in problems[0]
    assert "up_proj.weight: the update has fewer than 2 directions" in problems[1]


def spoiled(basis, how):
    mlp = basis["layers"]["mlp"]
    up = np.asarray(mlp["up_proj"]["weight"])
    if how == "shape":
        up = up[:2]
    elif how == "rank":
        up = np.linalg.qr(np.random.default_rng(0).normal(size=(3, 4, 4)))[0]
        up = np.concatenate([up, up[..., :1]], axis=-1)
    elif how == "scale":
        up = up * 1.01
    elif how == "nan":
        up = np.full_like(up, np.nan)
    leaf = {"weight": up.astype(np.float32)}
    changed = {**basis, "layers": {**basis["layers"], "mlp": {**mlp, "up_proj": leaf}}}
    if how == "unknown":
        changed["head"] = {"weight": up}
    elif how == "vector":
        changed["norm"] = {"weight": np.ones((4, 1), np.float32)}
    elif how == "missing":
        del changed["norm"]
    elif how == "empty":
        changed = jax.tree.map(lambda v: None, changed)
    return changed


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("shape", r"up_proj.weight: got \[2, 4, 2\], expected \[3, 4, 'k'\]"),
        ("rank", r"up_proj.weight: rank 5 of a matrix \[6, 4\]; expected 1 to 4"),
        ("scale", "up_proj.weight: its columns are not orthonormal"),
        ("nan", "up_proj.weight: its columns are not orthonormal"),
        ("unknown", "head.weight: no such parameter"),
        ("vector", "norm.weight: a vector has no right subspace"),
        ("missing", "norm.weight: no basis"),
        ("empty", "would constrain nothing"),
    ],
)
def test_bases_that_do_not_fit_are_refused(how, message, draw, roles):
    basis = spoiled(random_basis(jax.random.key(0), draw(0), 2, roles), how)
    with pytest.raises(ValueError, match=message):
        project_updates(basis, roles, optax.sgd(1.0)).init(draw(0))


def test_a_basis_beside_a_mask_is_refused(draw, draw_mask, roles):
    basis = random_basis(jax.random.key(0), draw(0), 2, roles)
    spec = OptimizerSpec(name="sgd", learning_rate=1.0)
    with pytest.raises(ValueError, match="Give it alone"):
        build(spec, roles, mask=draw_mask(0), basis=basis)


def test_saved_and_loaded(draw, roles, tmp_path):
    basis = random_basis(jax.random.key(0), draw(0), 2, roles)
    save_basis(tmp_path, basis)
    found = load_basis(tmp_path, draw(0), roles)
    assert jax.tree.structure(found) == jax.tree.structure(basis)
    jax.tree.map(np.testing.assert_array_equal, found, basis)


def test_a_saved_basis_of_another_model_is_refused(draw, roles, tmp_path):
    params = draw(0)
    save_basis(tmp_path, random_basis(jax.random.key(0), params, 2, roles))
    fewer = {
        **params,
        "layers": {"mlp": {"up_proj": params["layers"]["mlp"]["up_proj"]}},
    }
    with pytest.raises(ValueError, match=r"another model; .*\n.*down_proj.weight"):
        load_basis(tmp_path, fewer, roles)
    wider = jax.tree.map(lambda p: jnp.concatenate([p, p], axis=-1), params)
    with pytest.raises(ValueError, match=r"up_proj.weight: got \[3, 4, 2\], expected"):
        load_basis(tmp_path, wider, roles)


def test_one_program_for_all_bases(draw, roles):
    spec = OptimizerSpec(name="adamw", learning_rate=1e-2)
    bases = [random_basis(jax.random.key(s), draw(0), 2, roles) for s in (0, 1)]
    txs = [build(spec, roles, basis=basis) for basis in bases]
    step = jax.jit(txs[0].update)
    first, _ = step(draw(1), txs[0].init(draw(0)), draw(0))
    second, _ = step(draw(1), txs[1].init(draw(0)), draw(0))
    assert step._cache_size() == 1
    assert all(
        abs(np.asarray(a) - b).max() > 1e-4
        for a, b in zip(
            *map(jax.tree.leaves, map(matrices, (first, second))), strict=True
        )
    )
