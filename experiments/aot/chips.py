"""What a chip of each TPU generation has, and compiling for slices of it."""

import os
from typing import NamedTuple

import jax

from geomjax.train.throughput import PEAK_FLOPS


class Chip(NamedTuple):
    """One chip, by docs.cloud.google.com/tpu/docs/{v5e,v5p,v6e}, "key specifications".

    Attributes:
      hbm_bytes: Memory. What a program may use is less: the compiler keeps some back.
      peak_flops: bfloat16 operations a second.
      link_bytes_per_s: Over the links to all neighbours together, one direction: half
        of the "bidirectional inter-chip interconnect (ICI) bandwidth (per chip)", 400,
        1,200 and 800 GB/s. (Older editions of the pages give one direction, in Gbit/s.)
        A chip at the edge of a slice that is not a torus has fewer links.
      accelerator_type: What libtpu calls a slice, up to the number of its cores.
      cores: Cores that the number counts for each chip.
    """

    hbm_bytes: int
    peak_flops: float
    link_bytes_per_s: float
    accelerator_type: str
    cores: int


CHIPS = {
    "v5e": Chip(16 << 30, PEAK_FLOPS["TPU v5e"], 200e9, "v5litepod", 1),
    "v5p": Chip(95 << 30, PEAK_FLOPS["TPU v5p"], 600e9, "v5p", 2),
    "v6e": Chip(32 << 30, PEAK_FLOPS["TPU v6e"], 400e9, "v6e", 1),
}


def slice_devices(topology: str) -> tuple[Chip, list[jax.Device]]:
    """Devices of a slice that is not there, to compile for.

    Args:
      topology: Generation and shape, such as `v5e:4x4` or `v5p:2x2x4`.

    Returns:
      The chip, and one device for each.

    Raises:
      ValueError: The generation is unknown, there is no such slice, or libtpu is not
        installed.
    """
    generation, _, shape = topology.partition(":")
    if generation not in CHIPS or not shape:
        raise ValueError(
            f"topology {topology!r}: expected one of {sorted(CHIPS)} and a shape, such "
            "as v5e:4x4"
        )
    chip = CHIPS[generation]
    try:
        count = 1
        for side in shape.split("x"):
            count *= int(side)
    except ValueError:
        raise ValueError(f"topology {topology!r}: a shape is such as 4x4") from None
    # libtpu would ask the machine which slice it is part of; it is told instead.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    os.environ["TPU_ACCELERATOR_TYPE"] = f"{chip.accelerator_type}-{count * chip.cores}"
    from jax.experimental import topologies

    try:
        described = topologies.get_topology_desc(topology, "tpu")
    except (RuntimeError, ValueError) as error:
        raise ValueError(
            f"topology {topology!r}: {error}; libtpu comes with pip install "
            "geomjax[tpu]"
        ) from error
    return chip, list(described.devices)
