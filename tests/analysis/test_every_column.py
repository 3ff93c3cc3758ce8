"""Every column against a float64 NumPy oracle, on awkward matrices."""

import math

import ml_dtypes
import numpy as np
import pytest

from geomjax.analysis import DEFAULT, default_metrics, measure
from geomjax.checkpoints import DictSource

BF16 = ml_dtypes.bfloat16
METRICS = default_metrics(mask_rank=5, mask_density=0.3)
FRACTIONS = {"0.01": 0.01, "0.05": 0.05, "0.10": 0.10, "0.20": 0.20}


def _pair(shape, seed, step=2e-3, moved=0.3):
    rng = np.random.default_rng(seed)
    m, n = shape
    r = min(m, n)
    low_rank = rng.standard_normal((m, r)) * np.arange(1, r + 1) ** -0.7
    w = (low_rank @ rng.standard_normal((r, n)) / math.sqrt(r)).astype(BF16)
    d = step * rng.standard_normal(shape) * (rng.random(shape) < moved)
    return w, (w.astype(np.float64) + d).astype(BF16)


def _form(w, w_tuned, delta, subtract):
    if delta == "master":
        w, w_tuned = w.astype(np.float32), w_tuned.astype(np.float32)
    else:
        w, w_tuned = w.astype(BF16), w_tuned.astype(BF16)
    d = w_tuned.astype(np.float32) - w.astype(np.float32)
    if delta == "stored" and subtract == "bfloat16":
        d = d.astype(BF16)
    return (np.asarray(x, np.float64) for x in (w, w_tuned, d))


def _ceil(p, n):
    return min(n, max(1, math.ceil(p * n)))


def _elementwise(w, w_tuned, d, rounded):
    out = {
        "source_frobenius": np.linalg.norm(w),
        "tuned_frobenius": np.linalg.norm(w_tuned),
        "delta_frobenius": np.linalg.norm(d),
        "delta_max_abs": np.abs(d).max(),
        "source_rms": np.sqrt(np.mean(w**2)),
        "delta_rms": np.sqrt(np.mean(d**2)),
        "relative_frobenius": np.linalg.norm(d) / (np.linalg.norm(w) + 1e-12),
        "exact_zero_fraction": np.mean(d == 0),
        "update_density": np.mean(d != 0),
        "update_density_atol_1e-05": np.mean(np.abs(d) > 1e-5),
    }

    def limit(t):
        return float(BF16(t)) if rounded else t

    for e in range(4, 9):
        out[f"unchanged_atol_1e-0{e}"] = np.mean(np.abs(d) <= limit(10.0**-e))
    for e in range(2, 5):
        t = limit(10.0**-e * np.sqrt(np.mean(w**2)))
        out[f"unchanged_rms_1e-0{e}"] = np.mean(np.abs(d) < t)
    a, b = w.astype(BF16), w_tuned.astype(BF16)
    out["bf16_unchanged_fraction"] = np.mean(a == b)
    largest = np.sort(np.abs(d).ravel())[::-1]
    for p in (0.001, 0.01, 0.05):
        top = largest[: _ceil(p, d.size)]
        out[f"coordinate_energy_{p:g}"] = np.sum(top**2) / np.sum(d**2)
    return out


