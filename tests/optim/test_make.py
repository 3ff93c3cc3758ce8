"""Optimizers by name and by import path; schedules; the order of the chain."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from geomjax.optim import (
    OptimizerSpec,
    apply_updates,
    build,
    learning_rate_schedule,
    make,
    standard_promotion,
)

NAMES = ("adagrad", "adam", "adamw", "lamb", "lion", "muon", "rmsprop", "sgd")
ELEMENTWISE = ("adagrad", "adam", "adamw", "lion", "rmsprop", "sgd")


def _updates(tx, draw, steps=3):
    params, state = draw(0), tx.init(draw(0))
    for seed in range(steps):
        updates, state = jax.jit(tx.update)(draw(seed + 1), state, params)
        params = apply_updates(params, updates)
    return params


def plain_sgd(learning_rate, momentum=None):
    """Imported by path in a test below."""
    return optax.sgd(learning_rate, momentum)


def takes_roles(learning_rate, roles, **kwargs):
    assert ("norm", "weight") in roles
    return optax.sgd(learning_rate, **kwargs)


def returns_something_else(learning_rate):
    return lambda gradients: gradients


def takes_no_rate(momentum):
    return optax.sgd(1.0, momentum)


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_a_name_is_optaxs_optimizer(draw, roles, name):
    expected = standard_promotion(getattr(optax, name)(1e-2))
    jax.tree.map(
        np.testing.assert_array_equal,
        _updates(make(name, 1e-2, roles=roles), draw),
        _updates(expected, draw),
    )


def test_keywords_reach_the_optimizer(draw, roles):
    tx = make("sgd", 1e-2, roles=roles, kwargs={"momentum": 0.9, "nesterov": True})
    jax.tree.map(
        np.testing.assert_array_equal,
        _updates(tx, draw),
        _updates(optax.sgd(1e-2, momentum=0.9, nesterov=True), draw),
    )


@pytest.mark.parametrize("name", NAMES)
def test_every_optimizer_lowers_a_quadratic(draw, roles, name):
    params, target = draw(0), draw(1)
    tx = make(name, 3e-2, roles=roles)
    state = tx.init(params)

    @jax.jit
    def step(params, state):
        def loss(p):
            return optax.tree.norm(optax.tree.sub(p, target), squared=True)

        value, gradients = jax.value_and_grad(loss)(params)
        updates, state = tx.update(gradients, state, params)
        return apply_updates(params, updates), state, value

    values = []
    for _ in range(20):
        params, state, value = step(params, state)
        values.append(float(value))
    assert values[-1] < 0.8 * values[0]


def test_import_path(draw, roles, monkeypatch):
    monkeypatch.setitem(sys.modules, "outside", sys.modules[__name__])
    tx = make("outside:plain_sgd", 1e-2, roles=roles, kwargs={"momentum": 0.9})
    jax.tree.map(
        np.testing.assert_array_equal,
        _updates(tx, draw),
        _updates(optax.sgd(1e-2, 0.9), draw),
    )
    make("outside:takes_roles", 1e-2, roles=roles, kwargs={"nesterov": True})
    make("optax.contrib:sophia", 1e-2, roles=roles)


@pytest.mark.parametrize(
    ("name", "kwargs", "message"),
    [
        ("adamv", {}, r"got 'adamv', expected one of \['adagrad', .*'sparse_adamw'\]"),
        ("sgd", {"momentun": 0.9}, r"\['momentun'\].*'momentum', 'nesterov'\]"),
        ("sgd", {"learning_rate": 0.9}, r"unknown keywords \['learning_rate'\]"),
        ("adamw", {"mask": True}, r"unknown keywords \['mask'\]"),
        ("outside:plain_sgd", {"nesterov": True}, r"expected some of \['momentum'\]"),
        ("outside:takes_roles", {"roles": {}}, r"unknown keywords \['roles'\]"),
        ("outside:missing", {}, "no function 'missing'"),
        ("outside:NAMES", {}, "no function 'NAMES'"),
        ("outside:returns_something_else", {}, "is no optax transform"),
        ("outside:takes_no_rate", {}, "expected a `learning_rate`"),
        ("no_such_package.module:f", {}, "does not import"),
        ("outside:", {}, "package.module:function"),
    ],
)
def test_bad_names_and_keywords(roles, monkeypatch, name, kwargs, message):
    monkeypatch.setitem(sys.modules, "outside", sys.modules[__name__])
    with pytest.raises(ValueError, match=message):
        make(name, 1e-2, roles=roles, kwargs=kwargs)


def test_decay_applies_to_all_unless_kinds_are_given(draw, roles):
    params, zero = draw(0), jax.tree.map(jnp.zeros_like, draw(0))

    def decayed(kinds):
        tx = make(
            "adamw", 1.0, roles=roles, decay_kinds=kinds, kwargs={"weight_decay": 0.5}
        )
        updates, _ = tx.update(zero, tx.init(params), params)
        return {
            k: float(jnp.abs(v["weight"]).max()) > 0
            for k, v in (
                ("embed_tokens", updates["embed_tokens"]),
                ("norm", updates["norm"]),
                ("layernorm", updates["layers"]["input_layernorm"]),
                ("up_proj", updates["layers"]["mlp"]["up_proj"]),
            )
        }

    assert all(decayed(None).values())
    assert decayed(("matrix", "embedding")) == {
        "embed_tokens": True,
        "norm": False,
        "layernorm": False,
        "up_proj": True,
    }


def test_decay_kinds_errors(roles):
    with pytest.raises(ValueError, match="'sgd' has no mask"):
        make("sgd", 1.0, roles=roles, decay_kinds=("matrix",))
    with pytest.raises(ValueError, match=r"\['bias'\]"):
        make("adamw", 1.0, roles=roles, decay_kinds=("bias",))


def test_schedules():
    warm = learning_rate_schedule("constant", 2.0, warmup_steps=4)
    np.testing.assert_allclose([warm(t) for t in range(6)], [0, 0.5, 1, 1.5, 2, 2])
    linear = learning_rate_schedule("linear", 2.0, warmup_steps=2, total_steps=6)
    np.testing.assert_allclose(
        [linear(t) for t in range(8)], [0, 1, 2, 1.5, 1, 0.5, 0, 0]
    )
    cosine = learning_rate_schedule("cosine", 2.0, warmup_steps=2, total_steps=10)
    expected = [1 + np.cos(np.pi * s / 8) for s in range(9)]
    np.testing.assert_allclose(
        [cosine(t) for t in range(11)], [0, 1, *expected], atol=1e-7
    )
    assert float(learning_rate_schedule("constant", 3.0)(100)) == 3.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(name="exponential", peak=1.0), "expected one of"),
        (dict(name="constant", peak=-1.0), "learning_rate: got -1.0"),
        (dict(name="constant", peak=float("nan")), "learning_rate: got nan"),
        (dict(name="constant", peak=1.0, warmup_steps=-1), "warmup_steps: got -1"),
        (dict(name="cosine", peak=1.0), "total_steps: got None"),
        (
            dict(name="linear", peak=1.0, warmup_steps=5, total_steps=5),
            "more than warmup_steps = 5",
        ),
    ],
)
def test_bad_schedules(arguments, message):
    with pytest.raises(ValueError, match=message):
        learning_rate_schedule(**arguments)


def test_build_in_the_documented_order(draw, draw_mask, roles, bits):
    """Mask, freeze, clip by the norm of what is left, decay, mask again."""
    params, gradients, mask = draw(0), draw(1), draw_mask(2)
    spec = OptimizerSpec(
        name="sgd", learning_rate=0.5, clip_norm=0.1, frozen=("embed_tokens",)
    )
    tx = build(spec, roles, mask)
    updates, _ = jax.jit(tx.update)(gradients, tx.init(params), params)
    kept = jax.tree.map(lambda m, g: jnp.where(m, g, 0.0), mask, gradients)
    norm = optax.tree.norm([kept["norm"], kept["layers"]])
    expected = jax.tree.map(lambda g: np.array(-0.5 * 0.1 / norm * g), kept)
    expected["embed_tokens"]["weight"][:] = 0.0
    jax.tree.map(
        lambda u, e: np.testing.assert_allclose(u, e, rtol=1e-6), updates, expected
    )
    frozen = bits(updates["embed_tokens"]["weight"])
    assert set(frozen.ravel().tolist()) == {1 << 31}


@pytest.mark.parametrize("name", NAMES)
def test_build_holds_masked_and_frozen_weights_for_every_optimizer(
    draw, draw_mask, roles, bits, name
):
    params, mask = draw(0), draw_mask(2)
    spec = OptimizerSpec(
        name=name,
        learning_rate=1e-2,
        schedule="cosine",
        warmup_steps=1,
        total_steps=10,
        clip_norm=1.0,
        frozen=("embed_tokens",),
    )
    trained = _updates(build(spec, roles, mask), draw)
    frozen = params["embed_tokens"]["weight"]
    np.testing.assert_array_equal(bits(trained["embed_tokens"]["weight"]), bits(frozen))
    for m, p, q in zip(
        *(jax.tree.leaves(t["layers"]) for t in (mask, params, trained)), strict=True
    ):
        moved = bits(p) != bits(q)
        np.testing.assert_array_equal(moved, np.asarray(m))


def test_a_bad_clip_norm():
    spec = OptimizerSpec(name="sgd", learning_rate=1.0, clip_norm=0.0)
    with pytest.raises(ValueError, match="clip_norm: got 0.0"):
        build(spec, {})
