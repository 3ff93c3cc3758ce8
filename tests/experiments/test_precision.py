"""The share of the number format: nulls by hand, and a small study."""

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

from experiments import precision
from experiments.common.outcome import Outcome
from experiments.precision import Arm, claims, format_plot, format_table
from experiments.studies.measured import Measured
from experiments.studies.nulls import NULLS, null_tensor, stored_figures
from geomjax.analysis import DEFAULT, measure, summarize
from geomjax.checkpoints import DictSource

STEP = 2.0**-7  # The unit in the last place of bfloat16 from 1 to 2.


@pytest.fixture
def pair():
    """bfloat16 weights of which many are equal in size, and a small float32 update."""
    generator = np.random.default_rng(0)
    drawn = generator.standard_normal((2, 40, 30)) * [[[0.1]], [[0.0005]]]
    before = drawn[0].astype(ml_dtypes.bfloat16).astype(np.float32)
    before = np.round(before * 32) / 32
    return before, (before + drawn[1]).astype(np.float32)


def test_a_dense_null_has_the_norm_and_no_zero(pair):
    before, after = pair
    moved = null_tensor("dense", "w", before, after, 0)
    norm = np.linalg.norm((after - before).astype(np.float64))
    assert np.linalg.norm((moved - before).astype(np.float64)) == pytest.approx(norm)
    assert np.count_nonzero(moved - before) == before.size


def test_a_shuffled_null_has_the_same_entries_elsewhere():
    before = np.zeros((20, 10), np.float32)
    after = np.arange(200, dtype=np.float32).reshape(20, 10)
    moved = null_tensor("shuffled", "w", before, after, 0)
    assert sorted(moved.ravel()) == sorted(after.ravel())
    assert np.mean(moved != after) > 0.9


@pytest.mark.parametrize("how", NULLS)
def test_nulls_depend_on_seed_and_name_alone(pair, how):
    first = null_tensor(how, "w", *pair, 0)
    np.testing.assert_array_equal(first, null_tensor(how, "w", *pair, 0))
    assert (first != null_tensor(how, "w", *pair, 1)).any()
    assert (first != null_tensor(how, "v", *pair, 0)).any()
    with pytest.raises(ValueError, match="null 'flat'; known: dense, shuffled"):
        null_tensor("flat", "w", *pair, 0)


def test_figures_of_a_matrix_by_hand():
    """Ten weights of 1 to 2 and ten a hundred times smaller, moved by 0.3 units."""
    before = np.full((2, 10), 1.0, np.float32)
    before[1] /= 128
    after = before + np.float32(0.3 * STEP)  # Lost at 1, 38 units at 1/128.
    got = stored_figures({"w": before}, {"w": after})
    # The tenth has room for 2 of the 10 equal small weights, all of which changed.
    assert got == {
        "bf16_unchanged_fraction": 0.5,
        "low_magnitude_coverage_0.10": pytest.approx(2 / 10),
    }
    still = stored_figures({"w": before}, {"w": before})
    assert still["low_magnitude_coverage_0.10"] is None


def test_figures_are_the_columns_of_the_analysis(pair):
    """Ties, two matrices and a vector."""
    before, after = pair
    tensors = (
        {"a": before, "b": before[:7] * 3, "c": before[0]},
        {"a": after, "b": after[:7] * 3, "c": after[0]},
    )
    source, tuned = (
        DictSource({n: x.astype(ml_dtypes.bfloat16) for n, x in side.items()})
        for side in tensors
    )
    names = ("norms", "bf16_unchanged", "update_density", "mask_coverage")
    metrics = tuple(metric for metric in DEFAULT if metric.name in names)
    expected = summarize(measure(source, tuned, metrics=metrics), metrics)["global"]
    got = stored_figures(*tensors)
    assert 0.05 < got["bf16_unchanged_fraction"] < 0.95
    for column, value in got.items():
        assert value == pytest.approx(expected[column], rel=1e-12), column


# --- claims, of arms made by hand ---------------------------------------------------


def arm(regime, rate, stored, unchanged, unmoved, dense, accuracy):
    """Three seeds; figures as given but for a little spread, alike in all."""
    spread = (-1e-3, 0.0, 1e-3)
    rows = [
        {"kind": "eval", "step": i, "test_accuracy": a, "validation_reverse_kl": 1.0}
        for i, a in enumerate((0.3, accuracy))
    ]
    runs = [Outcome(seed, rate, Path(), 1.0, None, 1.0, 0.0, rows) for seed in range(3)]

    def summaries(column, value):
        low = {precision.LOW: 0.3, f"{precision.LOW}_chance": 0.1}
        return [{"global": {column: value + s, **low}} for s in spread]

    kinds = {
        "stored": summaries(precision.UNCHANGED, unchanged),
        "master": summaries(precision.ZERO, unmoved),
    }
    nulls = {
        how: [{precision.UNCHANGED: dense + s, precision.LOW: 0.2} for s in spread]
        for how in NULLS
    }
    return Arm(regime, rate, stored, Measured(runs, kinds, [], ()), nulls)


def by_claim(arms):
    return {verdict.claim: verdict for verdict in claims(arms)}


