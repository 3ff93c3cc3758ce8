"""The geometry benchmark: its pair, its watch over processes, its comparison."""

import csv
import sys

import numpy as np
import pytest

from experiments import bench_geometry
from experiments.geometry_bench import large, phases
from experiments.geometry_bench import pair as pairs
from experiments.geometry_bench.process import watch
from geomjax.checkpoints import match, open_source

SMALL = pairs.Shapes(
    hidden=32,
    ffn=48,
    heads=4,
    kv_heads=2,
    head_dim=16,
    layers=2,
    vocab=40,
    tied=False,
)


def test_default_shapes_are_those_of_the_71_million_pair():
    shapes = pairs.Shapes(1024, 3072, 16, 8, 128, 4, 4096, False)
    matrices = shapes.matrices()
    block = {
        name.split(".")[-2]: shape for name, shape in matrices.items() if ".0." in name
    }
    assert block == {
        "q_proj": (2048, 1024),
        "k_proj": (1024, 1024),
        "v_proj": (1024, 1024),
        "o_proj": (1024, 2048),
        "gate_proj": (3072, 1024),
        "up_proj": (3072, 1024),
        "down_proj": (1024, 3072),
    }
    entries = sum(np.prod(shape) for shape in matrices.values())
    assert entries == pytest.approx(71e6, rel=0.01)
    assert len(matrices) + len(shapes.norms()) == 47


def test_pair_can_be_opened_and_has_moved(tmp_path):
    folder = pairs.write(tmp_path, SMALL)
    source, tuned = open_source(folder / "source"), open_source(folder / "tuned")
    matched = match(source, tuned).matched
    shapes = {item.name: item.shape for item in matched}
    assert shapes == SMALL.matrices() | {n: (s,) for n, s in SMALL.norms().items()}
    name = "model.layers.1.mlp.down_proj.weight"
    moved = np.mean(source.read(name) != tuned.read(name))
    assert 0 < moved < 1


def test_watch_sees_memory_and_the_file_on_the_way(tmp_path):
    path = tmp_path / "tables"
    code = (
        "import time, pathlib; time.sleep(0.2)\n"
        f"pathlib.Path({str(path)!r}).touch()\n"
        "held = bytearray(b'x') * (200 << 20); time.sleep(0.5)"
    )
    whole, tables = watch([sys.executable, "-c", code], until=path)
    assert tables.seconds < whole.seconds
    if sys.platform == "linux":
        assert whole.anonymous > 200 << 20 > tables.anonymous > 0
        assert whole.resident >= whole.anonymous
    fails = "import sys; print('went wrong', file=sys.stderr); sys.exit(3)"
    with pytest.raises(ValueError, match=r"(?s)status 3.*went wrong"):
        watch([sys.executable, "-c", fails], until=None)


def _write(path, rows):
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def test_compare_finds_the_largest_difference(tmp_path):
    theirs = {
        name: {column: 2.0 for column in columns}
        for name, columns in bench_geometry.COMMON.items()
    }
    theirs["svd_metrics.csv"]["spectral_norm"] = 2.02
    ours = {
        own: 2.0
        for columns in bench_geometry.COMMON.values()
        for own in columns.values()
    }
    _write(tmp_path / "tensors.csv", [{"name": "a", **ours}])
    for name, row in theirs.items():
        _write(tmp_path / name, [{"name": "a", **row}])
    worst, label = bench_geometry.compare(tmp_path / "tensors.csv", tmp_path)
    assert worst == pytest.approx(0.01)
    assert label == "a spectral_norm"
    _write(tmp_path / "tensors.csv", [{"name": "a", **dict.fromkeys(ours, "")}])
    with pytest.raises(ValueError, match="no value in common"):
        bench_geometry.compare(tmp_path / "tensors.csv", tmp_path)


def test_phases_are_all_there(tmp_path):
    folder = pairs.write(tmp_path, SMALL._replace(layers=1))
    text = phases.describe(folder / "source", folder / "tuned", tmp_path / "out")
    lines = text.splitlines()[2:]
    names = ["read", "gram", "factor", "angles and masks", "write", "all"]
    assert [line[:16].strip() for line in lines] == names
    seconds = [float(line[16:22]) for line in lines]
    assert seconds[-1] == pytest.approx(sum(seconds[:-1]), abs=0.05)
    assert seconds[-1] > 0


def test_large_pair_has_the_spectrum_it_is_compared_with(tmp_path):
    pair = large.write_pair(tmp_path, 40)
    sides = [open_source(folder).read(large.NAME) for folder in pair[:2]]
    d = sides[1].astype(np.float64) - sides[0]
    found = np.linalg.svd(d, compute_uv=False)
    np.testing.assert_allclose(found, pair.values, rtol=0, atol=1e-6)
    known = large.truth(pair.values)
    row = dict.fromkeys(known) | {"notes": "", "spectral_norm": 0.1001}
    with pytest.raises(ValueError, match="further off than bounded: .*spectral_norm"):
        large.compare(row, known)
    row["spectral_norm_error_bound"] = 2e-4
    assert any("null" in line for line in large.compare(row, known))
