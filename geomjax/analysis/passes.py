"""Passes over the blocks of one matrix that all devices of a mesh share.

The programs of `rounds` keep the matrices of a stack apart; here the devices stand in
their place: each adds up the blocks that it holds, and the devices' sums are added up
at the end of a pass, which is all that is communicated.
"""

from collections.abc import Callable
from functools import lru_cache, partial
from operator import itemgetter
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from geomjax.analysis import rounds
from geomjax.analysis.measure import StackPlan
from geomjax.analysis.needs import Needs
from geomjax.analysis.rounds import Block, Plan
from geomjax.geometry.blocks import transpose
from geomjax.geometry.factor import matmul
from geomjax.update import Delta, Subtract, form


class Passes:
    """The blocks of one matrix on their devices, and sums over them.

    Args:
        blocks: of a stack of this one matrix, of depth 1; the list is emptied as they
            are moved.
        plan: how D is formed.
        mesh: the devices; None: the default one.
    """

    def __init__(self, blocks: list[Block], plan: StackPlan, mesh: Mesh | None):
        self._plan, self._mesh = plan, mesh
        self._count = 1 if mesh is None else mesh.size
        self._shared = self._whole = None
        if mesh is not None:
            self._shared = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
            self._whole = NamedSharding(mesh, PartitionSpec())
        self._blocks = []
        while blocks:
            group = [blocks.pop(0) for _ in range(min(self._count, len(blocks)))]
            shared = _side_by_side(group, self._count)
            self._blocks.append(jax.device_put(shared, self._shared))
        self._apply = application(plan.delta, plan.subtract, mesh)

    def sum(self, f: Callable[..., Any], needs: Needs, *carried: Any) -> Any:
        """A pass of `rounds` over all blocks.

        Args:
            f: `rounds.first`, `second` or `third`.
            needs: what it is to gather.
            *carried: its arguments between the total and the vectors, if it has any.

        Returns:
            Its sums, on the host.
        """
        plan = Plan(self._plan.delta, self._plan.subtract, needs)

        def copies(x):
            return np.repeat(np.asarray(x), self._count, axis=0)

        placed = jax.device_put(jax.tree.map(copies, carried), self._shared)
        program, total = _pass(f, plan, self._mesh), None
        for block in self._blocks:
            part = program(block, *placed)
            total = part if total is None else _add(total, part)
        each_device = range(self._count)
        total = jax.device_get(total)
        return rounds.combine(
            [jax.tree.map(itemgetter(slice(i, i + 1)), total) for i in each_device]
        )

    def images(self, rows: Float[Array, "s l r"]) -> Float[Array, "s l r"]:
        """Rows times the Gram matrices of W, W' and D, in one pass over the blocks."""
        total = np.zeros((self._count, *rows.shape), rows.dtype)
        total = jax.device_put(total, self._shared)
        rows = jax.device_put(rows, self._whole)
        for block in self._blocks:
            total = self._apply(total, block, rows)
        return jnp.asarray(jax.device_get(total).sum(axis=0))


@lru_cache(maxsize=64)
def _pass(f: Callable[..., Any], plan: Plan, mesh: Mesh | None) -> Callable[..., Any]:
    """A pass of `rounds` over one block of each device, with the vectors it needs."""

    def step(block, *carried):
        if not carried:
            return f(None, block, plan=plan)
        vectors = rounds.vectors(carried[0], block, plan=plan)
        return f(None, *carried, vectors, block, plan=plan)

    if mesh is None:
        return jax.jit(step)
    spec = PartitionSpec(mesh.axis_names)
    return jax.jit(
        jax.shard_map(step, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
    )


@lru_cache(maxsize=8)
def application(
    delta: Delta, subtract: Subtract, mesh: Mesh | None
) -> Callable[..., Any]:
    """The program of `Passes.images` for one block of each device."""
    step = partial(_apply, delta=delta, subtract=subtract)
    if mesh is not None:
        spec = PartitionSpec(mesh.axis_names)
        step = jax.shard_map(
            step,
            mesh=mesh,
            in_specs=(spec, spec, PartitionSpec()),
            out_specs=spec,
            check_vma=False,
        )
    return jax.jit(step, donate_argnums=0)


def _side_by_side(blocks: list[Block], count: int) -> Block:
    """Blocks as a stack of `count`, filled up with empty ones."""
    empty = jax.tree.map(np.zeros_like, blocks[0])
    blocks = blocks + [empty] * (count - len(blocks))
    return Block(*(np.concatenate(parts) for parts in zip(*blocks, strict=True)))


def _apply(
    total: Float[Array, "p s l r"],
    block: Block,
    rows: Float[Array, "s l r"],
    *,
    delta: Delta,
    subtract: Subtract,
) -> Float[Array, "p s l r"]:
    """Adds a block's part of the products with the three Gram matrices."""
    sides = form(block.source, block.tuned, delta=delta, subtract=subtract)
    parts = []
    for i, side in enumerate(sides):
        x = side.astype(rows.dtype)
        parts.append(matmul(matmul(rows[i][None], x), transpose(x)))
    return total + jnp.stack(parts, axis=1)


def _add(a: Any, b: Any) -> Any:
    total = jax.tree.map(lambda x, y: x + y, a, b)
    if isinstance(a, rounds.First):
        total = total._replace(largest=jnp.maximum(a.largest, b.largest))
    return total
