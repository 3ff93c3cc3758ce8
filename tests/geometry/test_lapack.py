"""Eigenproblems on the host against NumPy, on awkward spectra."""

import numpy as np
import pytest

from geomjax.geometry import lapack


def _matrices():
    rng = np.random.default_rng(0)
    turn = np.linalg.qr(rng.standard_normal((60, 60)))[0]
    x = rng.standard_normal((60, 90))
    return {
        "gram": x @ x.T,
        "indefinite": x[:, :60] + x[:, :60].T,
        "rank one": np.outer(x[:, 0], x[:, 0]),
        "repeated": (turn * np.repeat([3.0, 2.0, 1.0], 20)) @ turn.T,
        "decaying": (turn * 0.6 ** np.arange(60)) @ turn.T,
        "tiny": 1e-250 * (x @ x.T),
        "huge": 1e250 * (x @ x.T),
        "diagonal": np.diag(x[0, :60]),
        "one": np.array([[2.5]]),
        "two": np.array([[2.0, 1.0], [1.0, 2.0]]),
    }


@pytest.mark.parametrize("name", _matrices())
def test_values_and_leading_vectors(name):
    a = _matrices()[name]
    r, size = len(a), np.abs(a).max()
    expected = np.linalg.eigvalsh(a / size)[::-1] * size
    bound = 1e-13 * r * size
    lower = np.tril(a)
    np.testing.assert_allclose(lapack.eigenvalues(lower), expected, rtol=0, atol=bound)
    for k in {1, (r + 1) // 2, r}:
        values, vectors = lapack.eigenpairs(np.tril(a), k)
        np.testing.assert_allclose(values, expected, rtol=0, atol=bound)
        assert vectors.shape == (k, r)
        np.testing.assert_allclose(vectors @ vectors.T, np.eye(k), rtol=0, atol=1e-13)
        images = vectors @ (a / size)
        np.testing.assert_allclose(
            images, values[:k, None] / size * vectors, rtol=0, atol=1e-13 * r
        )


def test_what_is_above_the_diagonal_is_not_read():
    a = _matrices()["gram"]
    mixed = np.tril(a) + np.triu(np.full_like(a, 7.0), 1)
    values, vectors = lapack.eigenpairs(mixed, 60)
    np.testing.assert_allclose((vectors.T * values) @ vectors, a, atol=1e-10)


def test_zero_and_not_finite_matrices():
    np.testing.assert_array_equal(lapack.eigenvalues(np.zeros((4, 4))), np.zeros(4))
    values, vectors = lapack.eigenpairs(np.zeros((4, 4)), 2)
    np.testing.assert_array_equal(values, np.zeros(4))
    np.testing.assert_array_equal(vectors @ vectors.T, np.eye(2))
    for bad in (np.nan, np.inf):
        a = np.eye(4)
        a[2, 1] = bad
        assert np.isnan(lapack.eigenvalues(a.copy())).all()
        values, vectors = lapack.eigenpairs(a, 2)
        assert np.isnan(values).all()
        assert np.isnan(vectors).all()


def _read_only(a):
    a.flags.writeable = False
    return a


@pytest.mark.parametrize(
    ("matrix", "message"),
    [
        (np.eye(4, dtype=np.float32), r"float32 of shape \(4, 4\)"),
        (np.eye(4, dtype=">f8"), ">f8 of shape"),
        (np.eye(8)[::2, ::2], "rows not contiguous"),
        (np.ones((4, 4)).T[:, ::-1], "rows not contiguous"),
        (_read_only(np.eye(4)), "read-only"),
        (np.zeros((0, 0)), r"shape \(0, 0\)"),
    ],
)
def test_what_lapack_cannot_be_given_is_refused(matrix, message):
    before = matrix.copy()
    for solve in (lapack.eigenvalues, lambda a: lapack.eigenpairs(a, 1)):
        with pytest.raises(ValueError, match=message):
            solve(matrix)
    np.testing.assert_array_equal(matrix, before)


@pytest.mark.parametrize("matrix", [np.ones((4, 3)), np.ones(4), np.eye(4, dtype=int)])
def test_what_is_no_matrix_of_floats_is_refused(matrix):
    # Directly: in the tests the signatures refuse these before.
    with pytest.raises(ValueError, match="expected an aligned, writeable float64"):
        lapack._check(matrix)


@pytest.mark.parametrize("k", [0, -1, 5])
def test_vectors_that_there_are_not_are_refused(k):
    with pytest.raises(ValueError, match=f"k: got {k}, expected 1 to 4"):
        lapack.eigenpairs(np.eye(4), k)
