"""What every transform of the package must do; a new one is a new row."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from geomjax.optim import (
    OptimizerSpec,
    build,
    coordinate_mask,
    freeze,
    lamb,
    muon,
    per_matrix,
    project_updates,
    random_basis,
    sparse_adamw,
    standard_promotion,
)


def _adamw():
    return standard_promotion(optax.adamw(1e-2, weight_decay=0.1))


def _projected(roles, mask):
    """A basis that differs with the mask, as the mask does with its seed."""
    key = jax.random.key(sum(int(m.sum()) for m in jax.tree.leaves(mask)))
    basis = random_basis(key, mask, 2, roles)
    return project_updates(basis, roles, _adamw())


# Each row makes its transform from the roles and a mask; the mask is the one thing that
# may differ between two runs of one compiled step.
TRANSFORMS = {
    "coordinate_mask": lambda roles, mask: coordinate_mask(mask, _adamw()),
    "freeze": lambda roles, mask: freeze(["embed_tokens"], _adamw()),
    "per_matrix": lambda roles, mask: standard_promotion(
        per_matrix(optax.lamb(1e-2, weight_decay=0.1), roles)
    ),
    "lamb": lambda roles, mask: standard_promotion(lamb(1e-2, roles=roles)),
    "muon": lambda roles, mask: standard_promotion(muon(1e-2, roles=roles)),
    "project_updates": lambda roles, mask: _projected(roles, mask),
    "sparse_adamw": lambda roles, mask: standard_promotion(
        sparse_adamw(mask, 1e-2, weight_decay=0.1, clip_norm=1.0)
    ),
    "build_adamw": lambda roles, mask: build(
        OptimizerSpec(
            name="adamw",
            learning_rate=1e-2,
            schedule="cosine",
            total_steps=9,
            clip_norm=1.0,
            frozen=(r"^norm\.",),
            kwargs={"weight_decay": 0.1},
        ),
        roles,
        mask,
    ),
    "build_sparse_adamw": lambda roles, mask: build(
        OptimizerSpec(
            name="sparse_adamw",
            learning_rate=1e-2,
            clip_norm=1.0,
            frozen=(r"^norm\.",),
            decay_kinds=("matrix",),
        ),
        roles,
        mask,
    ),
    "build_muon": lambda roles, mask: build(
        OptimizerSpec(name="muon", learning_rate=1e-2, frozen=("embed_tokens",)),
        roles,
        mask,
    ),
}


@pytest.fixture(params=TRANSFORMS)
def make_tx(request, roles, draw_mask):
    return lambda seed=0: TRANSFORMS[request.param](roles, draw_mask(seed))


def _assert_close(a, b):
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-5, atol=1e-7), a, b
    )


def _assert_equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_jit_equals_eager(make_tx, draw):
    tx = make_tx()
    eager = tx.update(draw(1), tx.init(draw(0)), draw(0))
    jitted = jax.jit(tx.update)(draw(1), jax.jit(tx.init)(draw(0)), draw(0))
    _assert_close(jitted, eager)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_updates_are_finite_and_in_the_dtype_of_the_parameters(make_tx, draw, dtype):
    tx = make_tx()
    params = draw(0, dtype)
    state = tx.init(params)
    step = jax.jit(tx.update)
    for seed in range(2):
        updates, state = step(draw(seed, dtype), state, params)
    assert jax.tree.map(lambda u: (u.shape, u.dtype), updates) == jax.tree.map(
        lambda p: (p.shape, p.dtype), params
    )
    assert all(bool(jnp.isfinite(u).all()) for u in jax.tree.leaves(updates))
    assert all(bool((u != 0).any()) for u in jax.tree.leaves(updates["layers"]["mlp"]))


def test_vmap_over_seeds_equals_separate_runs(make_tx, draw):
    tx = make_tx()

    @jax.jit
    def run(params, gradients):
        return tx.update(gradients, tx.init(params), params)[0]

    def stack(*trees):
        return jax.tree.map(lambda *x: jnp.stack(x), *trees)

    seeds = (0, 1, 2)
    together = jax.jit(jax.vmap(run))(
        stack(*map(draw, seeds)), stack(*(draw(s + 10) for s in seeds))
    )
    _assert_close(together, stack(*(run(draw(s), draw(s + 10)) for s in seeds)))


def test_state_survives_a_checkpoint(make_tx, draw):
    """All of it is arrays, and the update is a function of them."""
    tx = make_tx()
    _, state = tx.update(draw(1), tx.init(draw(0)), draw(0))
    leaves, treedef = jax.tree.flatten(state)
    assert all(isinstance(leaf, jax.Array) for leaf in leaves)
    restored = treedef.unflatten([jnp.asarray(np.asarray(leaf)) for leaf in leaves])
    _assert_equal(
        tx.update(draw(2), restored, draw(0)), tx.update(draw(2), state, draw(0))
    )


def test_update_depends_on_the_state_and_not_on_construction(make_tx, draw):
    """A transform made with another mask goes on with the mask in the state."""
    tx, other = make_tx(0), make_tx(1)
    state = tx.init(draw(0))
    _assert_equal(
        other.update(draw(1), state, draw(0)), tx.update(draw(1), state, draw(0))
    )


def test_one_program_for_all_steps_and_masks(make_tx, draw):
    tx = make_tx(0)
    step = jax.jit(tx.update)
    _, state = step(draw(1), tx.init(draw(0)), draw(0))
    step(draw(1), state, draw(0))
    step(draw(1), make_tx(1).init(draw(0)), draw(0))
    assert step._cache_size() == 1


def test_extra_arguments_are_accepted(make_tx, draw):
    tx = optax.with_extra_args_support(make_tx())
    tx.update(draw(1), tx.init(draw(0)), draw(0), value=1.0)
