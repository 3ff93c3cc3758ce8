"""Forming D in the three ways, and stacks."""

import ml_dtypes
import numpy as np
import pytest

from geomjax.update import TensorKind, form, form_update, group_by_kind

BF16 = ml_dtypes.bfloat16


def test_three_ways_to_subtract():
    # bfloat16 has 8 bits: 1.00390625 rounds to 1, and 2^-9 beside 3e-5 is lost again.
    w = np.array([1.0, 3.0e-5], np.float32)
    tuned = np.array([1.00390625 + 1e-4, 0.002], np.float32)
    w16, tuned16 = w.astype(BF16).astype(np.float64), tuned.astype(BF16)
    exact = tuned16.astype(np.float64) - w16
    _, _, d = form(w, tuned, delta="stored", subtract="float32")
    np.testing.assert_array_equal(np.asarray(d, np.float64), exact)
    _, _, d = form(w, tuned, delta="stored", subtract="bfloat16")
    rounded = exact.astype(np.float32).astype(BF16)
    np.testing.assert_array_equal(np.asarray(d), rounded)
    assert np.asarray(d, np.float64)[1] != exact[1]
    _, _, d = form(w, tuned, delta="master")
    np.testing.assert_array_equal(np.asarray(d), tuned - w)


def test_storage_hides_small_steps():
    w = np.array([1.0], np.float32)
    tuned = np.array([1 + 1 / 600], np.float32)
    assert form(w, tuned, delta="stored")[2][0] == 0
    assert form(w, tuned, delta="master")[2][0] > 0


def test_update_says_what_it_is():
    update = form_update("x", np.ones((2, 3), BF16), np.zeros((2, 3), np.float32))
    assert update.source_dtype == "bfloat16"
    assert update.tuned_dtype == "float32"
    assert update.delta_dtype == "bfloat16"
    np.testing.assert_array_equal(
        np.asarray(update.delta, np.float32), -np.ones((2, 3))
    )
    with pytest.raises(ValueError, match=r"x: .*\(2, 3\).*\(3,\)"):
        form_update("x", np.ones((2, 3)), np.ones(3))


def test_groups_keep_the_order():
    square, row = TensorKind((2, 2), "f", "f"), TensorKind((2,), "f", "f")
    groups = group_by_kind([("a", square), ("b", row), ("c", square)])
    assert groups == {square: ["a", "c"], row: ["b"]}
