"""A masked run moves its coordinates and leaves every bit of the others."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from geomjax.optim import (
    CoordinateMaskState,
    apply_updates,
    coordinate_mask,
    standard_promotion,
)

INNER = {
    "adamw": lambda: optax.adamw(1e-2, weight_decay=0.5),
    "momentum": lambda: optax.sgd(1e-1, momentum=0.9, nesterov=True),
    "clipped_adamw": lambda: optax.chain(
        optax.clip_by_global_norm(0.1), optax.adamw(1e-2, weight_decay=0.5)
    ),
    "lion": lambda: optax.lion(1e-2, weight_decay=0.5),
    "decayed_sgd": lambda: optax.chain(
        optax.add_decayed_weights(0.5), optax.sgd(1e-1, momentum=0.9)
    ),
}


def _with_negative_zeros(params):
    """Every third weight is -0, every fifth +0."""

    def leaf(p):
        index = np.arange(p.size).reshape(p.shape)
        p = np.where(index % 3 == 0, np.asarray(-0.0, p.dtype), np.asarray(p))
        return jnp.asarray(np.where(index % 5 == 0, np.asarray(0.0, p.dtype), p))

    return jax.tree.map(leaf, params)


def _adamw(**kwargs):
    return standard_promotion(optax.adamw(1e-2, **kwargs))


def _run(tx, params, gradients, apply, steps=4):
    state = tx.init(params)

    @jax.jit
    def step(params, state):
        updates, state = tx.update(gradients, state, params)
        return apply(params, updates), state

    for _ in range(steps):
        params, state = step(params, state)
    return params, state


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("apply", [optax.apply_updates, apply_updates])
@pytest.mark.parametrize("inner", INNER)
def test_off_mask_weights_keep_every_bit(draw, draw_mask, bits, inner, apply, dtype):
    params = _with_negative_zeros(draw(0, dtype))
    mask = draw_mask(1)
    after, _ = _run(
        coordinate_mask(mask, standard_promotion(INNER[inner]())),
        params,
        draw(2, dtype),
        apply,
    )
    for m, before, now in zip(
        *(jax.tree.leaves(t) for t in (mask, params, after)), strict=True
    ):
        m = np.asarray(m)
        np.testing.assert_array_equal(bits(now)[~m], bits(before)[~m])
        assert (bits(now) != bits(before))[m].mean() > 0.7  # bfloat16 rounds some away


def test_nan_of_a_frozen_coordinate_goes_nowhere(draw, draw_mask):
    params, mask, gradients = draw(0), draw_mask(1), draw(2)
    poisoned = jax.tree.map(lambda m, g: jnp.where(m, g, jnp.nan), mask, gradients)
    tx = coordinate_mask(mask, optax.chain(optax.clip_by_global_norm(0.1), _adamw()))
    expected, _ = _run(tx, params, gradients, apply_updates)
    got, state = _run(tx, params, poisoned, apply_updates)
    jax.tree.map(np.testing.assert_array_equal, got, expected)
    assert all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(state.inner_state))


def test_clipping_sees_the_masked_norm(draw, draw_mask):
    params, mask, gradients = draw(0), draw_mask(1), draw(2)
    tx = coordinate_mask(mask, optax.clip_by_global_norm(1.0))
    updates, _ = tx.update(gradients, tx.init(params), params)
    np.testing.assert_allclose(optax.tree.norm(updates), 1.0, rtol=1e-6)


def test_equals_a_run_on_the_trainable_coordinates_alone(draw, draw_mask):
    """AdamW is element-wise: gathered coordinates must train the same way."""
    params, mask, gradients = draw(0), draw_mask(1), draw(2)
    tx = _adamw(weight_decay=0.3)
    got, _ = _run(coordinate_mask(mask, tx), params, gradients, apply_updates)

    def gather(tree):
        return jax.tree.map(lambda m, x: x[np.asarray(m)], mask, tree)

    alone, _ = _run(tx, gather(params), gather(gradients), apply_updates)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), gather(got), alone
    )


def test_subnormal_weights_survive_our_apply(bits):
    """The compiled addition flushes them, which is why apply_updates selects."""
    for dtype, integers in ((jnp.float32, np.uint32), (jnp.bfloat16, np.uint16)):
        sign = 1 << (8 * np.dtype(integers).itemsize - 1)
        pattern = np.array([1, sign + 1, 0x7F, sign, 0], integers)
        params = {"w": jnp.asarray(pattern.view(dtype))}
        mask = {"w": jnp.zeros(5, bool)}
        tx = coordinate_mask(mask, _adamw(weight_decay=0.5))
        after, _ = _run(tx, params, {"w": jnp.ones(5, dtype)}, apply_updates)
        np.testing.assert_array_equal(bits(after["w"]), pattern)


def test_apply_updates_equals_optax_on_normal_numbers(draw):
    params, updates = draw(0), draw(1)
    jax.tree.map(
        np.testing.assert_array_equal,
        jax.jit(apply_updates)(params, updates),
        jax.jit(optax.apply_updates)(params, updates),
    )


def test_none_trains_a_leaf_or_a_subtree_throughout(draw, draw_mask):
    params, gradients, full = draw(0), draw(2), draw_mask(1)
    partial = {**full, "layers": None, "norm": {"weight": None}}
    spelled_out = {
        **full,
        "layers": jax.tree.map(jnp.ones_like, full["layers"]),
        "norm": jax.tree.map(jnp.ones_like, full["norm"]),
    }
    runs = [
        _run(coordinate_mask(m, _adamw()), params, gradients, apply_updates)[0]
        for m in (partial, spelled_out)
    ]
    jax.tree.map(np.testing.assert_array_equal, *runs)
    plain, _ = _run(_adamw(), params, gradients, apply_updates)
    whole, _ = _run(coordinate_mask(None, _adamw()), params, gradients, apply_updates)
    jax.tree.map(np.testing.assert_array_equal, whole, plain)


def test_without_a_transform_it_masks_the_gradients(draw, draw_mask, bits):
    params, mask, gradients = draw(0), draw_mask(1), draw(2)
    tx = coordinate_mask(mask)
    updates, _ = tx.update(gradients, tx.init(params))
    jax.tree.map(
        lambda m, g, u: np.testing.assert_array_equal(
            bits(u), bits(np.where(m, g, np.float32(-0.0)))
        ),
        mask,
        gradients,
        updates,
    )


def test_masks_batch_over_runs_and_share_one_program(draw, draw_mask):
    params, gradients = draw(0), draw(2)
    masks = [draw_mask(seed) for seed in range(3)]
    inner = _adamw()

    @jax.jit
    def init(mask, params):
        return coordinate_mask(mask, inner).init(params)

    @jax.jit
    def step(state, params):
        updates, state = coordinate_mask(None, inner).update(gradients, state, params)
        return apply_updates(params, updates), state

    separate = [step(init(mask, params), params)[0] for mask in masks]
    assert step._cache_size() == 1
    stacked = jax.tree.map(lambda *m: jnp.stack(m), *masks)
    states = jax.vmap(init, in_axes=(0, None))(stacked, params)
    together, _ = jax.vmap(step, in_axes=(0, None))(states, params)
    jax.tree.map(
        lambda t, *s: np.testing.assert_allclose(t, jnp.stack(s), rtol=1e-6),
        together,
        *separate,
    )


def test_a_donated_state_leaves_the_callers_mask(draw, draw_mask):
    params, mask, gradients = draw(0), draw_mask(1), draw(2)
    tx = coordinate_mask(mask, optax.sgd(1e-1))
    step = jax.jit(lambda s, g: tx.update(g, s)[1], donate_argnums=0)
    step(tx.init(params), gradients)
    assert all(not m.is_deleted() for m in jax.tree.leaves(mask))
    step(tx.init(params), gradients)


def test_the_mask_keeps_its_sharding(draw):
    mesh = jax.make_mesh((4,), ("fsdp",))
    sharding = jax.sharding.NamedSharding(mesh, jax.P("fsdp"))
    params = {"w": jax.device_put(jnp.ones((8, 2)), sharding)}
    mask = {"w": jax.device_put(jnp.eye(8, 2, dtype=bool), sharding)}
    tx = coordinate_mask(mask, optax.sgd(1.0))
    state = tx.init(params)
    assert state.mask["w"].sharding.is_equivalent_to(sharding, 2)
    updates, state = jax.jit(tx.update)(params, state)
    assert updates["w"].sharding.is_equivalent_to(sharding, 2)
    np.testing.assert_array_equal(updates["w"], -np.eye(8, 2))


def test_map_params_takes_the_mask_for_a_parameter(draw, draw_mask):
    params = draw(0)
    tx = coordinate_mask(draw_mask(1), standard_promotion(optax.adam(1e-2)))
    labels = jax.tree.map(lambda p: "like params", params)
    mapped = optax.tree.map_params(
        tx,
        lambda _, label: label,
        tx.init(params),
        labels,
        transform_non_params=lambda _: "other",
    )
    assert isinstance(mapped, CoordinateMaskState)
    assert mapped.mask == labels
    assert mapped.inner_state[0].mu == labels
    assert mapped.inner_state[0].count == "other"


def test_extra_arguments_reach_the_inner_transform(draw, draw_mask):
    def update(updates, state, params=None, *, factor):
        del params
        return jax.tree.map(lambda g: factor * g, updates), state

    inner = optax.GradientTransformationExtraArgs(lambda p: optax.EmptyState(), update)
    tx = coordinate_mask(draw_mask(1), inner)
    updates, _ = tx.update(draw(2), tx.init(draw(0)), factor=3.0)
    expected = jax.tree.map(lambda m, g: np.where(m, 3 * g, 0), draw_mask(1), draw(2))
    jax.tree.map(np.testing.assert_array_equal, updates, expected)


def test_every_misfit_of_the_mask_is_listed(draw, draw_mask):
    mask = draw_mask(1)
    mask["lm_head"] = {"weight": jnp.ones((7, 4), bool)}
    mask["vision"] = None
    mask["norm"] = {"weight": jnp.ones(5, bool)}
    mask["embed_tokens"] = {"weight": jnp.ones((7, 4))}
    del mask["layers"]["mlp"]["up_proj"]
    with pytest.raises(ValueError, match="does not fit") as error:
        coordinate_mask(mask).init(draw(0))
    message = str(error.value)
    assert "lm_head.weight: no such parameter" in message
    assert "vision: no such parameter" in message
    assert "norm.weight: got bool[5], expected bool[4]" in message
    assert "embed_tokens.weight: got float32[7, 4], expected bool[7, 4]" in message
    assert "layers.mlp.up_proj.weight: no mask" in message
