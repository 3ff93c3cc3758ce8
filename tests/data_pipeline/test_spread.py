"""Which rows of a batch each process makes on which mesh."""

import jax
import numpy as np
import pytest

from geomjax import hosts
from geomjax.data.batches import WHOLE, Shard
from geomjax.data.spread import spread
from geomjax.meshes import ONE_DEVICE, Placement, mesh_from_string


def test_one_device_and_one_process_make_whole_batches():
    assert spread(6, ONE_DEVICE) == (6, None, WHOLE)
    place = Placement(mesh_from_string("data=2,fsdp=4"))
    found = spread(16, place)
    assert found.shard == WHOLE
    rows = np.arange(32, dtype=np.int32).reshape(16, 2)
    batch = found.put({"rows": rows})["rows"]
    assert {shard.data.shape for shard in batch.addressable_shards} == {(2, 2)}
    np.testing.assert_array_equal(batch, rows)


def test_a_batch_that_the_mesh_does_not_divide_is_whole_everywhere():
    found = spread(12, Placement(mesh_from_string("data=2,fsdp=4")))
    batch = found.put(np.arange(12, dtype=np.int32))
    assert batch.sharding.is_fully_replicated


@pytest.mark.parametrize(
    ("mesh", "held", "expected"),
    [
        ("data=2,fsdp=4", (0, 1, 2, 3), Shard(0, 2)),
        ("data=2,fsdp=2,tensor=2", (4, 5, 6, 7), Shard(1, 2)),
        ("tensor=2,data=4", (0, 1, 2, 3), WHOLE),  # Sequences that hosts share.
        ("data=2,fsdp=4", (0, 1, 6, 7), WHOLE),  # No block of rows.
    ],
)
def test_a_process_makes_what_its_devices_hold(monkeypatch, mesh, held, expected):
    devices = jax.devices()
    monkeypatch.setattr(hosts, "count", lambda: 2)
    monkeypatch.setattr(hosts, "index", lambda: held[0] // 4)
    monkeypatch.setattr(hosts, "gather", lambda value: [value, value])
    whole = jax.sharding.NamedSharding.addressable_devices_indices_map

    def of_process(self, shape):
        parts = whole(self, shape)
        return {devices[i]: parts[devices[i]] for i in held}

    monkeypatch.setattr(
        jax.sharding.NamedSharding, "addressable_devices_indices_map", of_process
    )
    assert spread(16, Placement(mesh_from_string(mesh))).shard == expected
