"""Device meshes, and the one table that lays arrays over them."""

import dataclasses
import math
import re
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

AXES = ("data", "fsdp", "tensor", "expert")
"""Names that the axes of a mesh may have."""

Rules = Mapping[str, str | tuple[str, ...] | None]
"""Logical axis -> the mesh axes it is split over, or None for no split."""

RULES: Rules = {
    "layers": None,
    "embed": "fsdp",
    "heads": "tensor",
    "kv_heads": "tensor",
    "ffn": "tensor",
    "vocab": "tensor",
    "experts": "expert",
    "batch": ("data", "fsdp"),
    "rows": "data",
    "loss_vocab": ("tensor", "fsdp"),
}
"""How parameters, optimizer state, activations, caches and batches are laid out.

FSDP splits the width of the residual stream, `embed`, which every parameter has; heads,
feed-forward and vocabulary are split by tensor parallelism, experts by their own axis.
Activations and caches are split by sequence, `batch`, and by the heads. A loss splits
the vocabulary over more devices, `loss_vocab`, and the sequences over those that are
left, `rows`: no head is gathered, and no device has all logits of a token.
"""

_AXIS = re.compile(r"([a-z]+)=([1-9][0-9]*)")


def mesh_from_string(text: str, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Makes a mesh such as `data=2,fsdp=4` describes it.

    The axes are of type Auto: a program says how its inputs and outputs are laid out,
    and XLA's partitioner does the rest. (`jax.make_mesh` alone would make Explicit
    axes, for which every operation of a model would have to name its layout.)

    Args:
      text: `name=size` pairs joined by commas, slowest axis first. Names are those of
        `AXES`.
      devices: The devices to use, all of them; by default every device of all hosts.

    Returns:
      The mesh.

    Raises:
      ValueError: The text cannot be read, a name is unknown or given twice, or the
        sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    matches = [_AXIS.fullmatch(part.strip()) for part in text.split(",")]
    pairs = [(m[1], int(m[2])) for m in matches if m is not None]
    names = [name for name, _ in pairs]
    if None in matches:
        raise ValueError(
            f"mesh {text!r}: expected name=size pairs such as 'data=2,fsdp=4'"
        )
    unknown = sorted(set(names) - set(AXES))
    if unknown or len(set(names)) < len(names):
        raise ValueError(f"mesh {text!r}: each axis must be a different one of {AXES}")
    sizes = tuple(size for _, size in pairs)
    if math.prod(sizes) != len(devices):
        raise ValueError(
            f"mesh {text!r} has {math.prod(sizes)} places for {len(devices)} devices; "
            "change a size so that they agree"
        )
    types = (AxisType.Auto,) * len(names)
    return jax.make_mesh(sizes, tuple(names), axis_types=types, devices=list(devices))


def partition_spec(
    logical_axes: Sequence[str | None], mesh: Mesh, rules: Rules = RULES
) -> PartitionSpec:
    """Where the axes of one array go on a mesh.

    Args:
      logical_axes: A name for each axis, or None for one that is never split.
      mesh: The mesh; rules that name an axis it lacks split nothing, nor, inside of
        `Placement.local`, those that name an axis along which arrays are local.
      rules: The table.

    Returns:
      The specification.

    Raises:
      ValueError: A name is not in the table, or two axes land on one mesh axis.
    """
    unknown = [axis for axis in logical_axes if axis is not None and axis not in rules]
    if unknown:
        raise ValueError(f"no rule for the axes {unknown}; known: {sorted(rules)}")
    placed = [_free(axis, mesh, rules) for axis in logical_axes]
    used = [axis for axes in placed for axis in axes]
    # One axis is written as itself: a specification of it equals jax's own.
    entries = [axes[0] if len(axes) == 1 else axes or None for axes in placed]
    if len(set(used)) < len(used):
        raise ValueError(
            f"the axes {tuple(logical_axes)} would be split as {tuple(entries)}, two "
            "of them over one mesh axis"
        )
    return PartitionSpec(*entries)


def shardings(
    logical_axes: Mapping[tuple[str, ...], Sequence[str | None]],
    shapes: Mapping[tuple[str, ...], tuple[int, ...]],
    mesh: Mesh,
    rules: Rules = RULES,
) -> dict[tuple[str, ...], NamedSharding]:
    """The layout of several arrays.

    Args:
      logical_axes: Names of the axes of each array, by its path.
      shapes: Their shapes, under the same paths.
      mesh: The mesh.
      rules: The table.

    Returns:
      A sharding for each path of `shapes`.

    Raises:
      ValueError: As `partition_spec`, or sizes that their mesh axes do not divide;
        all of them at once, each with the sizes that do.
    """
    problems = []
    layout = {}
    for path, shape in shapes.items():
        name = ".".join(path)
        try:
            spec = partition_spec(logical_axes[path], mesh, rules)
        except ValueError as error:
            problems.append(f"{name}: {error}")
            continue
        misfits = _misfits(shape, logical_axes[path], mesh, rules)
        problems += [f"{name}: {misfit}" for misfit in misfits]
        layout[path] = NamedSharding(mesh, spec)
    if problems:
        raise ValueError(
            "parameters cannot be laid out on the mesh; choose sizes that divide "
            "them:\n" + "\n".join(problems)
        )
    return layout


