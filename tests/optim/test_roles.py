"""Mapping by role, and what is said when the table does not fit."""

import jax
import jax.numpy as jnp
import pytest

from geomjax.optim.roles import Role, dotted, leaf_paths, map_with_roles


def test_maps_path_leaf_and_role(draw, roles):
    params = draw(0)
    names = map_with_roles(
        lambda path, leaf, role: (dotted(path), leaf.shape, role.kind), params, roles
    )
    assert names["norm"]["weight"] == ("norm.weight", (4,), "vector")
    assert names["layers"]["mlp"]["up_proj"]["weight"] == (
        "layers.mlp.up_proj.weight",
        (3, 6, 4),
        "matrix",
    )


def test_every_path_without_a_fitting_role_is_listed(draw, roles):
    params = draw(0)
    params["lm_head"] = {"weight": jnp.zeros((7, 4))}
    params["visual"] = {"weight": jnp.zeros(2)}
    params["norm"]["weight"] = jnp.zeros((1, 4))
    with pytest.raises(ValueError, match="disagree") as error:
        map_with_roles(lambda path, leaf, role: None, params, roles)
    message = str(error.value)
    assert "lm_head.weight: no role" in message
    assert "visual.weight: no role" in message
    assert "norm.weight: the role names 1 axes ('embed',)" in message
    assert "shape (1, 4)" in message


def test_roles_of_absent_parameters_do_no_harm(draw, roles):
    roles[("lm_head", "weight")] = Role(0, "embedding", -2, -1, ("vocab", "embed"))
    counted = map_with_roles(lambda path, leaf, role: 1, draw(0), roles)
    assert sum(jax.tree.leaves(counted)) == 5


def test_paths_are_in_the_order_of_leaves(draw, roles):
    params = draw(0)
    assert set(leaf_paths(params)) == set(roles)
    for path, leaf in zip(leaf_paths(params), jax.tree.leaves(params), strict=True):
        node = params
        for key in path:
            node = node[key]
        assert node is leaf
