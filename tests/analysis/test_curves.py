"""Curves of single matrices against float64 NumPy."""

import json

import ml_dtypes
import numpy as np
import pytest

from geomjax.analysis import curves, run
from geomjax.checkpoints import DictSource
from geomjax.checkpoints.matching import Match

NAME = "model.layers.0.self_attn.q_proj.weight"


def matrices(m: int = 12, n: int = 20) -> tuple[np.ndarray, np.ndarray]:
    """W and W' in bfloat16; a tenth of the entries moved."""
    rng = np.random.default_rng(0)
    w = rng.standard_normal((m, n)).astype(ml_dtypes.bfloat16)
    d = 0.05 * rng.standard_normal((m, n)) * (rng.random((m, n)) < 0.1)
    return w, (w.astype(np.float64) + d).astype(ml_dtypes.bfloat16)


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """The curves of one matrix, with its sides in float64."""
    w, tuned = matrices()
    pair = DictSource({NAME: w}), DictSource({NAME: tuned})
    folder = tmp_path_factory.mktemp("run")
    result = run(*pair, folder, subtract="float32", null_seeds=[0])
    found = curves.measure_curves(
        *pair, result.matching.matched, result.spectra, subtract="float32"
    )
    return found[0], w.astype(np.float64), tuned.astype(np.float64)


def test_spectra_and_angles_equal_numpy(measured):
    record, w, tuned = measured
    k = 6
    u, s, vh = np.linalg.svd(w)
    u1, _, vh1 = np.linalg.svd(tuned)
    update = record["update"]
    np.testing.assert_allclose(update["source"], s, rtol=1e-11)
    d = np.linalg.svd(tuned - w, compute_uv=False)
    np.testing.assert_allclose(update["delta"], d, rtol=1e-8, atol=1e-7 * d[0])
    for side, a, b in (
        ("left", u[:, :k], u1[:, :k]),
        ("right", vh[:k].T, vh1[:k].T),
    ):
        sines = np.linalg.svd(b - a @ (a.T @ b), compute_uv=False)
        wanted = np.sort(np.rad2deg(np.arcsin(sines)))
        np.testing.assert_allclose(update[side], wanted, rtol=1e-8)


def test_bins_hold_equal_counts_of_the_smallest_weights_first(measured):
    record, w, tuned = measured
    order = np.argsort(np.abs(w).ravel(), kind="stable")
    d = (tuned - w).ravel()[order]
    parts = np.split(d, curves.BINS)
    size = [np.mean(np.abs(part)) / np.sqrt(np.mean(d**2)) for part in parts]
    np.testing.assert_allclose(record["update"]["size"], size, rtol=1e-12)
    changed = [np.mean(part != 0) for part in parts]
    np.testing.assert_array_equal(record["update"]["changed"], changed)


def test_nulls_have_the_norm_of_the_update(measured):
    record, _, _ = measured
    norm = np.linalg.norm(record["update"]["delta"])
    np.testing.assert_allclose(np.linalg.norm(record["null"]["delta"]), norm, rtol=1e-4)
    assert record["null"]["delta"] != record["update"]["delta"]
    json.dumps(record, allow_nan=False)


def test_a_zero_update_has_no_relative_size():
    w, _ = matrices()
    found = curves.near_zero(w, w - w, bins=4)
    assert np.all(np.isnan(found.size))
    np.testing.assert_array_equal(found.changed, np.zeros(4))


def test_representative_takes_the_largest_of_each_module_in_the_middle():
    def item(name: str, *shape: int) -> Match:
        return Match(name, name, name, shape, "exact")

    layers = [
        item(f"model.layers.{i}.{part}.weight", *shape)
        for i in range(4)
        for part, shape in (
            ("self_attn.q_proj", (8, 8)),
            ("mlp.experts.0.up_proj", (4, 8)),
            ("mlp.experts.1.up_proj", (16, 8)),
            ("input_layernorm", (8,)),
        )
    ]
    matched = [item("model.embed_tokens.weight", 99, 8), *layers]
    found = [m.name for m in curves.representative(matched)]
    middle = "model.layers.2"
    up = f"{middle}.mlp.experts.1.up_proj.weight"
    assert found == [f"{middle}.self_attn.q_proj.weight", up]
    assert [m.name for m in curves.representative(matched, limit=1)] == [up]
    assert curves.representative(matched[:1]) == []
