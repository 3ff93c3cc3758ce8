"""The public script of the first paper, on a small pair, column by column.

tests/data/small_pair/peer holds that script's output. Its arithmetic is float32.
"""

import csv
import json
from pathlib import Path

import pytest

from geomjax.analysis import measure, summarize
from geomjax.checkpoints import SafetensorsSource

DATA = Path(__file__).parents[1] / "data" / "small_pair"
PERCENT = {"1pct": "0.01", "5pct": "0.05", "10pct": "0.10", "20pct": "0.20"}


def _peer(name):
    with open(DATA / "peer" / name, newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def rows():
    source = SafetensorsSource(DATA / "source" / "model.safetensors")
    tuned = SafetensorsSource(DATA / "tuned" / "model.safetensors")
    return {row["name"]: row for row in measure(source, tuned)}


def _compare(ours, theirs, rel, label, atol=0.0):
    theirs = float("nan" if theirs == "" else theirs)
    if theirs != theirs:
        assert ours is None, label
    else:
        assert ours == pytest.approx(theirs, rel=rel, abs=atol), label


def test_tensor_columns(rows):
    names = {
        "src_fro_norm": "source_frobenius",
        "opd_fro_norm": "tuned_frobenius",
        "delta_fro_norm": "delta_frobenius",
        "relative_delta_fro": "relative_frobenius",
        "delta_linf_norm": "delta_max_abs",
        "delta_rms": "delta_rms",
        "src_rms": "source_rms",
        "frac_delta_eq_0": "exact_zero_fraction",
        "coord_top_0p1pct_energy_ratio": "coordinate_energy_0.001",
        "coord_top_1pct_energy_ratio": "coordinate_energy_0.01",
        "coord_top_5pct_energy_ratio": "coordinate_energy_0.05",
    }
    for decade in range(4, 9):
        names[f"frac_isclose_zero_atol_1e-{decade}"] = f"unchanged_atol_1e-0{decade}"
    for decade in range(2, 5):
        names[f"frac_abs_delta_lt_1e-{decade}_src_rms"] = f"unchanged_rms_1e-0{decade}"
    peer = _peer("tensor_metrics.csv")
    assert len(peer) == len(rows)
    for theirs in peer:
        ours = rows[theirs["name"]]
        assert ours["shape"] == json.loads(theirs["shape"])
        for column, name in names.items():
            label = (theirs["name"], name)
            _compare(ours[name], theirs[column], 1e-4, label)


def test_spectra(rows):
    names = {
        "spectral_norm": "spectral_norm",
        "stable_rank": "stable_rank",
        "effective_rank_entropy": "entropy_rank",
        "rank_pct_tol_1e_6": "rank_fraction_1e-06",
        "rank_pct_tol_1e_5": "rank_fraction_1e-05",
        "rank_pct_tol_1e_4": "rank_fraction_1e-04",
    }
    names |= {f"top{k}_energy_ratio": f"top_energy_{k}" for k in (1, 2, 4, 8, 16, 64)}
    for theirs in _peer("svd_metrics.csv"):
        for column, name in names.items():
            # Its constant beside sigma_1^2 shifts the stable rank of small updates.
            rel = 3e-4 if name == "stable_rank" else 1e-4
            label = (theirs["name"], name)
            _compare(rows[theirs["name"]][name], theirs[column], rel, label)


def test_source_geometry(rows):
    for theirs in _peer("base_geometry_metrics.csv"):
        ours = rows[theirs["name"]]
        for column, p in PERCENT.items():
            for stem, name, rel in (
                ("principal", f"principal_energy_{p}", 2e-3),
                ("left_principal", f"left_energy_{p}", 1e-4),
                ("right_principal", f"right_energy_{p}", 1e-4),
            ):
                rel = rel if p in ("0.01", "0.05") else 1e-4
                value = theirs[f"{stem}_projection_energy_ratio_{column}"]
                if theirs["skipped_reason"] == "zero_delta":
                    assert ours[name] is None
                else:
                    _compare(ours[name], value, rel, (theirs["name"], name))
        if theirs["skipped_reason"] != "zero_delta":
            for column, name in (
                ("spectral_drift_l2_ratio", "normalized_spectral_shift"),
                ("spectral_drift_to_delta_fro_ratio", "spectral_shift_to_delta"),
            ):
                _compare(ours[name], theirs[column], 5e-3, (theirs["name"], name))


def test_mask_coverage(rows):
    for theirs in _peer("mask_overlap_metrics.csv"):
        ours = rows[theirs["name"]]
        support = "" if float(theirs["update_mask_atol"]) == 0 else "_atol_1e-05"
        density = f"update_density{support}"
        _compare(ours[density], theirs["update_density"], 1e-9, density)
        if int(theirs["update_count"]) == 0:
            continue
        for column, p in PERCENT.items():
            for stem, name, rel in (
                ("principal", "principal_coverage", 1e-4),
                ("low_magnitude", "low_magnitude_coverage", 5e-3),
                ("nonprincipal_or_low", "nonprincipal_or_low_coverage", 5e-3),
            ):
                full = f"{name}_{p}{support}"
                label = (theirs["name"], full)
                value = float(theirs[f"{stem}_{column}_update_overlap_ratio"])
                _compare(ours[full], value, rel, label)
                chance = theirs[f"{stem}_{column}_density"]
                _compare(ours[f"{full}_chance"], chance, 1e-3, label)
                if name != "principal_coverage":
                    least, most = ours[f"{full}_min"], ours[f"{full}_max"]
                    assert least - 1e-12 <= value <= most + 1e-12, label


def test_pooled_by_count_and_energy(rows):
    summary = summarize(rows.values())
    peer = _peer("tensor_metrics.csv")
    numel = sum(int(row["numel"]) for row in peer)
    unchanged = sum(
        float(row["frac_isclose_zero_atol_1e-5"]) * int(row["numel"]) for row in peer
    )
    total = summary["global"]
    assert total["unchanged_atol_1e-05"] == pytest.approx(unchanged / numel, rel=1e-9)
    moved = sum(float(row["delta_energy"]) for row in peer) ** 0.5
    size = sum(float(row["src_energy"]) for row in peer) ** 0.5
    assert total["relative_frobenius"] == pytest.approx(moved / size, rel=1e-6)
    shares = [part["energy_share"] for part in summary["groups"].values()]
    assert sum(shares) == pytest.approx(1)
    assert set(summary["layers"]) == {"0", "1"}
    values = [
        row["stable_rank"] for row in rows.values() if row["stable_rank"] is not None
    ]
    assert total["matrices"] == len(values)
    assert total["mean"]["stable_rank"] == pytest.approx(sum(values) / len(values))
