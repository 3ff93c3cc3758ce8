"""Meshes from text, and the table that lays parameters over them."""

import jax
import pytest
from jax.sharding import AxisType, PartitionSpec

from geomjax.meshes import mesh_from_string, partition_spec, shardings

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
