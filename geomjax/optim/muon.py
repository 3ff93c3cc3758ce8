"""Muon on the matrices of stacked layers, Adam on everything else."""

from collections.abc import Callable
from typing import Any

import optax
from optax.contrib import MuonDimensionNumbers

from geomjax.optim.roles import Role, Roles, map_with_roles
from geomjax.typing import Path


def muon(
    learning_rate: optax.ScalarOrSchedule,
    weight_decay: float = 0.0,
    beta: float = 0.95,
    eps: float = 1e-8,
    ns_steps: int = 5,
    *,
    nesterov: bool = True,
    consistent_rms: float | None = None,
    adam_b1: float = 0.9,
    adam_b2: float = 0.999,
    adam_weight_decay: float = 0.0,
    adam_learning_rate: optax.ScalarOrSchedule | None = None,
    roles: Roles,
) -> optax.GradientTransformation:
    """`optax.contrib.muon` with the matrices taken from the role table.

    Left to itself `optax.contrib.muon` orthogonalises leaves of two axes, and so would
    take stacked norms `[L, D]` for matrices and give the projections `[L, out, in]` to
    Adam. Here leaves of kind "matrix" go to Muon, each matrix of the stack by itself,
    and vectors and embeddings go to AdamW.

    Args:
      learning_rate: a number or a schedule; Adam's as well unless that is given.
      weight_decay: decoupled decay of the matrices.
      beta: decay rate of the momentum.
      eps: added to Muon's norms and to the root of Adam's second moment.
      ns_steps: Newton-Schulz iterations.
      nesterov: Nesterov momentum, in Muon and Adam.
      consistent_rms: scale updates to this root mean square times the learning rate,
        whatever the shape (0.2 resembles AdamW's); None scales by
        `sqrt(max(1, out / in))`.
      adam_b1: decay rate of Adam's first moment.
      adam_b2: decay rate of Adam's second moment.
      adam_weight_decay: decoupled decay of vectors and embeddings.
      adam_learning_rate: for vectors and embeddings; None for `learning_rate`.
      roles: kind and axes of each leaf.

    Returns:
      The transform.

    References:
      Jordan, https://github.com/KellerJordan/Muon; Liu et al., Muon is Scalable for LLM
      Training, arXiv 2502.16982.
    """
    return optax.contrib.muon(
        learning_rate,
        ns_steps=ns_steps,
        beta=beta,
        eps=eps,
        weight_decay=weight_decay,
        nesterov=nesterov,
        adam_b1=adam_b1,
        adam_b2=adam_b2,
        adam_weight_decay=adam_weight_decay,
        adam_learning_rate=adam_learning_rate,
        muon_weight_dimension_numbers=dimension_numbers(roles),
        consistent_rms=consistent_rms,
    )


def dimension_numbers(roles: Roles) -> Callable[[Any], Any]:
    """Muon's axes by role, in the form that `optax.contrib.muon` takes.

    Args:
      roles: kind and axes of each leaf.

    Returns:
      A function from parameters to a tree of `MuonDimensionNumbers` for matrices and
      None for all other leaves. Axes that are neither out nor in are batched.
    """

    def of_leaf(path: Path, leaf: Any, role: Role) -> MuonDimensionNumbers | None:
        del path, leaf
        if role.kind != "matrix":
            return None
        return MuonDimensionNumbers(
            reduction_axis=role.in_axis, output_axis=role.out_axis
        )

    return lambda params: map_with_roles(of_leaf, params, roles)
