"""The default metrics at Qwen3-1.7B's shapes, compiled for TPU v5e without a TPU.

Needs libtpu (the `tpu` extra), whose compiler runs on any Linux machine. What does not
lower in reasonable time are eigenproblems: XLA's Jacobi solver takes minutes to compile
from a few hundred rows on. So the engine solves them on the host, and what is compiled
here is all that it runs on devices: the passes over blocks, in float64, which XLA
emulates there (a product becomes a loop over products of bfloat16 parts; how accurate
that is was not measured).
"""

# ruff: noqa: T201
import importlib.util
import math
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from geomjax.analysis import large, passes
from geomjax.analysis.measure import StackPlan, programs_of
from geomjax.analysis.metrics import DEFAULT
from geomjax.analysis.programs import Layout, Program
from geomjax.analysis.rounds import Block
from geomjax.analysis.stacks import block_columns, sides
from geomjax.geometry import certify, krylov

SHAPES = {
    "q_proj": (2048, 2048),
    "k_proj": (1024, 2048),
    "o_proj": (2048, 2048),
    "gate_proj": (6144, 2048),
    "down_proj": (2048, 6144),
    "embed_tokens": (151936, 2048),
}
BF16 = ("bfloat16", "bfloat16")
CHIPS = 4
HBM = 16 << 30
COLLECTIVES = ("all-gather", "all-reduce", "all-to-all", "collective-permute")
SECONDS = 300
"""Of processor time, over all threads: five minutes even if one core did it all."""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("libtpu") is None,
        reason="needs libtpu: pip install geomjax[tpu]",
    ),
]


@pytest.fixture(scope="module")
def chips():
    from jax.experimental import topologies

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TPU_SKIP_MDS_QUERY", "1")
        patch.setenv("TPU_ACCELERATOR_TYPE", "v5litepod-16")
        patch.setenv("TPU_WORKER_HOSTNAMES", "localhost")
        patch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
        topology = topologies.get_topology_desc("v5e:4x4", "tpu")
        yield topology.devices[:CHIPS]


class _Compiler:
    """Compiles in two threads, and notes time and memory of each program."""

    def __init__(self):
        self._threads = ThreadPoolExecutor(2)
        self._tasks = []

    def add(self, name, f, *args):
        self._tasks.append((name, self._threads.submit(_compile, f, args)))

    def finish(self):
        """Name, seconds, bytes on a chip and text of each, in order."""
        with self._threads:
            return [(name, *task.result()) for name, task in self._tasks]


def _compile(f, args):
    with jax.enable_x64(True):
        start = time.perf_counter()
        program = jax.jit(f).lower(*args).compile()
        seconds = time.perf_counter() - start
    return seconds, _size(program), program.as_text()


def _placed(tree, sharding):
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree
    )


def _size(program):
    """Bytes that a program takes on a chip."""
    memory = program.memory_analysis()
    return (
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        + memory.temp_size_in_bytes
        - memory.alias_size_in_bytes
    )


def test_the_default_metrics_at_the_shapes_of_qwen3_1_7b(chips, capsys):
    assert {chip.platform for chip in chips} == {"tpu"}
    mesh = Mesh(np.asarray(chips), ("stack",))
    lengths: dict[int, list[int]] = {}
    for shape in SHAPES.values():
        r, long = sides(shape)
        lengths.setdefault(r, []).append(long)
    start, busy = time.perf_counter(), time.process_time()
    plan, layouts = StackPlan("stored", "bfloat16", DEFAULT), []
    for r, longs in sorted(lengths.items(), reverse=True):
        layouts.append((Layout(CHIPS, r, block_columns(r, longs), *BF16), 2))
    layouts.append((Layout(CHIPS, 1, 2048, *BF16), 1))
    with jax.enable_x64(True):
        # The engine's own, whatever they are: all that it runs on the devices.
        compiled = {
            f"r={layout.r} {name}": program
            for layout, ndim in layouts
            for name, program in vars(programs_of(layout, ndim, plan, mesh)).items()
            if isinstance(program, Program)
        }
    results = [(name, program.compiled()) for name, program in compiled.items()]
    total, busy = time.perf_counter() - start, time.process_time() - busy
    largest = max(_size(program) for _, program in results)
    with capsys.disabled():
        print()
        for name, program in results:
            print(f"{name:24s}{_size(program) / 2**30:7.2f} of 16 GiB a chip")
        print(f"all: {total:.1f} s, {busy:.1f} s of processor time")
    assert len(results) == 4 * len(layouts)
    for name, program in results:
        text = program.as_text()
        assert not any(word in text for word in COLLECTIVES), name
        assert not any(word in text.lower() for word in ("eigh", "jacobi")), name
    assert largest < HBM
    # The vectors of the embedding, kept between passes, would not fit beside the rest;
    # the stored matrices do: both sides of the embedding are 1.2 GiB.
    assert 4 * math.prod(SHAPES["embed_tokens"]) + largest < HBM
    assert busy < SECONDS


def test_the_programs_for_large_matrices(chips, capsys):
    r, columns, rows = 24576, 128, 64
    effort = large.Effort()
    mesh = Mesh(np.asarray(chips), ("x",))
    shared = NamedSharding(mesh, PartitionSpec("x"))
    whole = NamedSharding(mesh, PartitionSpec())
    one = SingleDeviceSharding(chips[0])
    length = effort.block * effort.depth
    with jax.enable_x64(True):

        def wide(*shape):
            return jax.ShapeDtypeStruct(shape, jnp.float64)

        stored = jax.ShapeDtypeStruct((CHIPS, r, columns), jnp.bfloat16)
        counts = jax.ShapeDtypeStruct((CHIPS,), jnp.int32)
        key = jax.eval_shape(jax.random.key, 0)
        basis = krylov.Basis(wide(length, r), wide(length, r))
        block = wide(effort.block, r)
        probes = certify.Probes(
            wide(rows, effort.k),
            wide(rows, r),
            wide(rows, r),
            wide(rows, effort.steps),
            wide(rows, effort.steps),
        )
        apply = passes.application("stored", "bfloat16", mesh)
        compiler = _Compiler()
        compiler.add(
            "apply",
            apply,
            _placed(wide(CHIPS, 3, rows, r), shared),
            _placed(Block(stored, stored, counts), shared),
            _placed(wide(3, rows, r), whole),
        )
        index = jax.ShapeDtypeStruct((), jnp.int32)
        for name, f, args in (
            ("extend", krylov.extend, (basis, index, block, block, key)),
            ("compress", krylov.compress, (basis,)),
            (
                "rotate",
                partial(krylov.rotate, k=effort.k),
                (basis, wide(length), wide(length, length)),
            ),
            (
                "advance",
                certify.advance,
                (probes, index, wide(rows, r), wide(effort.k, r)),
            ),
        ):
            compiler.add(name, f, *_placed(args, one))
    busy = time.process_time()
    results = compiler.finish()
    busy = time.process_time() - busy
    with capsys.disabled():
        print()
        for name, seconds, size, _ in results:
            print(f"{name:24s}{seconds:7.1f} s {size / 2**30:7.2f} GiB a chip")
    for name, _, size, text in results:
        assert size < HBM, name
        assert not any(word in text for word in COLLECTIVES), name
    assert busy < SECONDS
