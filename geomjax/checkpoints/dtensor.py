"""One rank's part of a parameter, as PyTorch's distributed tensors describe it."""

from typing import Any, NamedTuple

from geomjax.checkpoints.mapped_source import MappedTensor
from geomjax.checkpoints.torch_archive import TorchArchive
from geomjax.checkpoints.torch_pickle import Call, attributes


class LayoutError(Exception):
    """A description of a distributed tensor that cannot be followed."""


class LocalTensor(NamedTuple):
    """What one rank holds of a parameter.

    Attributes:
        tensor: the rank's own tensor, or None where the entry is no tensor.
        shape: shape of the whole parameter.
        placements: for each axis of the device mesh, the tensor axis that it cuts, or
            None where the parameter is copied along it; None for a plain tensor.
        coordinates: the rank's place in the mesh.
        kind: what the entry is, for messages.
    """

    tensor: MappedTensor | None
    shape: tuple[int, ...]
    placements: tuple[int | None, ...] | None
    coordinates: tuple[int, ...]
    kind: str


def local_tensor(archive: TorchArchive, value: Any, rank: int) -> LocalTensor:
    """Reads one entry of a rank's state dict.

    Args:
        archive: the rank's file.
        value: the entry: a DTensor, a plain tensor or something else.
        rank: the rank.

    Returns:
        What the rank holds.

    Raises:
        CheckpointError: the local tensor does not fit the file.
        LayoutError: a placement or mesh that is not understood.
    """
    match value:
        case Call(
            name="torch._tensor._rebuild_from_type_v2",
            args=(_, cls, (_, _, tuple(shape), *_), state),
        ) if _class_name(cls) == "DTensor":
            parts = attributes(state)
            spec = attributes(parts.get("_spec"))
            placements = _placements(spec.get("placements"))
            coordinates = _coordinates(spec.get("mesh"), rank, len(placements))
            local = archive.tensor(parts.get("_local_tensor"))
            if local is None or not all(type(n) is int for n in shape):
                raise LayoutError("a DTensor without a dense local tensor")
            return LocalTensor(local, shape, placements, coordinates, "a DTensor")
    tensor = archive.tensor(value)
    if tensor is None:
        what = value.name if isinstance(value, Call) else type(value).__name__
        return LocalTensor(None, (), None, (), f"{what} is not a tensor that is read")
    return LocalTensor(tensor, tensor.shape, None, (), "a plain tensor")


def _placements(value: Any) -> tuple[int | None, ...]:
    """The tensor axis that each mesh axis cuts, None for a copy."""
    if not isinstance(value, tuple) or not value:
        raise LayoutError("a DTensor without placements")
    placements: list[int | None] = []
    for item in value:
        kind = _class_name(item)
        axis = attributes(item).get("dim")
        if kind == "Replicate":
            placements.append(None)
        elif kind == "Shard" and type(axis) is int and axis >= 0:
            placements.append(axis)
        else:
            raise LayoutError(
                f"placement {kind} is not read; expected Shard or Replicate"
            )
    return tuple(placements)


def _coordinates(mesh: Any, rank: int, dims: int) -> tuple[int, ...]:
    """The rank's place in the mesh."""
    recorded = attributes(mesh).get("_coordinate_on_dim")
    if isinstance(recorded, (list, tuple)) and len(recorded) == dims:
        if all(type(n) is int and n >= 0 for n in recorded):
            return tuple(recorded)
    elif recorded is None and dims == 1:
        return (rank,)
    raise LayoutError("the rank's coordinates in the device mesh are not recorded")


def _class_name(value: Any) -> str:
    """The last part of the name of a class, or of an object's class."""
    name = getattr(value, "name", None)
    return name.rpartition(".")[2] if isinstance(name, str) else type(value).__name__
