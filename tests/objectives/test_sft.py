"""Cross-entropy by hand and by finite differences."""

import jax
import numpy as np
import pytest
from finite_differences import assert_gradient
from table_model import (
    TableModel,
    log_prob_params,
    make_batch,
    random_batch,
    table_params,
)

from geomjax.objectives.sft import cross_entropy


def test_value_by_hand():
    table = np.log(np.array([[0.1, 0.9], [0.75, 0.25]], np.float32))
    loss, metrics = cross_entropy(TableModel(2))(
        log_prob_params(table), {}, make_batch([[0, 1, 0, 1]], [[0, 0.5, 0.25, 0.25]])
    )
    # 0 -> 1, 1 -> 0 and 0 -> 1.
    expected = -(0.5 * np.log(0.9) + 0.25 * np.log(0.75) + 0.25 * np.log(0.9))
    assert loss == pytest.approx(expected, rel=1e-5)
    assert metrics == {}


def test_gradient_against_finite_differences():
    with jax.enable_x64(True):
        objective = cross_entropy(TableModel(6, np.float64), chunk_tokens=5)
        batch = random_batch(0, 6, rows=3, length=5, dtype=np.float64)
        assert_gradient(
            lambda params: objective(params, {}, batch)[0],
            table_params(1, 6, 3, np.float64),
        )
