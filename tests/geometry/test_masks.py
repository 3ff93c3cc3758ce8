"""Keys of the principal masks, a few columns at a time as at once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from geomjax.geometry import masks
from geomjax.geometry.factor import factor
from geomjax.geometry.select import fine_key


@pytest.mark.parametrize("columns", [40, 256, 257, 300, 384])
def test_keys_are_those_of_the_reconstructions(columns):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 24, columns))
    with jax.enable_x64(True):
        factors = factor(jnp.asarray(x), 12)
        long = factors.long_rows(jnp.asarray(x))
        keys = jax.jit(lambda f, a: masks.principal_keys(f, a, (12, 3)))(factors, long)
        assert keys.shape == (2, 2, 24, columns)
        assert keys.dtype == jnp.uint32
        for i, k in enumerate((12, 3)):
            scaled = factors.short[:, :k] * factors.values[:, :k, None]
            rebuilt = jnp.swapaxes(scaled, -1, -2) @ long[:, :k]
            expected = fine_key(rebuilt, factors.values[:, :1, None])
            # Rounding of the sums may move a key by the last of its bits.
            ahead = np.asarray(keys[:, i], np.int64) - np.asarray(expected, np.int64)
            assert np.abs(ahead).max() <= 1
            assert np.mean(ahead != 0) < 1e-3
