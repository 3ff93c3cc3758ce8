"""Directional derivatives by central differences, in float64."""

import jax
import numpy as np


def assert_gradient(function, point, seed=0, step=1e-5, rtol=1e-6):
    """Compares the gradient of `function` at `point` along random directions.

    To be called under `jax.enable_x64(True)` with a tree of float64 arrays.
    """
    generator = np.random.default_rng(seed)
    gradient = jax.grad(function)(point)
    function = jax.jit(function)
    for _ in range(3):
        direction = jax.tree.map(lambda x: generator.standard_normal(x.shape), point)

        def moved(sign, direction=direction):
            return jax.tree.map(lambda x, d: x + sign * step * d, point, direction)

        expected = (function(moved(1)) - function(moved(-1))) / (2 * step)
        products = jax.tree.map(lambda g, d: (g * d).sum(), gradient, direction)
        got = sum(jax.tree.leaves(products))
        assert abs(float(expected)) > 1e-3
        np.testing.assert_allclose(got, expected, rtol=rtol)
