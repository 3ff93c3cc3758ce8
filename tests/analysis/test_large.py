"""The rows of large matrices against those of the exact path, on small ones."""

import csv
import math

import jax
import numpy as np
import pytest

from geomjax.analysis import Column, Metric, Pool, measure, run
from geomjax.analysis.large import BOUND_SUFFIX, Effort, measure_large
from geomjax.analysis.measure import StackPlan, load
from geomjax.analysis.metrics import DEFAULT
from geomjax.analysis.stacks import plan_stacks
from geomjax.checkpoints import DictSource, match

NAME = "model.layers.0.mlp.up_proj.weight"
EFFORT = Effort(k=32, block=8, depth=8, probes=16, steps=16)


def _pair(shape=(90, 400), *, decay=0.8, step=1e-3, rank=90, seed=0):
    """W and W' = W + D in float32, with singular values that decay geometrically."""
    rng = np.random.default_rng(seed)

    def matrix(base, rank):
        left = np.linalg.qr(rng.standard_normal((shape[0], min(shape))))[0]
        right = np.linalg.qr(rng.standard_normal((shape[1], min(shape))))[0]
        index = np.arange(min(shape))
        return (left * np.where(index < rank, base**index, 0)) @ right.T

    w = matrix(decay, min(shape)).astype(np.float32)
    tuned = (w + step * matrix(0.7, rank)).astype(np.float32)
    return DictSource({NAME: w}), DictSource({NAME: tuned})


def _measure(source, tuned, *, mesh=None, metrics=DEFAULT, delta="master", **effort):
    plan = StackPlan(delta, "bfloat16", metrics)
    matched = match(source, tuned).matched
    (stack,) = plan_stacks(source, tuned, matched, memory_budget=1 << 30, devices=1)
    loaded = load(source, tuned, stack, plan)
    if mesh is not None:
        # Several blocks for the devices to share, the last one padded.
        stack = stack._replace(layout=stack.layout._replace(columns=37))
        loaded = load(source, tuned, stack, plan)
    with jax.enable_x64(True):
        return measure_large(
            stack, loaded, plan, mesh=mesh, effort=EFFORT._replace(**effort)
        )


def _compare(found, exact):
    """Columns that carry a bound, those that are exact, and those that are null."""
    bounded, same, null = [], [], []
    for name, value in exact.items():
        if name == "notes" or not isinstance(value, float):
            continue
        if found[name] is None:
            null.append(name)
        elif (bound := found.get(name + BOUND_SUFFIX)) is not None:
            assert abs(found[name] - value) <= bound + 1e-9 * abs(value), name
            assert bound <= 0.1 * abs(found[name]), name
            bounded.append(name)
        else:
            assert found[name] == pytest.approx(value, rel=1e-9, abs=1e-300), name
            same.append(name)
    return bounded, same, null


@pytest.mark.parametrize("shape", [(90, 400), (400, 90)], ids=["wide", "tall"])
def test_columns_are_within_their_bounds_of_the_exact_path(shape):
    source, tuned = _pair(shape)
    (exact,) = measure(source, tuned, delta="master")
    found = _measure(source, tuned)
    bounded, same, null = _compare(found, exact)
    assert {
        "spectral_norm",
        "stable_rank",
        "top_energy_1",
        "top_energy_16",
        "left_energy_0.01",
        "principal_energy_0.10",
        "hill_exponent_K",
    } <= {*bounded}
    assert {
        "source_frobenius",
        "unchanged_atol_1e-05",
        "unchanged_rms_1e-03",
        "coordinate_energy_0.01",
        "low_magnitude_coverage_0.20",
        "update_density",
    } <= {*same}
    # Beyond the leading 32 of 90, and the masks that a reconstruction of W defines.
    assert {"normalized_spectral_shift", "principal_coverage_0.01"} <= {*null}
    for name in null:
        assert name in found["notes"] or name.endswith(("_chance", "_min", "_max"))
    assert found["notes"].startswith("from the leading 32 singular values")
    identity = ("name", "shape", "group", "delta_dtype")
    assert {k: found[k] for k in identity} == {k: exact[k] for k in identity}


