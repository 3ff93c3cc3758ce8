"""Optimizer state lies where its parameters do, whatever the optimizer."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec

from geomjax.meshes import Placement, mesh_from_string
from geomjax.optim import coordinate_mask, freeze, per_matrix
from geomjax.optim.lamb import lamb
from geomjax.optim.muon import muon
from geomjax.optim.roles import Role
from geomjax.train.layout import like_parameters, state_layout
from geomjax.train.step import init_state

ROLES = {
    ("layers", "up", "weight"): Role(1, "matrix", -2, -1, ("layers", None, "embed")),
    ("layers", "norm", "weight"): Role(1, "vector", None, None, ("layers", "embed")),
    ("norm", "weight"): Role(0, "vector", None, None, ("embed",)),
}
SHAPES = {
    ("layers", "up", "weight"): (2, 3, 16),
    ("layers", "norm", "weight"): (2, 16),
    ("norm", "weight"): (16,),
}
MASK = {
    "layers": {
        "up": {"weight": np.ones((2, 3, 16), bool)},
        "norm": {"weight": np.ones((2, 16), bool)},
    },
    "norm": {"weight": np.ones(16, bool)},
}


def parameters(**mesh):
    place = Placement(mesh_from_string("fsdp=8")) if not mesh else Placement(None)
    leaves = {
        path: jax.device_put(
            jnp.full(shape, 2.0, jnp.float32), place.sharding(*ROLES[path].logical_axes)
        )
        for path, shape in SHAPES.items()
    }
    up, inner, last = (leaves[path] for path in SHAPES)
    layers = {"up": {"weight": up}, "norm": {"weight": inner}}
    return {"layers": layers, "norm": {"weight": last}}


OPTIMIZERS = {
    "adamw": lambda: optax.adamw(1e-3),
    "clipped": lambda: optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(1, 0.9)),
    "frozen": lambda: freeze(["up"], optax.adamw(1e-3)),
    "lamb": lambda: lamb(1e-3, roles=ROLES),
    "masked": lambda: coordinate_mask(MASK, optax.adamw(1e-3)),
    "muon": lambda: muon(1e-3, roles=ROLES),
    "per_matrix": lambda: per_matrix(optax.scale_by_adam(), ROLES),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_what_belongs_to_a_parameter_is_split_with_it(name):
    params, tx = parameters(), OPTIMIZERS[name]()
    layout = state_layout(params, tx)
    state = init_state(params, tx, layout)
    specs = {
        (2, 3, 16): (None, None, "fsdp"),
        (2, 16): (None, "fsdp"),
        (16,): ("fsdp",),
    }
    split = 0
    for leaf in jax.tree.leaves(state):
        expected = PartitionSpec(*specs.get(leaf.shape, ()))
        assert leaf.sharding.spec == expected, leaf.shape
        assert len(leaf.sharding.device_set) == 8
        split += leaf.ndim > 0 and leaf.shape in specs
    assert split > len(SHAPES)  # The parameters, and moments or a mask beside them.
    for a, b in zip(
        jax.tree.leaves(state.params), jax.tree.leaves(params), strict=True
    ):
        assert a is not b
        np.testing.assert_array_equal(a, b)


# A mask comes from the host, and what `per_matrix` maps over a stack is made on one
# device; `init_state` moves both.
@pytest.mark.parametrize("name", sorted(set(OPTIMIZERS) - {"masked", "per_matrix"}))
def test_moments_are_never_whole_on_one_device(name):
    """Not even before they are moved to their places, which would need the memory."""
    for leaf in jax.tree.leaves(OPTIMIZERS[name]().init(parameters())):
        assert leaf.size < 16 or len(leaf.sharding.device_set) == 8, leaf.shape


def test_other_shapes_are_whole_and_the_longest_path_decides():
    params = parameters()
    tree = {"layers": {"norm": {"weight": (jnp.ones((2, 16)), jnp.ones(16))}}}
    like = like_parameters(tree, params)["layers"]["norm"]["weight"]
    assert like[0].spec == PartitionSpec(None, "fsdp")
    assert like[1].spec == PartitionSpec()  # norm.weight's shape, but not its path.


def test_one_device_has_no_layout():
    assert state_layout(parameters(mesh=None), optax.adamw(1e-3)) is None
