"""Frozen parameters keep every bit, have no state and enter no norm."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from geomjax.optim import apply_updates, freeze, frozen_paths, standard_promotion


def _adamw(**kwargs):
    return standard_promotion(optax.adamw(1e-2, **kwargs))


@pytest.mark.parametrize("apply", [optax.apply_updates, apply_updates])
def test_frozen_keep_every_bit_and_the_rest_trains_alone(draw, bits, apply):
    params, gradients = draw(0), draw(1)
    params["norm"]["weight"] = params["norm"]["weight"].at[:2].set(-0.0)
    tx = freeze(["embed_tokens", "norm"], _adamw(weight_decay=0.5))
    state = tx.init(params)
    step = jax.jit(tx.update)
    trained = params
    for _ in range(3):
        updates, state = step(gradients, state, trained)
        trained = apply(trained, updates)
    for name in ("embed_tokens", "norm"):
        np.testing.assert_array_equal(
            bits(trained[name]["weight"]), bits(params[name]["weight"])
        )
    norms = trained["layers"]["input_layernorm"]["weight"]
    np.testing.assert_array_equal(norms, params["layers"]["input_layernorm"]["weight"])

    alone, alone_tx = params["layers"]["mlp"], _adamw(weight_decay=0.5)
    alone_state = alone_tx.init(alone)
    for _ in range(3):
        updates, alone_state = jax.jit(alone_tx.update)(
            gradients["layers"]["mlp"], alone_state, alone
        )
        alone = apply(alone, updates)
    jax.tree.map(np.testing.assert_array_equal, trained["layers"]["mlp"], alone)


def test_frozen_have_no_moments(draw):
    params = draw(0)
    state = freeze(["embed_tokens"], _adamw()).init(params)
    moments = sum(x.size for x in jax.tree.leaves(state) if x.ndim)
    trained = sum(x.size for x in jax.tree.leaves([params["norm"], params["layers"]]))
    assert moments == 2 * trained


def test_clipping_norm_leaves_the_frozen_out(draw):
    params, gradients = draw(0), draw(1)
    gradients["embed_tokens"]["weight"] *= 1e6
    tx = freeze(["embed_tokens"], optax.clip_by_global_norm(1.0))
    updates, _ = tx.update(gradients, tx.init(params), params)
    np.testing.assert_allclose(optax.tree.norm(updates), 1.0, rtol=1e-6)
    assert float(jnp.abs(updates["embed_tokens"]["weight"]).max()) == 0.0


def test_a_nan_gradient_of_a_frozen_parameter_goes_nowhere(draw):
    params, gradients = draw(0), draw(1)
    gradients["norm"]["weight"] = jnp.full(4, jnp.nan)
    tx = freeze([r"^norm\."], optax.clip_by_global_norm(1.0))
    updates, _ = tx.update(gradients, tx.init(params), params)
    assert all(bool(jnp.isfinite(u).all()) for u in jax.tree.leaves(updates))


def test_patterns_are_searched_for_in_dotted_paths(draw):
    params = draw(0)
    both = {("norm", "weight"), ("layers", "input_layernorm", "weight")}
    assert set(frozen_paths(params, ["norm"])) == both
    assert frozen_paths(params, [r"^norm\."]) == (("norm", "weight"),)
    assert frozen_paths(params, []) == ()


def test_a_pattern_that_matches_nothing_lists_the_parameters(draw):
    tx = freeze(["embed_tokens", "lm_head"], optax.sgd(1.0))
    with pytest.raises(ValueError, match=r"\['lm_head'\]") as error:
        tx.init(draw(0))
    assert "layers.mlp.up_proj.weight" in str(error.value)
    assert "norm.weight" in str(error.value)


def test_freezing_everything_is_an_error(draw):
    with pytest.raises(ValueError, match="nothing to train"):
        freeze(["weight"], optax.sgd(1.0)).init(draw(0))


def test_a_broken_pattern_is_an_error():
    with pytest.raises(ValueError, match=r"'norm\(' is no regular expression"):
        freeze(["norm("], optax.sgd(1.0))


def test_map_params_works(draw):
    params = draw(0)
    tx = freeze(["embed_tokens"], standard_promotion(optax.adam(1e-2)))
    state = optax.tree.map_params(tx, lambda x: x + 1, tx.init(params))
    mu = state.inner_state[0].mu
    np.testing.assert_array_equal(mu["norm"]["weight"], np.ones(4))
