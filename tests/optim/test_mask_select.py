"""Exact counts, exact ties, and draws that are uniform and repeatable."""

import itertools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from geomjax.optim import (
    mask_select,
    matched_random_mask,
    random_mask,
    threshold_mask,
    top_fraction_mask,
)


def _flat(tree):
    return np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)])


def _top_by_sorting(values, count):
    """A stable sort, so that the earlier of two equal values comes first."""
    order = np.argsort(-values.astype(np.float64), kind="stable")
    mask = np.zeros(values.size, bool)
    mask[order[:count]] = True
    return mask


def _floats(width):
    return st.floats(allow_nan=False, allow_infinity=False, width=width)


@settings(deadline=None, max_examples=60)
@given(
    values=hnp.arrays(np.float32, st.integers(1, 40), elements=_floats(32))
    | hnp.arrays(np.float32, 30, elements=st.sampled_from([0.0, -0.0, 1.0, -1.0])),
    permille=st.integers(1, 1000),
)
def test_top_fraction_equals_a_stable_sort(values, permille):
    count = -(-values.size * permille // 1000)
    split = values.size // 3
    tree = {"a": values[:split], "b": {"c": values[split:]}}
    top = top_fraction_mask(tree, permille / 1000)
    np.testing.assert_array_equal(_flat(top.mask), _top_by_sorting(values, count))
    assert top.selected == count
    assert top.threshold == np.sort(values)[-count]


def test_top_fraction_in_small_chunks(draw, monkeypatch):
    """Ties across leaves and across chunks go to the earlier coordinate."""
    monkeypatch.setattr(mask_select, "_CHUNK", 5)
    scores = jax.tree.map(lambda x: jnp.round(jnp.abs(x)), draw(0))
    top = top_fraction_mask(scores, 0.4)
    values = _flat(scores)
    count = -(-values.size * 2 // 5)
    np.testing.assert_array_equal(_flat(top.mask), _top_by_sorting(values, count))


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16])
def test_half_precision_scores(draw, dtype):
    scores = jax.tree.map(lambda x: np.abs(np.asarray(x)).astype(dtype), draw(0))
    top = top_fraction_mask(scores, 0.175)
    values = _flat(scores).astype(np.float32)
    count = int(np.ceil(0.175 * values.size))
    np.testing.assert_array_equal(_flat(top.mask), _top_by_sorting(values, count))


@pytest.mark.parametrize(
    ("density", "size", "count"),
    [(0.175, 40, 7), (0.1, 30, 3), (0.07, 100, 7), (1e-9, 5, 1), (1.0, 5, 5)],
)
def test_the_density_is_the_decimal_that_was_written(density, size, count):
    """In binary 0.07 * 100 is above 7, whose ceiling would be 8."""
    scores = {"w": np.arange(size, dtype=np.float32)}
    assert top_fraction_mask(scores, density).mask["w"].sum() == count
    key = jax.random.key(0)
    assert random_mask(key, scores, density)["w"].sum() == count


def test_threshold_is_strict_and_compared_in_float32():
    """1e-5 rounded to bfloat16 is above itself, so a bfloat16 comparison differs."""
    threshold = 1.0
    delta = np.array([1.0, -1.0, 1.0078125, -1.0078125, 0.0], ml_dtypes.bfloat16)
    mask = threshold_mask({"w": delta}, threshold)["w"]
    assert mask.tolist() == [False, False, True, True, False]
    rounded = np.array([1e-5], ml_dtypes.bfloat16)
    assert float(rounded[0]) > 1e-5
    assert threshold_mask({"w": rounded}, 1e-5)["w"].tolist() == [True]


def test_threshold_mask_of_jax_arrays(draw):
    delta = draw(0)
    mask = threshold_mask(delta, 0.5)
    jax.tree.map(
        lambda m, d: np.testing.assert_array_equal(m, np.abs(d) > np.float32(0.5)),
        mask,
        delta,
    )


