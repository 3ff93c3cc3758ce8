"""Overlap of two updates against the public script, and on bad tensors."""

import csv
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from geomjax.analysis.overlap import MaskCounts, describe, overlap, summarize_overlap
from geomjax.checkpoints import DictSource, open_source

DATA = Path(__file__).parents[1] / "data" / "small_pair"
Q = "model.layers.{}.self_attn.q_proj.weight"


def _peer(name):
    with open(DATA / "peer" / name, newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def rows():
    sides = [open_source(str(DATA / name)) for name in ("source", "tuned", "tuned_b")]
    return overlap(*sides)


def test_tensors_equal_the_public_script(rows):
    found = {row["name"]: row for row in rows}
    peer = _peer("tensor_overlap.csv")
    assert {row["name"] for row in peer} == set(found)
    for theirs in peer:
        ours = found[theirs["name"]]
        counts = [int(theirs[f"{c}_nonzero"]) for c in ("a", "b", "both")]
        assert [ours["a"], ours["b"], ours["both"]] == counts, theirs["name"]
        assert ours["numel"] == int(theirs["numel"])


def test_chunks_add_up(rows, monkeypatch):
    monkeypatch.setattr("geomjax.analysis.overlap.CHUNK", 1000)
    sides = [open_source(str(DATA / name)) for name in ("source", "tuned", "tuned_b")]
    assert overlap(*sides) == rows


def test_pooled_levels_equal_the_public_script(rows):
    (theirs,) = _peer("one_sided_overlap_global.csv")
    ours = summarize_overlap(rows)["global"]
    for column, name in (
        ("covered_by_b", "a_nonzero_covered_by_b"),
        ("covered_by_b_chance", "random_a_nonzero_covered_by_b"),
        ("covered_by_a", "b_nonzero_covered_by_a"),
        ("covered_by_a_chance", "random_b_nonzero_covered_by_a"),
        ("jaccard", "nonzero_jaccard"),
        ("jaccard_chance", "random_nonzero_jaccard"),
        ("lift", "both_nonzero_over_random"),
    ):
        assert ours[column] == pytest.approx(float(theirs[name]), rel=1e-9), column


def test_the_tolerance_is_rounded_with_the_difference():
    """The bfloat16 next to 1e-5 lies above it, and counts as unmoved in bfloat16."""
    w = np.zeros((1, 2), ml_dtypes.bfloat16)
    step = np.array([[1e-5, 1.1e-5]]).astype(ml_dtypes.bfloat16)
    sides = [DictSource({Q.format(0): x}) for x in (w, step, step)]
    assert overlap(*sides)[0]["a"] == 1
    assert overlap(*sides, subtract="float32")[0]["a"] == 2


def test_parts_add_up_to_the_whole(rows):
    summary = summarize_overlap(rows)
    whole = summary["global"]
    for parts in (summary["groups"], summary["modules"]):
        moved = sum(part["a_density"] * part["numel"] for part in parts.values())
        assert moved == pytest.approx(whole["a_density"] * whole["numel"])
    assert sorted(summary["layers"], key=int) == ["0", "1"]


def test_independent_masks_are_at_chance():
    found = describe(MaskCounts(numel=1000, a=200, b=100, both=20))
    assert found["covered_by_b"] == found["covered_by_b_chance"] == 0.1
    assert found["covered_by_a"] == found["covered_by_a_chance"] == 0.2
    assert found["jaccard"] == pytest.approx(found["jaccard_chance"])
    assert found["lift"] == 1.0
    empty = describe(MaskCounts(numel=10, a=0, b=5, both=0))
    assert (empty["covered_by_b"], empty["covered_by_a"], empty["lift"]) == (
        None,
        0,
        None,
    )


def test_a_tensor_that_is_not_finite_is_in_no_count():
    rng = np.random.default_rng(0)
    w = {Q.format(i): rng.standard_normal((4, 6)) for i in range(2)}

    def side(bad=None):
        out = {k: (x + rng.standard_normal(x.shape)) for k, x in w.items()}
        if bad is not None:
            out[Q.format(0)][1, 2] = bad
        return DictSource({k: x.astype(ml_dtypes.bfloat16) for k, x in out.items()})

    source = DictSource({k: x.astype(ml_dtypes.bfloat16) for k, x in w.items()})
    for sides in ((side(np.nan), side()), (side(), side(-np.inf))):
        rows = overlap(source, *sides)
        assert [row["both"] is None for row in rows] == [True, False]
        assert rows[0]["covered_by_b"] is None
        summary = summarize_overlap(rows)
        assert summary["not_finite"] == [Q.format(0)]
        assert summary["global"]["numel"] == 24
        assert summary["global"]["covered_by_b"] == rows[1]["covered_by_b"]
