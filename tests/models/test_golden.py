"""Logits against those that transformers computed once; needs no PyTorch."""

from pathlib import Path

import jax
import numpy as np
import pytest

from geomjax.models.families import FAMILIES
from geomjax.models.load import load

GOLDEN = Path(__file__).parent / "golden"


NAMES = sorted(path.parent.name for path in GOLDEN.glob("*/config.json"))


@pytest.mark.parametrize("name", NAMES)
def test_logits_equal_those_of_transformers(name):
    model, params = load(GOLDEN / name)
    with np.load(GOLDEN / name / "logits.npz") as expected:
        inputs = [expected[k] for k in ("tokens", "positions", "segment_ids")]
        hidden = jax.jit(model.apply)(params, *inputs)
        logits = np.asarray(hidden) @ np.asarray(model.unembedding(params)).T
        real = inputs[2] != 0
        assert (
            np.abs(expected["logits"][real]).max() > 0.5
        )  # Not a comparison of zeros.
        np.testing.assert_allclose(logits[real], expected["logits"][real], atol=1e-4)


def test_every_family_has_logits_of_its_own():
    folders = [*(GOLDEN / name for name in NAMES), GOLDEN.parent / "golden_vl"]
    made = {load(folder).model.config.architecture for folder in folders}
    assert made == set(FAMILIES)  # That of Qwen2.5-VL is read in test_qwen2_5_vl.
