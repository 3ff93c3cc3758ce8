"""A rate that is an argument: what a transform made at that rate would do."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from geomjax.optim import OptimizerSpec, build, given_rate

RATES = (1e-3, 3e-2)


def bounded(learning_rate, bound=1e-2):
    """Imported by path below: its update is no multiple of its rate."""
    return optax.chain(optax.scale_by_learning_rate(learning_rate), optax.clip(bound))


SPECS = {
    "adamw": OptimizerSpec(
        name="adamw",
        learning_rate=1.0,
        clip_norm=1.0,
        frozen=(r"^norm\.",),
        kwargs={"weight_decay": 0.1},
    ),
    "warm_up": OptimizerSpec(
        name="sgd", learning_rate=1.0, schedule="cosine", warmup_steps=1, total_steps=4
    ),
    "muon": OptimizerSpec(name="muon", learning_rate=1.0),
    "lamb": OptimizerSpec(name="lamb", learning_rate=1.0),
    "sparse_adamw": OptimizerSpec(name="sparse_adamw", learning_rate=1.0),
    "adopt": OptimizerSpec(name="optax.contrib:adopt", learning_rate=1.0),
    "bounded": OptimizerSpec(name=f"{__name__}:bounded", learning_rate=1.0),
}


@pytest.mark.parametrize("name", SPECS)
def test_every_rate_is_that_of_a_transform_made_at_it(name, draw, draw_mask, roles):
    """Bit for bit, masked, and in one program for all rates."""
    spec, mask = SPECS[name], draw_mask(0)
    given = given_rate(spec, roles, mask)
    update = jax.jit(given.update)
    for rate in RATES:
        made = build(dataclasses.replace(spec, learning_rate=rate), roles, mask)
        expected, state = jax.jit(made.update), given.init(draw(0))
        theirs = made.init(draw(0))
        for step in range(2):
            gradients = draw(step + 1)
            ours, state = update(
                gradients, state, draw(0), learning_rate=jnp.float32(rate)
            )
            wanted, theirs = expected(gradients, theirs, draw(0))
            jax.tree.map(np.testing.assert_array_equal, ours, wanted)
        jax.tree.map(np.testing.assert_array_equal, state, theirs)
    assert update._cache_size() == 1


def test_what_is_no_multiple_of_the_rate_differs_from_one(draw, roles):
    """The case that scaling the update of the rate 1 gets wrong."""
    tx = given_rate(SPECS["bounded"], roles)
    small, large = (
        tx.update(draw(1), tx.init(draw(0)), draw(0), learning_rate=jnp.float32(rate))
        for rate in (1e-3, 1.0)
    )
    a, b = (u[0]["norm"]["weight"] for u in (small, large))
    assert np.abs(a).max() < 1e-2
    assert np.abs(b).max() == np.float32(1e-2)
    assert not np.allclose(a, np.asarray(b) * 1e-3)


def test_what_does_not_fit_is_refused_as_by_build(draw, roles):
    with pytest.raises(ValueError, match="learning_rate: got -1"):
        given_rate(dataclasses.replace(SPECS["adamw"], learning_rate=-1.0), roles)
    tx = given_rate(SPECS["adamw"], roles)
    with pytest.raises(TypeError, match="learning_rate"):
        tx.update(draw(1), tx.init(draw(0)), draw(0))
