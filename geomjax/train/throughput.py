"""How fast a run is: steps, tokens and the model's floating-point operations."""

import time
from typing import NamedTuple

PEAK_FLOPS: dict[str, float] = {
    # docs.cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e}, "peak compute per chip (bf16)".
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    # nvidia.com/en-us/data-center/{a100,h100,h200,l4,l40s} and the data sheet of the
    # H100 PCIe, bfloat16 on tensor cores: half of the figure "with sparsity".
    "NVIDIA A100": 312e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100 NVL": 835.5e12,
    "NVIDIA H100": 989.4e12,
    "NVIDIA H200": 989.4e12,
    "NVIDIA L4": 121e12,
    "NVIDIA L40S": 362.05e12,
}
"""Most bfloat16 operations a second of one device, by what its kind begins with."""


class Work(NamedTuple):
    """What one training step does.

    Attributes:
      tokens: Tokens that are trained on, prompts included and padding not.
      flops: Operations of the models' matrix products for them, whatever is computed a
        second time to save memory.
    """

    tokens: float
    flops: float


def peak_flops(device_kind: str) -> float | None:
    """Peak of one device, None where it is not in the table, as for a CPU.

    Args:
      device_kind: As JAX names it, such as `TPU v5 lite`.
    """
    # The longest first, so that an H100 PCIe is none of SXM.
    for name in sorted(PEAK_FLOPS, key=len, reverse=True):
        if device_kind == name or device_kind.startswith((f"{name} ", f"{name}-")):
            return PEAK_FLOPS[name]
    return None


def rates(
    work: Work | None, seconds: float, devices: int, peak: float | None
) -> dict[str, float]:
    """Speeds of one step.

    Args:
      work: What it did, if that is counted.
      seconds: How long it took.
      devices: Devices that took part.
      peak: Peak operations a second of one of them, bfloat16.

    Returns:
      `seconds`, `steps_per_s`; of counted work `tokens_per_s` and
      `model_flops_per_s` over all devices; of a known peak
      `model_flops_utilisation`, a share of the bfloat16 peak whatever the compute
      dtype is.
    """
    found = {"seconds": seconds, "steps_per_s": 1.0 / seconds}
    if work is not None:
        found["tokens_per_s"] = work.tokens / seconds
        found["model_flops_per_s"] = work.flops / seconds
        if peak is not None:
            share = work.flops / seconds / (devices * peak)
            found["model_flops_utilisation"] = share
    return found


class Stopwatch:
    """Times from one step to the next."""

    def __init__(self) -> None:
        self._last: float | None = None

    def lap(self) -> float | None:
        """Seconds since the last lap, None at the first and after a `reset`."""
        last, self._last = self._last, time.perf_counter()
        return None if last is None else self._last - last

    def reset(self) -> None:
        """Leaves out what has passed: an evaluation, or a wait for the disk."""
        self._last = None