def test_random_mask_is_a_function_of_the_key(draw):
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), draw(0))
    first, again, other = (
        random_mask(jax.random.key(seed), like, 0.3) for seed in (1, 1, 2)
    )
    jax.tree.map(np.testing.assert_array_equal, first, again)
    assert (_flat(first) != _flat(other)).any()
    assert _flat(first).sum() == _flat(other).sum() == -(-3 * _flat(first).size // 10)


def test_random_mask_stays_what_it_was():
    """A stored experiment is repeatable only if the stream never changes."""
    mask = random_mask(jax.random.key(7), {"w": np.zeros(32)}, 0.25)["w"]
    assert np.flatnonzero(mask).tolist() == [2, 9, 14, 17, 25, 27, 30, 31]


def test_random_mask_is_uniform_over_subsets():
    """All 10 pairs out of 5 coordinates in two leaves, 2,000 draws."""
    like = {"a": np.zeros(2), "b": np.zeros(3)}
    counts = dict.fromkeys(itertools.combinations(range(5), 2), 0)
    draws = 2000
    for seed in range(draws):
        mask = _flat(random_mask(jax.random.key(seed), like, 0.4))
        counts[tuple(np.flatnonzero(mask).tolist())] += 1
    expected = draws / 10
    chi_square = sum((n - expected) ** 2 / expected for n in counts.values())
    assert chi_square < 27.9  # exceeded by chance once in 1,000 (9 degrees)


def test_random_mask_in_small_chunks(monkeypatch):
    """Chunks draw from streams of their own: no pattern repeats between them."""
    monkeypatch.setattr(mask_select, "_CHUNK", 64)
    mask = random_mask(jax.random.key(0), {"w": np.zeros(64 * 40)}, 0.5)["w"]
    assert mask.sum() == 64 * 20
    rows = mask.reshape(40, 64)
    assert len(np.unique(rows, axis=0)) == 40
    assert abs(np.corrcoef(rows) - np.eye(40)).max() < 0.6


def test_matched_mask_has_the_same_count_in_every_layer(draw_mask, roles):
    mask = draw_mask(0, density=0.3)
    up = mask["layers"]["mlp"]["up_proj"]["weight"]
    mask["layers"]["mlp"]["up_proj"]["weight"] = up.at[0].set(False).at[2].set(True)
    matched = matched_random_mask(jax.random.key(0), mask, roles)
    for path, role in roles.items():
        own, drawn = mask, matched
        for key in path:
            own, drawn = own[key], drawn[key]
        axes = tuple(range(role.stack_depth, own.ndim))
        np.testing.assert_array_equal(drawn.sum(axes), np.asarray(own).sum(axes))
    drawn = matched["layers"]["mlp"]["up_proj"]["weight"]
    assert not drawn[0].any()
    assert drawn[2].all()
    assert (_flat(matched) != _flat(mask)).any()


def test_matched_layers_are_drawn_independently(roles):
    role = {("w",): roles["layers", "mlp", "up_proj", "weight"]}
    mask = {"w": np.tile(np.arange(400).reshape(20, 20) % 2 == 0, (3, 1, 1))}
    matched = matched_random_mask(jax.random.key(0), mask, role)["w"].reshape(3, 400)
    assert abs(np.corrcoef(matched) - np.eye(3)).max() < 0.25
    assert abs(np.corrcoef(matched[0], mask["w"][0].ravel())[0, 1]) < 0.25


def test_parts_that_are_none_stay_so(draw, roles):
    scores = jax.tree.map(jnp.abs, draw(0))
    scores["embed_tokens"] = None
    top = top_fraction_mask(scores, 0.5)
    drawn = random_mask(jax.random.key(0), scores, 0.5)
    matched = matched_random_mask(jax.random.key(0), top.mask, roles)
    for mask in (top.mask, drawn, matched, threshold_mask(scores, 0.1)):
        assert mask["embed_tokens"] is None
    size = _flat(scores).size
    assert _flat(top.mask).sum() == _flat(drawn).sum() == -(-size // 2)


@pytest.mark.parametrize("density", [0.0, -0.1, 1.1, float("nan")])
def test_densities_out_of_range(density):
    scores = {"w": np.ones(3, np.float32)}
    with pytest.raises(ValueError, match="density: got"):
        top_fraction_mask(scores, density)
    with pytest.raises(ValueError, match="density: got"):
        random_mask(jax.random.key(0), scores, density)


def test_bad_scores_are_listed():
    scores = {
        "a": np.array([1.0, np.nan], np.float32),
        "b": np.ones(2, np.int32),
        "c": np.ones(2, np.float32),
        "d": np.ones(2, np.float64),
        "e": np.array([np.inf], np.float32),
    }
    for call in (
        lambda: top_fraction_mask(scores, 0.5),
        lambda: threshold_mask(scores, 0.5),
    ):
        with pytest.raises(ValueError, match="cannot be selected from") as error:
            call()
        lines = str(error.value).splitlines()[1:]
        assert [line.strip()[0] for line in lines] == ["a", "b", "d", "e"]


def test_other_bad_arguments(roles, draw):
    with pytest.raises(ValueError, match="threshold: got -1"):
        threshold_mask({"w": np.ones(2, np.float32)}, -1.0)
    with pytest.raises(ValueError, match="no coordinates"):
        random_mask(jax.random.key(0), {}, 0.5)
    with pytest.raises(ValueError, match=r"norm\.weight: got float32, expected bool"):
        matched_random_mask(jax.random.key(0), draw(0), roles)
