"""Which rows of a batch a process makes, and how they become one on the devices."""

from typing import Any, NamedTuple

from jax.sharding import NamedSharding

from geomjax import hosts
from geomjax.data.batches import WHOLE, Shard
from geomjax.meshes import Placement


class Spread(NamedTuple):
    """A batch over the devices of all processes.

    Attributes:
      size: B, its rows.
      sharding: How its arrays lie; None for the default device.
      shard: The rows that this process makes.
    """

    size: int
    sharding: NamedSharding | None
    shard: Shard

    def put(self, rows: Any) -> Any:
        """The whole batch `[B, ...]`, of this process's rows `[b, ...]` and others'."""
        return hosts.global_batch(rows, self.sharding, self.size)


def spread(size: int, placement: Placement) -> Spread:
    """Splits batches by sequence, where the mesh divides them.

    A process makes the rows that its devices hold, if those of all processes are equal
    blocks in their order. Otherwise, as where devices of several hosts share a sequence
    by tensor parallelism, every process makes whole batches, and its devices take from
    them what they hold.

    Args:
      size: B, the rows of a batch.
      placement: The mesh and its table, or one device.
    """
    if size % placement.parts("batch"):
        return Spread(size, placement.sharding(), WHOLE)
    sharding = placement.sharding("batch")
    if sharding is None or hosts.count() == 1:
        return Spread(size, sharding, WHOLE)
    parts = sharding.addressable_devices_indices_map((size,)).values()
    held = {i for part in parts if part for i in range(*part[0].indices(size))}
    own = Shard(hosts.index(), hosts.count())
    in_blocks = size % own.count == 0 and held == set(range(size)[own.rows(size)])
    return Spread(size, sharding, own if all(hosts.gather(in_blocks)) else WHOLE)
