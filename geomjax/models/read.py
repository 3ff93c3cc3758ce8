"""Reading a checkpoint's tensors straight into their places on the devices."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Sharding, SingleDeviceSharding

from geomjax.checkpoints.sources import CheckpointSource
from geomjax.meshes import ONE_DEVICE, Placement, shardings
from geomjax.models import hf
from geomjax.models.config import ModelConfig
from geomjax.optim.roles import path_of
from geomjax.typing import Params, Path


@dataclasses.dataclass(frozen=True)
class _Shard:
    """What some devices hold of one leaf, on the host until it is whole."""

    index: tuple[slice, ...]
    host: np.ndarray
    devices: list[jax.Device]

    def take(self, place: tuple[int, ...], tensor: np.ndarray) -> bool:
        """Copies the shard's part of the tensor at `place` of the stack, if it has one.

        Returns:
          Whether what was copied is finite in the parameters' dtype.
        """
        depth = len(place)
        stack, inner = self.index[:depth], self.index[depth:]
        within = list(zip(place, stack, strict=True))
        if not all(part.start <= i < part.stop for i, part in within):
            return True
        target = self.host[tuple(i - part.start for i, part in within)]
        with np.errstate(over="ignore"):  # Overflow is reported by name.
            target[...] = tensor[inner]
        return bool(np.isfinite(target).all())


def layout(
    config: ModelConfig, shapes: Params, placement: Placement
) -> dict[Path, Sharding]:
    """Where every parameter goes: over a mesh, or whole on the default device.

    Args:
      config: The model's configuration.
      shapes: The parameters' shapes, `model.shapes`.
      placement: The mesh and its table, or one device.

    Returns:
      A sharding for each path.

    Raises:
      ValueError: The mesh does not divide the parameters, or the heads, which are split
        whole (all named).
    """
    paths = [rule.path for rule in hf.rules(config)]
    if placement.mesh is None:
        return dict.fromkeys(paths, SingleDeviceSharding(jax.local_devices()[0]))
    roles = hf.roles(config)
    axes = {path: roles[path].logical_axes for path in paths}
    sizes = {path: hf.leaf(shapes, path).shape for path in paths}
    heads: dict[Path, tuple[int]] = {("heads",): (config.text.num_heads,)}
    if config.text.latent is None:
        heads[("kv_heads",)] = (config.text.num_kv_heads,)
    found = shardings(
        axes | {name: name for name in heads},
        sizes | heads,
        placement.mesh,
        placement.rules,
    )
    return {path: found[path] for path in paths}


def placed_shapes(
    config: ModelConfig, shapes: Params, dtype: Any, placement: Placement
) -> Params:
    """The parameters that `read_params` would return, as `jax.ShapeDtypeStruct`.

    With their shardings, so that a program is compiled for them without any device.

    Args:
      config: The model's configuration.
      shapes: The parameters' shapes, `model.shapes`.
      dtype: Of the parameters.
      placement: The mesh and its table, or one device.

    Raises:
      ValueError: As `layout`.
    """
    places = layout(config, shapes, placement)
    return jax.tree_util.tree_map_with_path(
        lambda keys, leaf: jax.ShapeDtypeStruct(
            leaf.shape, dtype, sharding=places[path_of(keys)]
        ),
        shapes,
    )


def read_params(
    source: CheckpointSource,
    config: ModelConfig,
    shapes: Params,
    dtype: Any,
    placement: Placement = ONE_DEVICE,
) -> Params:
    """Reads a checkpoint into stacked parameters, one leaf after another.

    Every tensor is read once. Of a leaf, the host holds what its own devices will hold,
    and no more than one leaf at a time. In a program of several processes each reads
    the tensors that its devices need.

    Args:
      source: The checkpoint's tensors, under any names that the family has.
      config: The model's configuration.
      shapes: The parameters' shapes, `model.shapes`.
      dtype: Of the parameters; float32 holds bfloat16 and float16 exactly.
      placement: Where to put them; by default whole on the first device.

    Returns:
      The parameters, laid out by the table of `geomjax.meshes`.

    Raises:
      ValueError: Names or shapes do not fit, the mesh does not divide them, or a value
        is not finite in `dtype`; all of each kind are listed.
    """
    source = hf.published(source, config)
    hf.check_names(source, config, shapes)
    places = layout(config, shapes, placement)
    params: Params = {}
    overflown: list[str] = []
    for rule in hf.rules(config):
        shape = hf.leaf(shapes, rule.path).shape
        shards = _shards(places[rule.path], shape, dtype)
        stack = np.ndindex(*rule.stack_shape(config))
        overflown += _fill(source, shards, rule.names(config), stack)
        hf.insert(params, rule.path, _place(shards, shape, places[rule.path]))
    if overflown:
        raise ValueError(
            f"values that are not finite in {np.dtype(dtype).name}: "
            + ", ".join(overflown)
        )
    return params


def _shards(sharding: Sharding, shape: tuple[int, ...], dtype: Any) -> list[_Shard]:
    """The different parts of a leaf that this process's devices hold, still empty."""
    shards: dict[tuple[tuple[int, int], ...], _Shard] = {}
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        parts = zip(index or (), shape, strict=True)
        bounds = tuple(part.indices(size)[:2] for part, size in parts)
        if bounds not in shards:
            whole = tuple(slice(*bound) for bound in bounds)
            host = np.empty([stop - start for start, stop in bounds], dtype)
            shards[bounds] = _Shard(whole, host, [])
        shards[bounds].devices.append(device)
    return list(shards.values())


def _fill(
    source: CheckpointSource,
    shards: list[_Shard],
    names: Sequence[str],
    places: Iterator[tuple[int, ...]],
) -> list[str]:
    """Reads the tensors of one leaf; returns those that are not finite."""
    overflown = []
    for i, (name, place) in enumerate(zip(names, places, strict=True)):
        if i + 1 < len(names):
            source.prefetch(names[i + 1])
        tensor = source.read(name)
        if not all([shard.take(place, tensor) for shard in shards]):
            overflown.append(name)
        source.release(name)
    return overflown


def _place(
    shards: list[_Shard], shape: tuple[int, ...], sharding: Sharding
) -> jax.Array:
    """Copies the parts of a leaf to their devices, and empties the host's list."""
    if isinstance(sharding, SingleDeviceSharding):
        # Not committed to its device, so that it computes with what lies elsewhere.
        whole = jax.device_put(shards[0].host)
    else:
        arrays = [
            jax.device_put(shard.host, device)
            for shard in shards
            for device in shard.devices
        ]
        whole = jax.make_array_from_single_device_arrays(shape, sharding, arrays)
    jax.block_until_ready(whole)
    shards.clear()
    jax.device_put(np.zeros(()))  # JAX lets go of the host's buffers at its next call.
    return whole