def _spectrum(d):
    s = np.linalg.svd(d, compute_uv=False)
    r = len(s)
    p = s / s.sum()
    out = {
        "spectral_norm": s[0],
        "stable_rank": np.sum(s**2) / s[0] ** 2,
        "entropy_rank": np.exp(-np.sum(p[p > 0] * np.log(p[p > 0]))),
    }
    for e in (4, 5, 6):
        out[f"rank_fraction_1e-0{e}"] = np.mean(s > 10.0**-e * s[0])
    for k in (1, 2, 4, 8, 16, 32, 64):
        out[f"top_energy_{k}"] = np.sum(s[:k] ** 2) / np.sum(s**2)
    k = max(2, r // 10)
    for suffix, size in (("", k), ("_halved", max(2, k // 2)), ("_doubled", 2 * k)):
        size = min(size, r)
        if size >= 2:
            logs = np.log(s[: size - 1] / s[size - 1])
            out[f"hill_exponent_K{suffix}"] = 1 / np.mean(logs)
    return out


def _sines(a, b):
    return np.linalg.svd(b - a @ (a.T @ b), compute_uv=False)


def _geometry(w, w_tuned, d):
    m, n = w.shape
    r = min(m, n)
    u, s, vt = np.linalg.svd(w, full_matrices=False)
    u2, s2, vt2 = np.linalg.svd(w_tuned, full_matrices=False)
    energy = np.sum(d**2)
    out = {}
    for label, p in FRACTIONS.items():
        k = max(1, int(p * r))
        a, b = u[:, :k], vt[:k].T
        out[f"principal_energy_{label}"] = np.sum((a.T @ d @ b) ** 2) / energy
        out[f"left_energy_{label}"] = np.sum((a.T @ d) ** 2) / energy
        out[f"right_energy_{label}"] = np.sum((d @ b) ** 2) / energy
        out[f"principal_energy_{label}_chance"] = k * k / (m * n)
        out[f"left_energy_{label}_chance"] = k / m
        out[f"right_energy_{label}_chance"] = k / n
        out[f"subspace_rotation_{label}"] = _sines(a, u2[:, :k]).mean()
    k = r // 2
    if k:
        for side, a, b in (("left", u, u2), ("right", vt.T, vt2.T)):
            angles = np.degrees(np.arcsin(np.clip(_sines(a[:, :k], b[:, :k]), 0, 1)))
            out[f"principal_angle_max_{side}_deg"] = angles.max()
            out[f"principal_angle_mean_{side}_deg"] = angles.mean()
    moved = np.linalg.norm(s2 - s)
    out["normalized_spectral_shift"] = moved / np.linalg.norm(s)
    out["spectral_shift_to_delta"] = moved / np.sqrt(energy)
    return out


def _tie_range(values, count, inside):
    """Least, mean and greatest number of `inside` among the `count` smallest."""
    order = np.sort(values)
    threshold = order[count - 1]
    below, tied = values < threshold, values == threshold
    wanted = count - below.sum()
    ties, hits = tied.sum(), (tied & inside).sum()
    base = (below & inside).sum()
    least, most = max(0, wanted - (ties - hits)), min(wanted, hits)
    return base + least, base + wanted * hits / ties, base + most


def _coverage(w, d):
    m, n = w.shape
    r = min(m, n)
    u, s, vt = np.linalg.svd(w, full_matrices=False)
    small = np.abs(w).ravel()
    out = {}
    masks = {label: (max(1, int(p * r)), p) for label, p in FRACTIONS.items()}
    masks["r5_0.30"] = (min(5, r), 0.3)
    for label, (k, p) in masks.items():
        count = _ceil(p, w.size)
        rebuilt = np.abs((u[:, :k] * s[:k]) @ vt[:k]).ravel()
        principal = np.zeros(w.size, bool)
        principal[np.argsort(rebuilt)[::-1][:count]] = True
        for support, a in (
            ("", (d != 0).ravel()),
            ("_atol_1e-05", (np.abs(d) > 1e-5).ravel()),
        ):
            total = a.sum()
            low = f"low_magnitude_coverage_{label}{support}"
            name = f"principal_coverage_{label}{support}"
            either = f"nonprincipal_or_low_coverage_{label}{support}"
            out[name] = (principal & a).sum() / total
            out[f"{name}_chance"] = count / w.size
            least, mean, most = _tie_range(small, count, a)
            out[f"{low}_min"], out[low] = least / total, mean / total
            out[f"{low}_max"], out[f"{low}_chance"] = most / total, count / w.size
            outside = (~principal & a).sum()
            least, mean, most = _tie_range(small, count, principal & a)
            out[f"{either}_min"] = (outside + least) / total
            out[either] = (outside + mean) / total
            out[f"{either}_max"] = (outside + most) / total
            everywhere = np.ones(w.size, bool)
            mean = _tie_range(small, count, principal & everywhere)[1]
            out[f"{either}_chance"] = ((~principal).sum() + mean) / w.size
    return out


def _oracle(w, w_tuned, delta, subtract):
    w, w_tuned, d = _form(w, w_tuned, delta, subtract)
    rounded = delta == "stored" and subtract == "bfloat16"
    out = _elementwise(w, w_tuned, d, rounded)
    if w.ndim == 2 and np.any(d):
        out |= _spectrum(d) | _geometry(w, w_tuned, d) | _coverage(w, d)
    return out


CASES = {
    "wide": (40, 96),
    "tall": (96, 40),
    "square": (48, 48),
    "one row": (1, 64),
    "one column": (64, 1),
    "two rows": (2, 50),
}


@pytest.mark.parametrize(
    ("delta", "subtract"),
    [("stored", "bfloat16"), ("stored", "float32"), ("master", "float32")],
)
def test_against_float64(delta, subtract):
    cases = CASES if subtract == "bfloat16" else {"tall": (96, 40)}
    pairs = {name: _pair(shape, i) for i, (name, shape) in enumerate(cases.items())}
    if delta == "master":
        rng = np.random.default_rng(9)
        pairs = {
            name: (w.astype(np.float32), w.astype(np.float32) + 1e-4 * _noise(rng, w))
            for name, (w, _) in pairs.items()
        }
    rows = measure(
        DictSource({name: w for name, (w, _) in pairs.items()}),
        DictSource({name: t for name, (_, t) in pairs.items()}),
        delta=delta,
        subtract=subtract,
        metrics=METRICS,
    )
    names = {column.name for metric in METRICS for column in metric.columns}
    for row in rows:
        expected = _oracle(*pairs[row["name"]], delta, subtract)
        assert set(expected) <= names
        for column in names:
            label = (row["name"], column)
            if column in expected and math.isfinite(expected[column]):
                # A subspace that cannot turn shows rounding noise on both sides.
                assert row[column] == pytest.approx(
                    expected[column], rel=1e-6, abs=1e-13
                ), label
            else:
                assert row[column] is None, label


def _noise(rng, w):
    return rng.standard_normal(w.shape).astype(np.float32)


def test_default_table_has_every_published_column():
    names = [column.name for metric in DEFAULT for column in metric.columns]
    assert len(names) == len(set(names))
    for p in FRACTIONS:
        for stem in ("principal_energy", "left_energy", "subspace_rotation"):
            assert f"{stem}_{p}" in names


def test_awkward_updates():
    rng = np.random.default_rng(3)
    w = rng.standard_normal((24, 32)).astype(BF16)
    broken = w.copy()
    broken[3, 4] = np.nan
    rank_one = (w.astype(np.float32) + np.outer(np.ones(24), np.ones(32))).astype(BF16)
    tuned = {
        "zero": w,
        "rank one": rank_one,
        "broken": broken,
        "from zero": w,
        "repeated": (np.eye(24, 32) * 1.5).astype(BF16),
        "empty": np.zeros((0, 5), np.float32),
        "vector": np.ones(7, np.float32),
        "stack": np.ones((2, 3, 4), np.float32),
    }
    source = tuned | {
        "rank one": w,
        "broken": w,
        "from zero": np.zeros((24, 32), BF16),
        "repeated": np.eye(24, 32).astype(BF16),
        "vector": np.zeros(7, np.float32),
        "stack": np.zeros((2, 3, 4), np.float32),
    }
    rows = {r["name"]: r for r in measure(DictSource(source), DictSource(tuned))}
    of_update = [c.name for m in DEFAULT for c in m.columns if c.of_update]
    assert all(rows["zero"][column] is None for column in of_update)
    assert rows["zero"]["exact_zero_fraction"] == 1
    assert "zero update" in rows["zero"]["notes"]
    assert all(rows["broken"][c.name] is None for m in DEFAULT for c in m.columns)
    assert rows["broken"]["notes"].startswith("not finite")
    # W = 0 has no subspaces, but its update has a spectrum.
    assert rows["from zero"]["stable_rank"] > 1
    assert rows["from zero"]["principal_energy_0.10"] is None
    assert rows["from zero"]["notes"].startswith("undefined")
    # An identity's leading subspaces are not unique; its values are.
    assert rows["repeated"]["principal_energy_0.10"] is None
    assert rows["repeated"]["normalized_spectral_shift"] == pytest.approx(0.5)
    assert rows["repeated"]["stable_rank"] == pytest.approx(24)
    assert rows["repeated"]["hill_exponent_K"] is None
    assert rows["empty"]["notes"] == "empty tensor"
    assert rows["empty"]["numel"] == 0
    assert rows["vector"]["delta_frobenius"] == pytest.approx(7**0.5)
    assert rows["vector"]["stable_rank"] is None
    assert "1 axes" in rows["vector"]["notes"]
    assert rows["stack"]["coordinate_energy_0.01"] == pytest.approx(1 / 24)
    assert rows["rank one"]["top_energy_1"] > 0.99
