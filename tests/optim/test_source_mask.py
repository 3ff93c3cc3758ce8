"""Predicted masks against NumPy's SVD, and what each rule promises."""

import itertools

import jax
import ml_dtypes
import numpy as np
import pytest

from geomjax.optim.source_mask import SOURCE_RULES, source_mask


def _tensors(mask, params, roles):
    """Every checkpoint tensor of the tree with its mask and its kind."""
    for path, role in roles.items():
        leaf, chosen = params, mask
        for key in path:
            leaf, chosen = leaf[key], chosen[key]
        shape = leaf.shape[role.stack_depth :]
        yield from zip(
            np.asarray(leaf, np.float64).reshape(-1, *shape),
            np.asarray(chosen).reshape(-1, *shape),
            itertools.repeat(role.kind),
        )


def _rebuilt(tensor, rank):
    u, s, vt = np.linalg.svd(tensor, full_matrices=False)
    return np.abs((u[:, :rank] * s[:rank]) @ vt[:rank])


def _smallest(scores, count):
    chosen = np.zeros(scores.size, bool)
    chosen[np.argsort(scores, axis=None, kind="stable")[:count]] = True
    return chosen.reshape(scores.shape)


@pytest.mark.parametrize("density", [0.05, 0.3, 1.0])
@pytest.mark.parametrize("fraction", [0.3, 0.6])
def test_low_and_nonprincipal_equal_the_definition(draw, roles, density, fraction):
    params = draw(0)
    low = source_mask(params, roles, "low", density)
    outside = source_mask(
        params, roles, "nonprincipal", density, principal_fraction=fraction
    )
    for tensor, chosen, _ in _tensors(low, params, roles):
        count = int(np.ceil(round(density * tensor.size, 9)))
        np.testing.assert_array_equal(chosen, _smallest(np.abs(tensor), count))
    for tensor, chosen, kind in _tensors(outside, params, roles):
        count = int(np.ceil(round(density * tensor.size, 9)))
        scores = np.abs(tensor)
        if kind != "vector":
            scores = _rebuilt(tensor, max(1, int(fraction * min(tensor.shape))))
        np.testing.assert_array_equal(chosen, _smallest(scores, count))


def test_both_lies_in_the_smallest_pair_of_masks_that_hold_enough(draw, roles):
    """It is the intersection of equally large masks, grown until it is full."""
    params, density = draw(1), 0.3
    both = source_mask(params, roles, "low_nonprincipal", density)
    for tensor, chosen, kind in _tensors(both, params, roles):
        count = int(np.ceil(round(density * tensor.size, 9)))
        assert chosen.sum() == count
        if kind == "vector":
            continue
        low, outside = np.abs(tensor), _rebuilt(tensor, 1)
        sizes = range(1, tensor.size + 1)
        shared = [_smallest(low, k) & _smallest(outside, k) for k in sizes]
        first = next(k for k, both in enumerate(shared) if both.sum() >= count)
        assert (chosen <= shared[first]).all()
        assert first == 0 or (chosen >= shared[first - 1]).all()


def test_every_tensor_gets_the_density(draw, roles):
    params = jax.tree.map(lambda x: np.asarray(x).astype(ml_dtypes.bfloat16), draw(2))
    for rule in SOURCE_RULES:
        mask = source_mask(params, roles, rule, 0.2)
        for tensor, chosen, _ in _tensors(mask, params, roles):
            assert chosen.sum() == int(np.ceil(round(0.2 * tensor.size, 9)))


def test_frozen_parameters_stay_none(draw, roles):
    params = draw(0)
    params["norm"]["weight"] = None
    mask = source_mask(params, roles, "low", 0.5)
    assert mask["norm"]["weight"] is None


def test_what_is_refused(draw, roles):
    params = draw(0)
    with pytest.raises(ValueError, match="known: low, nonprincipal"):
        source_mask(params, roles, "high", 0.5)
    with pytest.raises(ValueError, match="density: got 0"):
        source_mask(params, roles, "low", 0.0)
    with pytest.raises(ValueError, match="principal_fraction: got 2"):
        source_mask(params, roles, "low", 0.5, principal_fraction=2.0)
