"""Floating-point operations of a traced program, loops counted as often as they run.

`cost_analysis` takes the body of a loop once; a jaxpr has the length of each scan.
"""

import math
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np


def matmul_flops(jaxpr: Any) -> float:
    """Operations of a program's matrix products and convolutions, over all devices.

    A product and its sum count as two, whatever the dtype; all else is left out, as in
    `geomjax.models.flops`. What is computed again in a backward pass counts again. A
    `while` loop runs at most as often as the largest whole number that its condition
    compares with, and counts as if it did; a `cond` counts as its dearest branch, and a
    Pallas kernel as if no step of its grid were skipped (of causal attention up to half
    are).

    Args:
      jaxpr: From `jax.make_jaxpr(f)(...)`, or `.jaxpr` of a traced function.

    Returns:
      The count.

    Raises:
      ValueError: A loop has products, and no whole number in its condition.
    """
    return sum(map(_of_equation, _open(jaxpr).eqns), 0.0)


def _of_equation(equation: Any) -> float:
    name, parameters = equation.primitive.name, equation.params
    if name == "dot_general":
        (contracted, _), _ = parameters["dimension_numbers"]
        left = equation.invars[0].aval.shape
        inner = math.prod(left[axis] for axis in contracted)
        return 2.0 * inner * math.prod(equation.outvars[0].aval.shape)
    if name == "conv_general_dilated":
        numbers = parameters["dimension_numbers"]
        kernel = equation.invars[1].aval.shape
        inner = math.prod(kernel) // kernel[numbers.rhs_spec[0]]
        return 2.0 * inner * math.prod(equation.outvars[0].aval.shape)
    if name == "scan":
        return parameters["length"] * matmul_flops(parameters["jaxpr"])
    if name == "while":
        return _of_while(parameters)
    if name == "cond":
        return max(map(matmul_flops, parameters["branches"]))
    inside = sum(map(matmul_flops, _inner(parameters)), 0.0)
    if name == "pallas_call":
        return inside * math.prod(parameters["grid_mapping"].grid)
    if name == "shard_map":
        mesh, manual = parameters["mesh"], parameters["newly_manual_axes"]
        return inside * math.prod(mesh.shape[axis] for axis in manual)
    return inside


def _of_while(parameters: dict[str, Any]) -> float:
    once = matmul_flops(parameters["body_jaxpr"])
    once += matmul_flops(parameters["cond_jaxpr"])
    if once == 0:
        return 0.0
    numbers = list(_whole_numbers(parameters["cond_jaxpr"]))
    if not numbers:
        raise ValueError(
            "a while loop with matrix products has no whole number in its condition;"
            " its length is not known"
        )
    return max(numbers) * once


def _whole_numbers(jaxpr: Any) -> Iterator[int]:
    for equation in _open(jaxpr).eqns:
        for operand in equation.invars:
            value = getattr(operand, "val", None)
            if value is not None and np.ndim(value) == 0:
                if np.issubdtype(np.asarray(value).dtype, np.integer):
                    yield int(value)
        for inner in _inner(equation.params):
            yield from _whole_numbers(inner)


def _inner(parameters: dict[str, Any]) -> list[Any]:
    """The jaxprs among the parameters of an equation."""
    leaves = jax.tree.leaves(list(parameters.values()), is_leaf=_is_jaxpr)
    return [leaf for leaf in leaves if _is_jaxpr(leaf)]


def _is_jaxpr(value: Any) -> bool:
    return hasattr(_open(value), "eqns")


def _open(jaxpr: Any) -> Any:
    return getattr(jaxpr, "jaxpr", jaxpr)
