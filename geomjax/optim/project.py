"""Training inside a fixed subspace: the rank-k runs of P2."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from geomjax.optim.roles import Role, Roles, dotted, map_with_roles, path_of
from geomjax.typing import Path


class ProjectState(NamedTuple):
    """State of `project_updates`.

    Attributes:
      basis: as in `project_updates`.
      inner_state: state of the wrapped transform.
    """

    basis: Any
    inner_state: Any


def project_updates(
    basis: Any, roles: Roles, tx: optax.GradientTransformation | None = None
) -> optax.GradientTransformationExtraArgs:
    r"""Trains each matrix inside the right subspace that its basis spans.

    P2 (arXiv 2606.07082) constrains training with :math:`g \leftarrow g V_k V_k^T`, and
    does not say which parameters that is done to, nor what becomes of the optimizer's
    state. Here, with V the basis of a matrix W `[m, n]` and T the wrapped transform:

    .. math::
      u = T(g V V^T) \, V V^T, \qquad W \leftarrow W + u

    - Matrices with a basis are projected twice. The first projection comes before
      everything in `tx`: clipping sees the norm of what is left, and a first moment
      stays in the subspace. The second comes after everything, because Adam's division
      by :math:`\sqrt v` acts on coordinates and leaves the subspace, and so does
      decoupled weight decay unless W lies in it. With SGD, momentum included, the
      second changes nothing, and u is P2's update exactly.
    - The second moment is that of the projected gradient in the coordinates of W, as in
      P2's formula, and not of the k coordinates inside the subspace.
    - Leaves whose basis is None (vectors, and all that the caller leaves out) are
      trained as without this transform; wrap `freeze` around `tx` to hold them.
    - A state that is taken over from an unconstrained run keeps moments outside the
      subspace, which decay; their update is projected too.

    So :math:`W_t - W_0` stays in the subspace up to the rounding of the parameters
    themselves: in float32 about :math:`6 \cdot 10^{-8} \|W\|` a step.

    Runs that differ in their bases alone share one compiled step, as the basis is part
    of the state and read from there.

    Args:
      basis: a tree shaped as the parameters; each leaf V `[*stack, n, k]` with
        orthonormal columns, or None.
      roles: the role table: stack depth and axes of each leaf.
      tx: the transform to wrap. None wraps the identity.

    Returns:
      The transform. Its `init` raises ValueError, with every leaf concerned, if the
      basis does not fit the parameters: names or shapes of another model, a basis for
      what is no matrix, a rank above min(m, n), or columns that are not orthonormal.
    """
    inner = optax.with_extra_args_support(optax.identity() if tx is None else tx)

    def init(params: Any) -> ProjectState:
        if not jax.tree.leaves(params):  # optax.tree.map_params's placeholder
            return ProjectState(params, inner.init(params))
        check_basis(basis, params, roles)
        copied = jax.tree.map(lambda v: jnp.array(v, copy=True), basis)
        return ProjectState(copied, inner.init(params))

    def update(
        updates: Any, state: ProjectState, params: Any = None, **extra_args: Any
    ) -> tuple[Any, ProjectState]:
        gradients = _project(state.basis, updates)
        updates, inner_state = inner.update(
            gradients, state.inner_state, params, **extra_args
        )
        return _project(state.basis, updates), ProjectState(state.basis, inner_state)

    return optax.GradientTransformationExtraArgs(init, update)


def right_projection(
    matrix: Float[Array, "*p m n"], basis: Float[Array, "*p n k"]
) -> Float[Array, "*p m n"]:
    """`X V V^T`, in the dtype of X and full precision."""
    basis = basis.astype(matrix.dtype)
    highest = jax.lax.Precision.HIGHEST
    coordinates = jnp.matmul(matrix, basis, precision=highest)
    return jnp.matmul(coordinates, jnp.swapaxes(basis, -1, -2), precision=highest)


def _project(basis: Any, tree: Any) -> Any:
    return jax.tree.map(
        lambda v, x: x if v is None else right_projection(x, v),
        basis,
        tree,
        is_leaf=lambda v: v is None,
    )


def check_basis(basis: Any, params: Any, roles: Roles) -> None:
    """Raises ValueError with every part of a basis that does not fit the parameters."""
    shapes: dict[Path, tuple[Role, tuple[int, ...]]] = {}

    def note(path: Path, leaf: Any, role: Role) -> None:
        shapes[path] = role, leaf.shape

    map_with_roles(note, params, roles)
    problems, covered, projected = [], set(), 0
    for keys, v in jax.tree_util.tree_leaves_with_path(
        basis, is_leaf=lambda v: v is None
    ):
        path = path_of(keys)
        if path not in shapes:
            problems.append(f"{dotted(path)}: no such parameter")
            continue
        covered.add(path)
        if v is not None:
            projected += 1
            problem = _problem(v, *shapes[path])
            problems += [] if problem is None else [f"{dotted(path)}: {problem}"]
    problems += [
        f"{dotted(path)}: no basis (None trains it throughout)"
        for path in shapes
        if path not in covered
    ]
    if not problems and not projected:
        problems.append("it is None throughout, and would constrain nothing")
    if problems:
        raise ValueError(
            "the basis does not fit the parameters:\n  " + "\n  ".join(problems)
        )


def _problem(v: Any, role: Role, shape: tuple[int, ...]) -> str | None:
    """What is wrong with the basis of one leaf."""
    if role.kind == "vector":
        return "a vector has no right subspace; its basis must be None"
    if (role.out_axis, role.in_axis) != (-2, -1):
        return f"its axes are {role.out_axis} and {role.in_axis}, expected -2 and -1"
    *stack, m, n = shape
    if v.ndim != len(shape) or v.shape[:-1] != (*stack, n):
        return f"got {list(v.shape)}, expected {[*stack, n, 'k']}"
    k = v.shape[-1]
    if not 1 <= k <= min(m, n):
        return f"rank {k} of a matrix [{m}, {n}]; expected 1 to {min(m, n)}"
    if isinstance(v, jax.core.Tracer):  # Its numbers are not known yet.
        return None
    wide = np.asarray(v, np.float64)
    error = np.abs(np.swapaxes(wide, -1, -2) @ wide - np.eye(k)).max()
    if not error < 1e-4:
        return f"its columns are not orthonormal (by {error:.1e})"
    return None
