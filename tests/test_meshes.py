"""Meshes from text, and the table that lays parameters over them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from geomjax.meshes import (
    ONE_DEVICE,
    RULES,
    Placement,
    mesh_from_string,
    partition_spec,
    shardings,
)

UP = ("layers", "ffn", "embed")


def test_a_mesh_has_the_axes_it_names():
    mesh = mesh_from_string("data=2, fsdp=4")
    assert dict(mesh.shape) == {"data": 2, "fsdp": 4}
    assert set(mesh.axis_types) == {AxisType.Auto}
    assert mesh.devices.size == len(jax.devices()) == 8
    few = mesh_from_string("tensor=2", jax.devices()[:2])
    assert list(few.devices) == jax.devices()[:2]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected name=size pairs"),
        ("data", "expected name=size pairs"),
        ("data=0", "expected name=size pairs"),
        ("data=2;fsdp=4", "expected name=size pairs"),
        ("data=2,rows=4", "a different one of .*'fsdp'"),
        ("data=2,data=4", "a different one of"),
        ("data=2,fsdp=2", "4 places for 8 devices"),
    ],
)
def test_text_that_is_no_mesh_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        mesh_from_string(text)


def test_axes_go_where_the_table_says():
    mesh = mesh_from_string("fsdp=4,tensor=2")
    assert partition_spec(UP, mesh) == PartitionSpec(None, "tensor", "fsdp")
    assert partition_spec((None, "experts"), mesh) == PartitionSpec(None, None)
    with pytest.raises(ValueError, match=r"no rule for the axes \['lines'\]"):
        partition_spec(("lines",), mesh)


def test_two_axes_on_one_mesh_axis_are_refused():
    mesh = mesh_from_string("fsdp=8")
    both = {"ffn": "fsdp", "embed": "fsdp"}
    with pytest.raises(ValueError, match="two of them over one mesh axis"):
        partition_spec(("ffn", "embed"), mesh, both)


def test_every_size_that_does_not_divide_is_named():
    mesh = mesh_from_string("fsdp=4,tensor=2")
    axes = {("up",): UP, ("norm",): ("embed",), ("head",): ("vocab", "embed")}
    fits = {("up",): (3, 6, 8), ("norm",): (8,), ("head",): (10, 8)}
    layout = shardings(axes, fits, mesh)
    assert layout[("norm",)].spec == PartitionSpec("fsdp")
    assert layout[("up",)].shard_shape((3, 6, 8)) == (3, 3, 2)
    with pytest.raises(ValueError, match="cannot be laid out") as error:
        shardings(axes, {("up",): (3, 7, 6), ("norm",): (8,), ("head",): (9, 8)}, mesh)
    assert str(error.value).splitlines()[1:] == [
        "up: 7 ffn over tensor=2, where 1 or 7 divides",
        "up: 6 embed over fsdp=4, where 1, 2, 3 or 6 divides",
        "head: 9 vocab over tensor=2, where 1 or 3 divides",
    ]


def test_one_device_leaves_everything_as_it_is():
    x = jnp.ones((3, 5))
    assert ONE_DEVICE.constrain(x, "no such axis", None) is x
    assert ONE_DEVICE.pad(x, "batch", None) is x
    assert ONE_DEVICE.sharding("batch") is None
    assert ONE_DEVICE.parts("batch") == 1
    assert ONE_DEVICE.local(len, [("batch",)], ("batch",)) is len


def test_an_axis_may_be_split_over_several_of_the_mesh():
    place = Placement(mesh_from_string("data=2,fsdp=2,tensor=2"))
    assert place.parts("batch") == 4
    assert place.mesh_axes("loss_vocab") == ("tensor", "fsdp")
    x = place.constrain(jnp.arange(24.0).reshape(8, 3), "batch", None)
    assert x.sharding.spec == PartitionSpec(("data", "fsdp"), None)
    assert {shard.data.shape for shard in x.addressable_shards} == {(2, 3)}
    with pytest.raises(ValueError, match="two of them over one mesh axis"):
        place.constrain(jnp.ones((8, 8)), "batch", "embed")
    with pytest.raises(ValueError, match=r"\(6, 3\) does not fit") as error:
        place.constrain(jnp.ones((6, 3)), "batch", None)
    assert "6 batch over data=2 x fsdp=2, where 1, 2, 3 or 6 divides" in str(
        error.value
    )
    assert place.decoding.rules == {**RULES, "embed": None}


def test_what_does_not_divide_is_padded_with_zeros():
    place = Placement(mesh_from_string("fsdp=8"))
    padded = place.pad(jnp.ones((9, 2)), "loss_vocab", None)
    assert padded.shape == (16, 2)
    assert padded.sharding.shard_shape(padded.shape) == (2, 2)
    np.testing.assert_array_equal(padded.sum(), 18)


def test_a_local_function_sees_its_own_rows_and_the_rest_whole():
    place = Placement(mesh_from_string("data=2,fsdp=4"))
    axes = ("rows", None)
    x = jnp.arange(32.0).reshape(8, 4)
    halves = x.reshape(2, 4, 4)
    expected = halves - halves.mean(axis=1, keepdims=True)

    def of_half(x):
        assert x.shape == (4, 4)
        # Along `fsdp` the array is still the partitioner's to lay out.
        return place.constrain(x - x.mean(axis=0, keepdims=True), "rows", "embed")

    run = jax.jit(place.local(of_half, [axes], axes, along="rows"))
    np.testing.assert_array_equal(run(x), expected.reshape(8, 4))
    whole = place.local(of_half, [axes], axes, along="experts")
    assert whole is of_half  # The mesh has no such axis: nothing is local.