@dataclasses.dataclass(frozen=True, eq=False)
class Placement:
    """Where a program's arrays lie; models and losses are given one, and obey it.

    `ONE_DEVICE`, the default everywhere, changes nothing: every array stays where it
    is. On a mesh, `constrain` tells XLA's partitioner the layout of an array inside a
    program, and the partitioner adds what moves the data.

    Attributes:
      mesh: The mesh; None for one device.
      rules: The table. Student and teacher may have different ones.
    """

    mesh: Mesh | None = None
    rules: Rules = dataclasses.field(default_factory=lambda: RULES)

    @cached_property
    def decoding(self) -> "Placement":
        """For weights that are read on every token: their width is not split.

        They are whole on every device, or tensor-parallel where the mesh says so.
        """
        return Placement(self.mesh, {**self.rules, "embed": None})

    def mesh_axes(self, axis: str) -> tuple[str, ...]:
        """The axes of the mesh over which a logical axis is split."""
        return () if self.mesh is None else _mesh_axes(axis, self.mesh, self.rules)

    def parts(self, axis: str) -> int:
        """How many parts a logical axis is split into."""
        return math.prod(self.mesh.shape[a] for a in self.mesh_axes(axis) if self.mesh)

    def sharding(self, *logical_axes: str | None) -> NamedSharding | None:
        """The layout of an array with these axes; None on one device."""
        if self.mesh is None:
            return None
        spec = partition_spec(logical_axes, self.mesh, self.rules)
        return NamedSharding(self.mesh, spec)

    def constrain(self, x: Any, *logical_axes: str | None) -> Any:
        """The array, laid out by its axes; itself on one device.

        Args:
          x: An array, inside a jitted program or outside.
          *logical_axes: A name or None for each of its axes.

        Raises:
          ValueError: As `partition_spec`, or a size that its mesh axes do not divide.
        """
        if self.mesh is None:
            return x
        misfits = _misfits(x.shape, logical_axes, self.mesh, self.rules)
        if misfits:
            raise ValueError(
                f"an array of shape {x.shape} does not fit the mesh: "
                + ", ".join(misfits)
            )
        spec = partition_spec(logical_axes, self.mesh, self.rules)
        # Inside of `local` the mesh is another, and known to JAX.
        sharding = spec if _manual() else NamedSharding(self.mesh, spec)
        return jax.lax.with_sharding_constraint(x, sharding)

    def pad(self, x: Any, *logical_axes: str | None) -> Any:
        """The array with zeros after it, so that the mesh divides it, and laid out."""
        axes = zip(x.shape, logical_axes, strict=True)
        short = [0 if a is None else -size % self.parts(a) for size, a in axes]
        if any(short):
            x = jax.numpy.pad(x, [(0, n) for n in short])
        return self.constrain(x, *logical_axes)

    def local(
        self,
        function: Callable[..., Any],
        in_axes: Sequence[Sequence[str | None]],
        out_axes: Sequence[str | None],
        along: str | None = None,
    ) -> Callable[..., Any]:
        """A function that each device applies to its own parts of the arguments.

        Args:
          function: From one array for each of `in_axes` to one array, or to several
            that lie alike. What it sums over devices it sums itself, over `mesh_axes`.
          in_axes: Logical axes of each argument.
          out_axes: Those of the result.
          along: The one logical axis of these along which the parts are the devices'
            own; along all others arrays stay whole for the function, and the
            partitioner's to lay out. By default there are no others.

        Returns:
          The function of whole arrays; `function` itself where nothing is split.
        """
        axes = AXES if along is None else self.mesh_axes(along)
        if self.mesh is None or not axes:
            return function
        return jax.shard_map(
            function,
            # Inside of another `local` the mesh is known to JAX.
            mesh=jax.sharding.get_abstract_mesh() if _manual() else self.mesh,
            axis_names={axis for axis in axes if axis in self.mesh.axis_names},
            in_specs=tuple(partition_spec(a, self.mesh, self.rules) for a in in_axes),
            out_specs=partition_spec(out_axes, self.mesh, self.rules),
            check_vma=False,
        )


ONE_DEVICE = Placement()
"""No mesh: every array is whole on one device."""


def _manual() -> tuple[str, ...]:
    """Mesh axes along which arrays are local where this is called."""
    return tuple(jax.sharding.get_abstract_mesh().manual_axes)


def _free(axis: str | None, mesh: Mesh, rules: Rules) -> tuple[str, ...]:
    """`_mesh_axes`, without those along which arrays are local."""
    manual = _manual()
    return tuple(name for name in _mesh_axes(axis, mesh, rules) if name not in manual)


def _mesh_axes(axis: str | None, mesh: Mesh, rules: Rules) -> tuple[str, ...]:
    rule = None if axis is None else rules[axis]
    axes = (rule,) if isinstance(rule, str) else rule or ()
    return tuple(name for name in axes if name in mesh.axis_names)


def _misfits(
    shape: Sequence[int], logical_axes: Sequence[str | None], mesh: Mesh, rules: Rules
) -> list[str]:
    """The axes that the mesh does not divide, each with the sizes that would."""
    problems = []
    for size, name in zip(shape, logical_axes, strict=True):
        axes = _free(name, mesh, rules)
        parts = math.prod(mesh.shape[axis] for axis in axes)
        if size % parts:
            over = " x ".join(f"{axis}={mesh.shape[axis]}" for axis in axes)
            fits = [str(n) for n in range(1, mesh.size + 1) if size % n == 0]
            problems.append(f"{size} {name} over {over}, where {_either(fits)} divides")
    return problems


def _either(names: list[str]) -> str:
    return " or ".join([", ".join(names[:-1]), names[-1]] if names[1:] else names)
