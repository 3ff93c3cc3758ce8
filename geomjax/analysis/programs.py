"""The compiled programs of one layout, and the loop over a stack's blocks.

Programs are compiled ahead of their first use, several at a time: XLA compiles outside
of Python's lock, and half of a short run would be spent in it otherwise.
"""

import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from geomjax.analysis import between, rounds
from geomjax.analysis.between import Finished, Sizes, Values
from geomjax.analysis.needs import Needs
from geomjax.analysis.rounds import Block, Cuts, First, Known, Plan
from geomjax.geometry.factor import Factors

_TOTALS = 2
"""Totals of a pass, and so blocks of a stack that are computed at the same time."""
_MOST_SHARED = 4096
"""Short side up to which there are so many: Gram matrices of larger ones weigh more."""


class Layout(NamedTuple):
    """Shape and dtypes of the blocks of a stack.

    Attributes:
        depth: matrices in the stack.
        r: their short side.
        columns: columns of a block.
        source_dtype: storage dtype of W.
        tuned_dtype: that of W'.
    """

    depth: int
    r: int
    columns: int
    source_dtype: str
    tuned_dtype: str


class Measured(NamedTuple):
    """Everything that is fetched of a stack; what was not needed is None."""

    first: First
    values: Values
    below: Any
    finished: Finished | None


class Programs:
    """The programs of `rounds` for one layout, plan and placement.

    Args:
        layout: shape and dtypes of the blocks.
        plan: how D is formed, and what is needed.
        mesh: devices over which the stack is spread; None: the default device.
    """

    def __init__(self, layout: Layout, plan: Plan, mesh: Mesh | None):
        self.layout, self.plan, self.mesh = layout, plan, mesh
        self._placement = (
            None
            if mesh is None
            else NamedSharding(mesh, PartitionSpec(mesh.axis_names))
        )
        self._compile()

    def _compile(self) -> None:
        needs = self.plan.needs
        depth, r, columns = self.layout[:3]
        block = Block(
            jax.ShapeDtypeStruct((depth, r, columns), self.layout.source_dtype),
            jax.ShapeDtypeStruct((depth, r, columns), self.layout.tuned_dtype),
            jax.ShapeDtypeStruct((depth,), np.int32),
        )
        add = partial(self._start, donate=True)
        first, self.first = add(rounds.first, None, block)
        self.zeros = [first]
        if not needs.second_pass:
            return
        known, cuts = _known(depth, r, needs), _cuts(depth, needs)
        vectors, self.vectors = self._start(rounds.vectors, known, block)
        second, self.second = add(rounds.second, None, known, vectors, block)
        third, self.third = add(
            rounds.third, None, known, second.cosines, cuts, vectors, block
        )
        self.zeros += [second, third]

    def _start(
        self, function: Callable[..., Any], *args: Any, donate: bool = False
    ) -> tuple[Any, "Program"]:
        """Shapes of the result, and the program, which compiles in the background."""
        function = partial(function, plan=self.plan)
        out = jax.eval_shape(function, *args)
        if donate:
            args = (out, *args[1:])
        if self.mesh is not None:
            spec = PartitionSpec(self.mesh.axis_names)
            function = jax.shard_map(
                function,
                mesh=self.mesh,
                in_specs=spec,
                out_specs=spec,
                check_vma=False,
            )
            args = jax.tree.map(
                lambda x: jax.ShapeDtypeStruct(
                    x.shape, x.dtype, sharding=self._placement
                ),
                args,
            )
        jitted = jax.jit(function, donate_argnums=0 if donate else ())
        return out, Program(jitted, args)

    def put(self, tree: Any) -> Any:
        """Moves arrays of the host to where the programs want them."""
        return jax.device_put(tree, self._placement)

    def sums(self, index: int, blocks: int) -> "Sums":
        """Zeros to which a pass over so many blocks adds."""

        def zeros():
            shapes = self.zeros[index]
            return self.put(jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes))

        count = 1 if self.layout.r > _MOST_SHARED else min(_TOTALS, blocks)
        return Sums([zeros() for _ in range(count)])

    def measure(self, blocks: list[Block], sizes: Sizes, *, keep: bool) -> Measured:
        """Runs the three passes over the blocks of a stack.

        Args:
            blocks: the blocks, on the host; the list is emptied as they are moved.
            sizes: of the tensors, and of what fills the stack up.
            keep: keep `rounds.Vectors` between the passes, rather than compute them
                again.

        Returns:
            The results, on the host.
        """
        needs, plan = self.plan.needs, self.plan
        placed, sums = [], self.sums(0, len(blocks))
        while blocks:
            placed.append(self.put(blocks.pop(0)))
            sums.add(self.first, placed[-1])
        first = between.counted(sums.total(), plan)
        solved = between.solve(first, sizes, plan)
        beside = between.begin(first, solved, needs)
        below, finished = solved.below, None
        if needs.second_pass:
            known = self.put(solved.known)
            kept: list[Any] = []
            sums = self.sums(1, len(placed))
            for block in placed:
                vectors = self.vectors(known, block)
                sums.add(self.second, known, vectors, block)
                if keep:
                    kept.append(vectors)
            second = sums.total()
            ends = between.cut(solved, second, sizes, needs)
            cosines, cuts = self.put((second.cosines, ends.cuts))
            sums = self.sums(2, len(placed))
            for i, block in enumerate(placed):
                vectors = kept[i] if keep else self.vectors(known, block)
                if keep:
                    kept[i] = None
                sums.add(self.third, known, cosines, cuts, vectors, block)
                del vectors
            third = sums.total()
            finished = between.finish(solved, beside, second, ends, third, sizes, needs)
            below = second.below if below is None else below
        return Measured(first.small, between.values(solved, beside), below, finished)