ARMS = {
    "opd_1e-6": arm("opd", 1e-6, "float32", 0.9, 0.1, 0.85, 0.32),
    "opd_1e-5": arm("opd", 1e-5, "float32", 0.6, 0.1, 0.6, 0.40),
    "opd_1e-5_nearest": arm("opd", 1e-5, "nearest", 0.95, 0.95, 0.95, 0.33),
    "opd_1e-5_stochastic": arm("opd", 1e-5, "stochastic", 0.4, 0.4, 0.4, 0.39),
    "rlvr_1e-5": arm("rlvr", 1e-5, "float32", 0.7, 0.2, 0.8, 0.35),
    "sft_1e-5": arm("sft", 1e-5, "float32", 0.3, 0.1, 0.3, 0.50),
}


def test_claims_are_judged_by_the_figures():
    found = by_claim(ARMS)
    assert len(found) == 2 * 4 + 1 + 4 + 4
    verdicts = {
        "OPD at 1e-06 leaves half of the weights unchanged in bfloat16": (0.9, True),
        "Check: most weights that look unchanged after OPD at 1e-06 moved": (
            8 / 9,
            True,
        ),
        "OPD's update at 1e-06 looks sparser than a dense one of its norm": (
            0.05,
            True,
        ),
        "OPD's update at 1e-05 looks sparser than a dense one of its norm": (
            0.0,
            None,
        ),
        "OPD at 1e-05 prefers small weights by more than the format does": (0.1, True),
        "Check: the lower the learning rate, the sparser OPD's update looks": (
            0.3,
            True,
        ),
        "Without masters, rounding to nearest makes the update at 1e-05 sparser": (
            0.35,
            True,
        ),
        "Stochastic rounding leaves fewer weights unchanged at 1e-05": (0.2, True),
        "Rounding to nearest costs accuracy at 1e-05": (0.07, True),
        "Stochastic rounding keeps the accuracy at 1e-05": (0.01, True),
        "RLVR at 1e-05 leaves more weights unchanged than OPD": (0.1, True),
        "RLVR at 1e-05 is sparser than OPD beyond what their norms explain": (
            -0.1,
            False,
        ),
        "OPD at 1e-05 leaves more weights unchanged than SFT": (0.3, True),
    }
    for claim, (mean, holds) in verdicts.items():
        assert found[claim].estimate.mean == pytest.approx(mean, abs=1e-6), claim
        assert found[claim].holds is holds, claim


def test_accuracy_is_kept_only_where_there_was_more_to_lose():
    arms = {
        "opd_1e-5": arm("opd", 1e-5, "float32", 0.6, 0.1, 0.6, 0.31),
        "opd_1e-5_nearest": arm("opd", 1e-5, "nearest", 0.95, 0.95, 0.95, 0.3),
        "opd_1e-5_stochastic": arm("opd", 1e-5, "stochastic", 0.4, 0.4, 0.4, 0.31),
    }
    kept = by_claim(arms)["Stochastic rounding keeps the accuracy at 1e-05"]
    assert kept.samples == (None, None, None)
    assert kept.holds is None


def test_a_model_whose_weights_all_changed_has_nothing_hidden():
    whole = arm("opd", 1e-4, "float32", 0.0, 0.0, 0.0, 0.4)
    whole.measured.summaries["stored"][0]["global"][precision.UNCHANGED] = 0.0
    assert whole.hidden()[0] is None


def test_table_and_figure_show_every_arm_and_rate():
    table = format_table(ARMS)
    assert [row[0] for row in table.rows] == list(ARMS)
    assert table.rows[0][1].mean == pytest.approx(0.9)
    figure = format_plot(ARMS).figure
    labels = {line.get_label() for line in figure.axes[0].get_lines()}
    assert {"float32 masters", "nearest rounding", "stochastic rounding"} <= labels
    assert "dense null of the masters' norm" in labels


# --- a small study ------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(smoke):
    return smoke.run("precision")


@pytest.mark.slow
def test_weights_are_stored_as_the_arm_says(finished):
    workdir, record = finished

    def rounded(name, seed=0):
        folder = workdir / "arms" / name / f"seed_{seed}" / "final"
        tensors = load_file(folder / "model.safetensors")
        same = [
            (x.astype(ml_dtypes.bfloat16).astype(np.float32) == x).mean()
            for x in tensors.values()
        ]
        return min(same)

    assert rounded("opd_1e-5") < 0.5
    assert rounded("opd_1e-5_nearest") == rounded("opd_1e-5_stochastic") == 1.0
    assert set(record["compilations"].values()) == {1}
    assert {
        "learn distill, stored by nearest rounding",
        "learn distill, stored by stochastic rounding",
    } <= set(record["compilations"])


@pytest.mark.slow
def test_the_record_splits_the_sparsity(finished):
    workdir, record = finished
    assert json.loads((workdir / "results.json").read_text()) == record
    formats = record["formats"]
    assert set(formats) == {"opd_1e-5", "opd_1e-5_nearest", "opd_1e-5_stochastic"}
    masters, nearest = formats["opd_1e-5"], formats["opd_1e-5_nearest"]
    for seed in (0, 1):
        assert masters["unmoved"][seed] < masters["unchanged"][seed]
        assert nearest["unmoved"][seed] == nearest["unchanged"][seed]
        assert nearest["unchanged"][seed] > masters["unchanged"][seed]
        dense = masters["nulls"]["dense"][precision.UNCHANGED][seed]
        assert 0 < dense < 1
    assert len(record["claims"]) == 8
    text = (workdir / "report.md").read_text()
    assert "What is unchanged, and why" in text
    assert {path.stem for path in (workdir / "figures").iterdir()} == {
        "accuracy",
        "formats",
    }
