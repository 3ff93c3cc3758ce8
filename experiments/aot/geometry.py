"""The programs that analyse an update of the student, compiled for a slice."""

import jax
import numpy as np
from jax.sharding import Mesh

from experiments.aot.measure import (
    Measured,
    chip_bytes,
    refusal,
    sent_by_kind,
    stopwatch,
)
from geomjax.analysis.measure import StackPlan, programs_of
from geomjax.analysis.metrics import DEFAULT
from geomjax.analysis.programs import Layout, Program
from geomjax.analysis.stacks import block_columns, sides
from geomjax.models.decoder import Decoder

DTYPE = "bfloat16"
"""As the papers' checkpoints are stored."""


def layouts(model: Decoder, devices: int) -> dict[Layout, int]:
    """Shapes of the stacks in which the tensors of a checkpoint are measured.

    Args:
      model: The model whose checkpoints are compared.
      devices: Devices that share a stack; each has one matrix of it.

    Returns:
      Layouts, each with the number of axes of its tensors.
    """
    shapes = {leaf.shape for leaf in jax.tree.leaves(model.shapes["layers"])}
    shapes = {shape[1:] for shape in shapes}
    shapes |= {
        leaf.shape
        for name, part in model.shapes.items()
        if name != "layers"
        for leaf in jax.tree.leaves(part)
    }
    lengths: dict[tuple[int, int], list[int]] = {}
    for shape in shapes:
        r, long = sides(shape)
        lengths.setdefault((r, len(shape)), []).append(long)
    return {
        Layout(devices, r, block_columns(r, longs), DTYPE, DTYPE): axes
        for (r, axes), longs in sorted(lengths.items(), reverse=True)
    }


def measure_geometry(model: Decoder, devices: list[jax.Device]) -> Measured:
    """Compiles what the default metrics run on the devices, as the analysis does.

    Eigenproblems are solved on the hosts and are no part of it. Products are in
    float64, which the compiler makes of products of bfloat16 parts; these operations
    are not counted.

    Args:
      model: The model whose checkpoints are compared.
      devices: Of the slice.

    Returns:
      The most memory that any of the programs takes, and what all of them send, each
      taken once: nothing, as a chip measures its own matrices.
    """
    spent = stopwatch()
    mesh = Mesh(np.asarray(devices), ("stack",))
    plan = StackPlan("stored", "bfloat16", DEFAULT)
    with jax.enable_x64(True):
        started = [
            program
            for layout, axes in layouts(model, len(devices)).items()
            for program in vars(programs_of(layout, axes, plan, mesh)).values()
            if isinstance(program, Program)
        ]
    try:
        compiled = [program.compiled() for program in started]
    except jax.errors.JaxRuntimeError as error:
        return Measured(*spent(), None, refusal(error), None, {})
    seconds = spent()
    sent: dict[str, float] = {}
    for program in compiled:
        for kind, count in sent_by_kind(program.as_text()).items():
            sent[kind] = sent.get(kind, 0.0) + count
    most = max(chip_bytes(program) for program in compiled)
    return Measured(*seconds, most, "", None, sent)
