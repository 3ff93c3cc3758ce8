"""Matrices with more entries than int32 counts, without holding one."""

import jax
import ml_dtypes
import numpy as np
import pytest

from geomjax.analysis import measure
from geomjax.analysis.measure import StackPlan, load, measure_stack, to_rows
from geomjax.analysis.metrics import DEFAULT
from geomjax.analysis.programs import Programs
from geomjax.analysis.stacks import plan_stacks
from geomjax.checkpoints import DictSource, match

NAME = "model.layers.0.mlp.up_proj.weight"
REPEATS = 1 << 22
"""Of 2,000 entries: 8.4e9 in all."""


def _pair():
    rng = np.random.default_rng(0)
    w = (0.02 * rng.standard_normal((40, 50))).astype(ml_dtypes.bfloat16)
    moved = rng.random(w.shape) < 0.3
    d = 1e-4 * moved * rng.standard_normal(w.shape)
    return w, (w.astype(np.float32) + d).astype(ml_dtypes.bfloat16)


@pytest.mark.parametrize("delta", ["stored", "master"])
def test_a_matrix_of_copies_of_a_block(monkeypatch, delta):
    """`[W W ... W]` has the shares, shapes of spectra and left angles of W."""
    w, tuned = _pair()
    if delta == "master":
        w, tuned = w.astype(np.float32), tuned.astype(np.float32)
    sides = DictSource({NAME: w}), DictSource({NAME: tuned})
    (once,) = measure(*sides, delta=delta, metrics=DEFAULT)

    def repeated(total):
        """A pass over as many blocks, from the sums of one."""
        out = jax.tree.map(lambda x: x * REPEATS, total)
        if hasattr(out, "largest"):
            out = out._replace(largest=total.largest)
        if getattr(out, "principal", None) is not None:
            assert out.principal.dtype == np.int64
            assert out.principal.sum() > 4 * (1 << 31)
        return out

    original = Programs.sums

    def sums(self, *args):
        found = original(self, *args)
        total = found.total
        found.total = lambda: repeated(total())
        return found

    monkeypatch.setattr(Programs, "sums", sums)
    long = (40, 50 * REPEATS)
    (often,) = _measure_as(sides, long, delta)
    assert often["numel"] == 40 * 50 * REPEATS
    compared = 0
    for name, value in once.items():
        # Chance levels on the long side are smaller there.
        elsewhere = name.startswith(("right_energy", "principal_energy"))
        if not isinstance(value, float) or (elsewhere and name.endswith("_chance")):
            continue
        scaled = name.endswith("_frobenius") or name == "spectral_norm"
        if scaled and name != "relative_frobenius":
            value *= np.sqrt(REPEATS)
        assert often[name] == pytest.approx(value, rel=1e-6), name
        compared += 1
    assert compared > 80


def _measure_as(sides, shape, delta):
    """Rows of a pair whose only block is taken for a matrix of another shape."""
    plan = StackPlan(delta, "bfloat16", DEFAULT)
    matched = match(*sides).matched
    (stack,) = plan_stacks(*sides, matched, memory_budget=1 << 30, devices=1)
    with jax.enable_x64(True):
        loaded = load(*sides, stack, plan)
        large = stack._replace(kinds=(stack.kinds[0]._replace(shape=shape),))
        return to_rows(large, plan, measure_stack(large, loaded, plan))
