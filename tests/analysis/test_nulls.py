"""Nulls: their norms, their shapes, and the programs that they share."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from geomjax.analysis import nulls
from geomjax.analysis.measure import StackPlan
from geomjax.geometry import null

PLAN = StackPlan("stored", "bfloat16", ())


def _pair(shape, seed=0, step=1e-3):
    rng = np.random.default_rng(seed)
    w = (0.05 * rng.standard_normal(shape)).astype(ml_dtypes.bfloat16)
    moved = rng.random(shape) < 0.5
    d = step * moved * rng.standard_normal(shape)
    return w, (w.astype(np.float32) + d).astype(ml_dtypes.bfloat16)


def _draw(pair, kind, seed=0):
    with jax.enable_x64(True):
        key = nulls.tensor_key(seed, "model.layers.0.mlp.up_proj.weight")
        return nulls.draw(*pair, key, plan=PLAN, kind=kind)


def _norm(after, before):
    return np.linalg.norm(after.astype(np.float64) - before.astype(np.float64))


@pytest.mark.parametrize("shape", [(7,), (60, 50), (50, 60), (300, 70)])
@pytest.mark.parametrize("kind", nulls.KINDS)
def test_norm_and_start(shape, kind, monkeypatch):
    # The larger ones are of several chunks, the last of them padded.
    monkeypatch.setattr(null, "CHUNKS", (8, 1000))
    before, after = _pair(shape)
    start, end = _draw((before, after), kind)
    assert start.shape == end.shape == shape
    assert start.dtype == (np.float32 if kind == "gaussian" else before.dtype)
    np.testing.assert_array_equal(start.astype(np.float32), before.astype(np.float32))
    # The update's own norm is that of D rounded to bfloat16.
    norm, wanted = _norm(end, start), _norm(after, before)
    if kind == "rounded":
        assert norm > 0.999 * wanted
    if kind == "gaussian" or start.size > 7:
        tolerance = 1e-4 if kind == "gaussian" else 2e-3
        assert norm == pytest.approx(wanted, rel=tolerance)
    again, other = _draw((before, after), kind), _draw((before, after), kind, seed=1)
    np.testing.assert_array_equal(again[1], end)
    assert not np.array_equal(other[1], end)


def test_the_rounded_null_is_the_smallest_step_past_the_norm():
    before, after = _pair((60, 50))
    start, end = _draw((before, after), "rounded")
    with jax.enable_x64(True):
        key = nulls.tensor_key(0, "model.layers.0.mlp.up_proj.weight")
        g = null.noise(key, np.int32(0), np.int32(3000), length=4096)
        flat = jnp.asarray(np.pad(before.reshape(-1), (0, 1096)))
        norm = float(_norm(after, before))
        c = null.rounded_scale([flat], [g], norm)
        just_below = np.asarray(null.rounded(flat, g, np.nextafter(c, np.float32(0))))
    assert _norm(end, start) >= norm > _norm(just_below, np.asarray(flat))


def test_a_frozen_tensor_stays():
    before, _ = _pair((60, 50))
    for kind in nulls.KINDS:
        start, end = _draw((before, before), kind)
        np.testing.assert_array_equal(start, end)


def test_shapes_share_their_programs():
    _draw(_pair((60, 50)), "gaussian")
    _draw(_pair((60, 50)), "rounded")
    programs = (null.noise, null.gaussian, null.rounded, null._moved_energy)
    compiled = [f._cache_size() for f in programs]
    for shape in [(50, 60), (64, 64), (3, 1000), (4001,)]:
        for kind in nulls.KINDS:
            _draw(_pair(shape), kind)
    assert [f._cache_size() for f in programs] == compiled
