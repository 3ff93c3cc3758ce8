"""The trajectory of an update against float64 NumPy, and on bad checkpoints."""

import jax
import ml_dtypes
import numpy as np
import pytest

from geomjax.analysis.measure import solving_device
from geomjax.analysis.trajectory import NOT_FINITE, SIMILARITY_RANK, average, trajectory
from geomjax.checkpoints import DictSource

Q = "model.layers.0.self_attn.q_proj.weight"
UP = "model.layers.0.mlp.up_proj.weight"
SHAPES = {Q: (20, 24), UP: (24, 20)}
LABELS = ("step 1", "step 2", "step 3")
END = f"subspace_similarity_{SIMILARITY_RANK}"


def _bf16(x):
    return np.asarray(x).astype(ml_dtypes.bfloat16)


@pytest.fixture(scope="module")
def sides():
    """W_0 and three checkpoints whose updates grow, in bfloat16."""
    rng = np.random.default_rng(0)
    start = {name: _bf16(rng.standard_normal(s)) for name, s in SHAPES.items()}
    steps, now = [], {k: w.astype(np.float64) for k, w in start.items()}
    for _ in LABELS:
        now = {k: w + 0.1 * rng.standard_normal(w.shape) for k, w in now.items()}
        steps.append({k: _bf16(w) for k, w in now.items()})
    return start, steps


@pytest.fixture(scope="module")
def rows(sides):
    start, steps = sides
    return trajectory(
        DictSource(start), [DictSource(s) for s in steps], LABELS, subtract="float32"
    )


@pytest.mark.parametrize("name", [Q, UP])
def test_columns_equal_numpy(sides, rows, name):
    start, steps = sides
    updates = [
        s[name].astype(np.float64) - start[name].astype(np.float64) for s in steps
    ]
    factors = [np.linalg.svd(d) for d in updates]
    leading = [vh[:SIMILARITY_RANK] for _, _, vh in factors]
    mine = [row for row in rows if row["name"] == name]
    assert [row["checkpoint"] for row in mine] == list(LABELS)
    for t, (row, (_, s, _)) in enumerate(zip(mine, factors, strict=True)):
        assert row["delta_frobenius"] == pytest.approx(np.linalg.norm(s), rel=1e-9)
        rank = np.sum(s**2) / s[0] ** 2
        assert row["stable_rank"] == pytest.approx(rank, rel=1e-9)
        hill = 1 / np.log(s[0] / s[1])  # K = max(2, 20 // 10)
        assert row["hill_exponent_K"] == pytest.approx(hill, rel=1e-7)

        def similarity(other, t=t):
            cosines = leading[t] @ leading[other].T
            return np.sum(cosines**2) / SIMILARITY_RANK

        assert row[END] == pytest.approx(similarity(2), rel=1e-7)
        following = None if t == 2 else pytest.approx(similarity(t + 1), rel=1e-7)
        assert row[f"{END}_next"] == following
        assert row[f"{END}_chance"] == SIMILARITY_RANK / SHAPES[name][1]
        assert row["notes"] == ""


def test_means_are_over_attention_and_over_all(rows):
    means = average(rows)
    attention = [row["stable_rank"] for row in rows if row["name"] == Q]
    assert [p["stable_rank"] for p in means["attention"]] == attention
    both = np.mean(
        [row["stable_rank"] for row in rows if row["checkpoint"] == "step 2"]
    )
    assert means["all"][1]["stable_rank"] == pytest.approx(both)
    assert means["all"][2][f"{END}_next"] is None


def test_what_is_not_finite_or_still_is_null_with_its_reason(sides):
    start, steps = sides
    bad = {k: w.copy() for k, w in steps[1].items()}
    bad[Q][0, 0] = np.nan
    still = steps[0] | {UP: start[UP]}
    rows = trajectory(
        DictSource(start),
        [DictSource(s) for s in (still, bad, steps[2])],
        LABELS,
        subtract="float32",
    )
    found = {(row["name"], row["checkpoint"]): row for row in rows}
    assert found[Q, "step 2"]["notes"] == NOT_FINITE
    assert found[Q, "step 2"]["delta_frobenius"] is None
    assert found[UP, "step 1"]["delta_frobenius"] == 0
    assert found[UP, "step 1"]["stable_rank"] is None
    assert found[UP, "step 1"]["notes"].startswith("zero update")
    assert found[Q, "step 3"]["notes"] == found[UP, "step 2"]["notes"] == ""
    means = average(rows)["all"]
    assert means[1]["stable_rank"] == found[UP, "step 2"]["stable_rank"]


def test_labels_must_fit(sides):
    start, steps = sides
    with pytest.raises(ValueError, match="3 checkpoints and 2 labels"):
        trajectory(DictSource(start), [DictSource(s) for s in steps], LABELS[:2])


def test_eigenproblems_are_solved_on_the_host_of_a_tpu(monkeypatch):
    with jax.default_device(jax.devices()[3]):
        assert _device_of_a_program() == jax.devices()[3]
        monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
        assert _device_of_a_program() == jax.devices()[0]


def _device_of_a_program():
    with solving_device():
        (device,) = jax.jit(lambda x: x + 1)(np.ones(2, np.float32)).devices()
    return device


@pytest.mark.parametrize("change", ["missing", "shape"])
def test_checkpoints_of_different_runs_are_refused(sides, change):
    """One that lacks a matrix of the others, or has it in another shape."""
    start, steps = sides
    other = dict(steps[1])
    if change == "missing":
        del other[UP]
    else:
        other[UP] = other[UP][:, :-1]
    given = [DictSource(s) for s in (steps[0], other, steps[2])]
    with pytest.raises(ValueError, match="step 1 and step 2 hold different tensors"):
        trajectory(DictSource(start), given, LABELS)
