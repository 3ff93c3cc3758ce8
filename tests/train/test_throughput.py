"""Speeds from hand-worked steps, and peaks by the names that devices have."""

import pytest

from geomjax.train.throughput import PEAK_FLOPS, Work, peak_flops, rates


def test_rates_of_a_hand_worked_step():
    assert rates(None, 0.5, 4, 1e12) == {"seconds": 0.5, "steps_per_s": 2.0}
    counted = rates(Work(tokens=100.0, flops=6e12), 0.5, 4, None)
    assert counted == {
        "seconds": 0.5,
        "steps_per_s": 2.0,
        "tokens_per_s": 200.0,
        "model_flops_per_s": 12e12,
    }
    known = rates(Work(tokens=100.0, flops=6e12), 0.5, 4, 10e12)
    assert known == counted | {"model_flops_utilisation": 0.3}


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("TPU v4", "TPU v4"),
        ("TPU v5 lite", "TPU v5 lite"),
        ("TPU v5", "TPU v5p"),
        ("TPU v6 lite", "TPU v6e"),
        ("NVIDIA H100 80GB HBM3", "NVIDIA H100"),
        ("NVIDIA H100 PCIe", "NVIDIA H100 PCIe"),
        ("NVIDIA A100-SXM4-80GB", "NVIDIA A100"),
        ("NVIDIA L4", "NVIDIA L4"),
        ("NVIDIA L40S", "NVIDIA L40S"),
    ],
)
def test_a_device_is_found_by_its_kind(kind, name):
    assert peak_flops(kind) == PEAK_FLOPS[name]


@pytest.mark.parametrize("kind", ["cpu", "NVIDIA L40", "TPU v5x", "NVIDIA H1000"])
def test_an_unknown_device_has_no_peak(kind):
    assert peak_flops(kind) is None
