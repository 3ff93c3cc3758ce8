"""A small stacked model: parameters, roles and gradients for the tests of optim."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from geomjax.optim.roles import Role, path_of

LAYERS, WIDTH, HIDDEN, VOCABULARY = 3, 4, 6, 7

ROLES = {
    ("embed_tokens", "weight"): Role(0, "embedding", -2, -1, ("vocab", "embed")),
    ("norm", "weight"): Role(0, "vector", None, None, ("embed",)),
    ("layers", "input_layernorm", "weight"): Role(
        1, "vector", None, None, ("layers", "embed")
    ),
    ("layers", "mlp", "up_proj", "weight"): Role(
        1, "matrix", -2, -1, ("layers", "mlp", "embed")
    ),
    ("layers", "mlp", "down_proj", "weight"): Role(
        1, "matrix", -2, -1, ("layers", "embed", "mlp")
    ),
}

SHAPES = {
    "embed_tokens": {"weight": (VOCABULARY, WIDTH)},
    "norm": {"weight": (WIDTH,)},
    "layers": {
        "input_layernorm": {"weight": (LAYERS, WIDTH)},
        "mlp": {
            "up_proj": {"weight": (LAYERS, HIDDEN, WIDTH)},
            "down_proj": {"weight": (LAYERS, WIDTH, HIDDEN)},
        },
    },
}


@pytest.fixture
def roles():
    return dict(ROLES)


@pytest.fixture
def draw():
    """Draws a tree shaped as the parameters: draw(seed, dtype)."""

    def of(seed, dtype=jnp.float32):
        def leaf(keys, shape):
            rng = np.random.default_rng([seed, hash_free(path_of(keys))])
            return jnp.asarray(rng.normal(size=shape), dtype)

        return jax.tree_util.tree_map_with_path(
            leaf, SHAPES, is_leaf=lambda x: isinstance(x, tuple)
        )

    return of


def hash_free(path):
    """A number for a path that is the same in every process."""
    return int.from_bytes(".".join(path).encode()[-7:], "little")


@pytest.fixture
def draw_mask():
    """Draws booleans shaped as the parameters: draw_mask(seed, density)."""

    def of(seed, density=0.4):
        rng = np.random.default_rng(seed)
        return jax.tree.map(
            lambda shape: jnp.asarray(rng.random(shape) < density),
            SHAPES,
            is_leaf=lambda x: isinstance(x, tuple),
        )

    return of


@pytest.fixture
def bits():
    """The bit patterns of an array, for comparisons that tell -0 from +0."""

    def of(x):
        x = np.asarray(x)
        return x.view({2: np.uint16, 4: np.uint32}[x.dtype.itemsize])

    return of