def test_ranges_in_the_notes_hold_the_exact_values():
    source, tuned = _pair(decay=0.97)
    (exact,) = measure(source, tuned, delta="master")
    found = _measure(source, tuned, k=8, depth=2)
    ranges = found["notes"].split("known to lie ")[1].split("; ")[0].split("], ")
    assert len(ranges) > 3
    for part in ranges:
        name, _, ends = part.rstrip("]").partition(" in [")
        low, high = map(float, ends.split(", "))
        assert low * 0.999 <= exact[name] <= high * 1.001, name


def test_a_full_basis_leaves_nothing_out():
    source, tuned = _pair((24, 40), decay=0.9)
    (exact,) = measure(source, tuned, delta="master")
    found = _measure(source, tuned, k=24, block=4, depth=6)
    assert [c for c in _compare(found, exact)[2] if exact[c] is not None] == []


def test_stored_values_and_an_update_without_decay():
    source, tuned = _pair(step=3e-2, rank=3)
    (exact,) = measure(source, tuned)
    found = _measure(source, tuned, delta="stored")
    bounded, _, _ = _compare(found, exact)
    assert {"spectral_norm", "stable_rank", "top_energy_2"} <= {*bounded}


def test_devices_share_the_blocks():
    source, tuned = _pair()
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    one, eight = _measure(source, tuned), _measure(source, tuned, mesh=mesh)
    assert set(one) == set(eight)
    for name, value in one.items():
        if isinstance(value, float) and not name.endswith(BOUND_SUFFIX):
            # Converged numbers agree to rounding, others to their bounds.
            bound = one.get(name + BOUND_SUFFIX, 0.0)
            assert eight[name] == pytest.approx(value, rel=1e-8, abs=bound), name


def test_a_zero_update_and_values_that_are_not_finite():
    source, _ = _pair()
    row = _measure(source, source)
    assert row["delta_frobenius"] == 0
    assert row["notes"].startswith("zero update")
    assert row["stable_rank"] is None
    broken = source.read(NAME).copy()
    broken[3, 5] = np.nan
    row = _measure(source, DictSource({NAME: broken}))
    assert row["notes"].startswith("not finite")
    assert row["delta_frobenius"] is None


def test_a_metric_of_whole_tensors_is_null():
    def flips(x):
        raise AssertionError("not to be traced")

    own = Metric("flips", flips, (Column("flips", Pool.NUMEL),))
    source, tuned = _pair()
    row = _measure(source, tuned, metrics=(*DEFAULT[:2], own))
    assert row["flips"] is None
    assert "not known: flips" in row["notes"]
    assert math.isfinite(row["delta_frobenius"])


def test_a_run_chooses_by_the_shorter_side_and_resumes_to_the_same_bytes(tmp_path):
    source, tuned = _pair((40, 60))
    small = "model.layers.0.self_attn.k_proj.weight"
    sides = [
        DictSource({NAME: side.read(NAME), small: side.read(NAME)[:20].copy()})
        for side in (source, tuned)
    ]
    found = run(*sides, tmp_path, delta="master", max_factor_dim=30, null_seeds=[0])
    large, factored = found.rows
    assert "stable_rank_error_bound" in large
    assert not [name for name in factored if name.endswith(BOUND_SUFFIX)]
    (exact, _) = measure(*sides, delta="master")
    assert measure(*sides, delta="master", max_factor_dim=30) == found.rows
    assert large["spectral_norm"] == pytest.approx(exact["spectral_norm"], rel=1e-6)
    assert found.summary["null"]["gaussian"]["global"]["tensors"] == 2
    text = (tmp_path / "tensors.csv").read_text()
    first, second = csv.DictReader(text.splitlines())
    assert float(first["stable_rank_error_bound"]) == large["stable_rank_error_bound"]
    assert second["stable_rank_error_bound"] == ""
    lines = (tmp_path / "journal.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "journal.jsonl").write_text("".join(lines[:-1]))
    run(*sides, tmp_path, delta="master", max_factor_dim=30, null_seeds=[0])
    assert (tmp_path / "tensors.csv").read_text() == text
    with pytest.raises(ValueError, match="max_factor_dim"):
        run(*sides, tmp_path, delta="master", max_factor_dim=50, null_seeds=[0])
