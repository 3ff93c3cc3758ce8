"""Second moments by their Gram matrix, against the matrix that is never made."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from geomjax.geometry.second_moment import alignment, second_moment


def draws(seed, rows, columns, decay=0.5):
    """Vectors whose energy falls off from direction to direction, in float64."""
    generator = np.random.default_rng(seed)
    turn = np.linalg.qr(generator.standard_normal((columns, columns)))[0]
    return (
        generator.standard_normal((rows, columns)) * decay ** np.arange(columns)
    ) @ turn


def measured(g):
    with jax.enable_x64(True):
        return second_moment(jnp.asarray(g, jnp.float64))


@pytest.mark.parametrize(("rows", "columns"), [(9, 6), (5, 8), (1, 4)])
def test_against_the_matrix_itself(rows, columns):
    g = draws(0, rows, columns)
    with jax.enable_x64(True):
        found = measured(g)
        exact = np.linalg.eigvalsh(g.T @ g / rows)[::-1]
        shared = min(rows, columns)
        np.testing.assert_allclose(found.values[:shared], exact[:shared], atol=1e-12)
        np.testing.assert_allclose(found.mean_square, np.trace(g.T @ g) / rows)
        centred = g - g.mean(axis=0)
        np.testing.assert_allclose(
            found.variance, (centred**2).sum() / rows, atol=1e-12
        )
        np.testing.assert_allclose(
            found.participation, exact.sum() ** 2 / (exact**2).sum()
        )
        np.testing.assert_allclose(found.top_share(2), exact[:2].sum() / exact.sum())


def test_by_hand():
    """Two along x, one of them reversed, and one along y."""
    with jax.enable_x64(True):
        found = measured([[3.0, 0.0], [-3.0, 0.0], [0.0, 3.0]])
        np.testing.assert_allclose(found.values, [6, 3, 0], atol=1e-12)
        assert found.mean_square == pytest.approx(9)
        assert found.square_of_mean == pytest.approx(1)
        assert found.variance == pytest.approx(8)
        assert found.participation == pytest.approx(81 / 45)


def aligned(a, b, k):
    with jax.enable_x64(True):
        a, b = jnp.asarray(a, jnp.float64), jnp.asarray(b, jnp.float64)
        return float(alignment(a, b, second_moment(a), second_moment(b), k))


@pytest.mark.parametrize("k", [1, 3])
def test_alignment_against_the_eigenvectors_themselves(k):
    a, b = draws(1, 12, 7), draws(2, 9, 7)
    u, v = (np.linalg.eigh(g.T @ g)[1][:, ::-1][:, :k] for g in (a, b))
    assert aligned(a, b, k) == pytest.approx(((u.T @ v) ** 2).sum() / k, rel=1e-8)


def test_alignment_is_one_with_itself_whatever_the_scale_and_the_signs():
    g = draws(3, 12, 7)
    signs = np.where(np.arange(12) % 3, 1.0, -1.0)[:, None]
    assert aligned(g, -5 * signs * g, 4) == pytest.approx(1)


def test_alignment_of_unrelated_vectors_is_near_chance():
    generator = np.random.default_rng(0)
    found = [aligned(*generator.standard_normal((2, 40, 400)), 8) for _ in range(20)]
    assert np.mean(found) == pytest.approx(8 / 400, rel=0.15)


def test_directions_that_are_not_there_are_not_made_up():
    flat = np.outer(np.arange(1, 6), np.ones(4))  # Rank one: along (1, 1, 1, 1) / 2.
    other = [[3, 4, 0, 0], [-6, -8, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]
    # Leading: (3, 4, 0, 0) / 5. The cosine is (3 + 4) / 10.
    assert aligned(flat, other, 1) == pytest.approx(0.49)
    assert np.isnan(aligned(flat, other, 2))


def test_more_directions_than_vectors_are_refused():
    with pytest.raises(ValueError, match="k=6: expected 1 to 5"):
        aligned(draws(0, 5, 8), draws(1, 9, 8), 6)