class Sums:
    """The totals of a pass, to which blocks are added in turn.

    A block need not wait for the one before it: on a CPU, where much of a pass runs on
    one core, two of them run at the same time. Which total a block is added to is its
    place alone, so that the sums are the same on every machine.
    """

    def __init__(self, totals: list[Any]):
        self._totals, self._added = totals, 0

    def add(self, program: Callable[..., Any], *args: Any) -> None:
        """Adds what a program finds in a block."""
        place = self._added % len(self._totals)
        self._totals[place] = program(self._totals[place], *args)
        self._added += 1

    def total(self) -> Any:
        """Their sum, on the host."""
        return rounds.combine([jax.device_get(part) for part in self._totals])


def _known(depth: int, r: int, needs: Needs) -> Known:
    """Shapes of what the later passes must know of the first."""
    wide, single = jnp.result_type(float), np.float32

    def factors(k):
        shapes = ((depth, r), (depth, k, r), (depth, k))
        return None if k is None else Factors(*(_shape(s, wide) for s in shapes))

    def table(columns, dtype):
        return _shape((depth, len(columns)), dtype) if columns else None

    return Known(
        factors(needs.source_directions),
        factors(needs.tuned_directions),
        table(needs.rms_tolerances, single),
        table(needs.masks, np.int32),
        table(needs.coordinate_fractions, np.int32),
    )


def _cuts(depth: int, needs: Needs) -> Cuts:
    """Shapes of what the third pass must know of the second."""
    masks = (depth, len(needs.masks))
    coordinates = (depth, len(needs.coordinate_fractions))
    return Cuts(
        _shape(masks, np.uint32) if masks[1] else None,
        _shape(masks, np.int32) if masks[1] else None,
        _shape(coordinates, np.uint32) if coordinates[1] else None,
    )


_shape = jax.ShapeDtypeStruct


class Program:
    """A jitted function that is being compiled for arguments of known shapes."""

    def __init__(self, jitted: Callable[..., Any], args: Sequence[Any]):
        self._future: Future[Any] = _compilers().submit(_compile, jitted, args)

    def __call__(self, *args: Any) -> Any:
        """Runs it, once it is there."""
        return self._future.result()(*args)

    def compiled(self) -> Any:
        """The compiled program, once it is there."""
        return self._future.result()


def _compile(jitted: Any, args: Sequence[Any]) -> Any:
    with jax.enable_x64(True):
        return jitted.lower(*args).compile()


@lru_cache(maxsize=1)
def _compilers() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(max(2, os.cpu_count() or 2), thread_name_prefix="compile")


def programs(layout: Layout, plan: Plan, mesh: Mesh | None = None) -> Programs:
    """The programs, compiled once in a process; call it under `enable_x64(True)`."""
    with _lock:
        return _programs(layout, plan, mesh)


_lock = threading.Lock()
_programs = lru_cache(maxsize=256)(Programs)
