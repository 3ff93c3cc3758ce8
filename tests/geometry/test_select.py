"""Order statistics against sorting, and both histograms against NumPy."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from geomjax.geometry.select import (
    FINE_KEY_BITS,
    count_inside,
    count_level,
    fine_key,
    histogram_by_matmul,
    histogram_by_scatter,
    locate,
    magnitude_key,
    refine,
    upto,
)
from geomjax.geometry.sparsity import energy_beyond


@pytest.mark.parametrize("bins", [1, 5, 28, 300])
def test_histograms(bins):
    index = np.random.default_rng(0).integers(0, bins, (3, 20000)).astype(np.int32)
    expected = [np.bincount(row, minlength=bins) for row in index]
    for histogram in (histogram_by_scatter, histogram_by_matmul):
        np.testing.assert_array_equal(histogram(jnp.asarray(index), bins), expected)


def _kth_smallest(x, k):
    """The cut of k-th smallest magnitudes, level by level, as the passes find it."""
    keys = magnitude_key(jnp.asarray(x))
    upper = np.asarray(count_level(keys, None))
    level = locate(upper, k)
    if x.dtype == ml_dtypes.bfloat16:
        return refine(level, k, None)
    bins = jnp.asarray(level.threshold.astype(np.int32))
    return refine(level, k, np.asarray(count_inside(keys, bins, None)))


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 1000),
    spread=st.sampled_from([0.0, 1e-30, 1.0, 1e30]),
    dtype=st.sampled_from([np.float32, ml_dtypes.bfloat16]),
)
def test_kth_smallest(seed, spread, dtype):
    rng = np.random.default_rng(seed)
    x = (spread * rng.standard_normal((2, 6, 7))).astype(dtype)
    x.reshape(-1)[:10] = x.reshape(-1)[10:20]
    k = rng.integers(1, 43, (2, 3))
    cut = _kth_smallest(x, k)
    magnitudes = np.abs(x.astype(np.float32)).reshape(2, -1)
    for row in range(2):
        for i in range(3):
            value = np.sort(magnitudes[row])[k[row, i] - 1]
            found = np.uint32(cut.threshold[row, i]).view(np.float32)
            assert found == value
            assert cut.below[row, i] == np.sum(magnitudes[row] < value)
            assert cut.tied[row, i] == np.sum(magnitudes[row] == value)


def test_counts_beyond_int32():
    counts = np.zeros((1, 256), np.int64)
    counts[0, [3, 7, 9]] = 1 << 33, 5, 1 << 40
    k = np.asarray([[1 << 33, (1 << 33) + 1, (1 << 33) + 6]])
    cut = locate(counts, k)
    assert cut.threshold.tolist() == [[3, 7, 9]]
    assert cut.below.tolist() == [[0, 1 << 33, (1 << 33) + 5]]
    assert cut.tied.tolist() == [[1 << 33, 5, 1 << 40]]


def test_fine_keys_resolve_what_float32_does_below_the_bound():
    with jax.enable_x64(True):
        x = jnp.asarray([[1.0, 1 + 2.4e-7, 1 - 2.4e-7, -3.0, 0.0, 1e-12, 1 + 1e-9]])
        keys = np.asarray(fine_key(x, jnp.asarray([[4.0]])))[0]
    assert list(np.argsort(keys[:4], kind="stable")) == [2, 0, 1, 3]
    assert keys[0] == keys[6]
    # 32 octaves below the bound all is 0.
    assert keys[4] == keys[5] == 0
    assert len(set(keys[:4].tolist())) == 4
    assert keys.max() < 1 << FINE_KEY_BITS


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 1000), spread=st.sampled_from([0.0, 1e-38, 1.0, 1e30]))
def test_a_histogram_of_bfloat16_values_tells_counts_and_energies(seed, spread):
    rng = np.random.default_rng(seed)
    x = (spread * rng.standard_normal((2, 6, 7))).astype(ml_dtypes.bfloat16)
    x[0, 0, :3] = np.inf, -np.inf, np.nan
    counts = np.asarray(count_level(magnitude_key(jnp.asarray(x)), None), np.int64)
    sizes = np.abs(x.astype(np.float64)).reshape(2, -1)
    # At a value, beside it, below all, above all that is finite.
    some = np.nan_to_num(sizes[:, [5, 9]], posinf=1.0)
    limits = np.concatenate([some, some * 1.01, [[0.0, 3.4e38]] * 2], axis=-1)
    for row in range(2):
        of_row = slice(row, row + 1)
        for i, limit in enumerate(limits[row]):
            within = sizes[row] <= limit
            assert upto(counts[of_row], limits[of_row])[0, i] == within.sum()
            beyond = np.isfinite(sizes[row]) & (sizes[row] > limit)
            expected = np.sum(np.square(sizes[row][beyond]))
            found = energy_beyond(counts[of_row], limits[of_row])[0, i]
            np.testing.assert_allclose(found, expected, rtol=1e-13)
