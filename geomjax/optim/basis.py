"""Bases for `project_updates`: of an update, random, or from disk."""

import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from geomjax.checkpoints import CheckpointError, SafetensorsSource, write_safetensors
from geomjax.optim.project import check_basis
from geomjax.optim.roles import Kind, Role, Roles, dotted, map_with_roles, path_of
from geomjax.typing import Path, PRNGKey


def leading_right_basis(
    delta: Any, rank: int, roles: Roles, kinds: tuple[Kind, ...] = ("matrix",)
) -> Any:
    """The first k right singular vectors of each matrix of an update.

    P2 takes k = 16 and the update at about 20 % of training. The singular value
    decompositions are NumPy's, in float64, of a stack's matrices at the same time.

    Args:
      delta: an update, a tree shaped as the parameters.
      rank: k.
      roles: the role table.
      kinds: kinds of parameter to give a basis; the others get None. P2 does not say
        which it projects; ours are the matrices without embedding and unembedding.

    Returns:
      A tree of float32 `[*stack, n, k]` and None.

    Raises:
      ValueError: k below 1 or above a matrix's smaller dimension, or an update with
        fewer directions than k; names every leaf.
    """
    problems: list[str] = []

    def of_leaf(path: Path, leaf: Any, role: Role) -> Any:
        if role.kind not in kinds:
            return None
        if not _has_rank(path, leaf.shape, rank, problems):
            return None
        wide = np.asarray(leaf, np.float64)
        stack = wide.reshape(-1, *wide.shape[-2:])
        values, right = map(np.stack, zip(*workers.map(_svd, stack), strict=True))
        least, largest = values[:, rank - 1], values[:, 0]
        if (least <= largest * np.finfo(np.float64).eps * max(leaf.shape)).any():
            problems.append(
                f"{dotted(path)}: the update has fewer than {rank} directions"
            )
        columns = np.swapaxes(right[:, :rank], -1, -2).astype(np.float32)
        return columns.reshape(*wide.shape[:-2], *columns.shape[1:])

    # LAPACK works outside of Python's lock.
    with ThreadPoolExecutor(os.cpu_count()) as workers:
        basis = map_with_roles(of_leaf, delta, roles)
    _raise(problems, rank)
    return basis


def _svd(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Singular values, and right singular vectors as rows."""
    return np.linalg.svd(matrix, full_matrices=False)[1:]


def random_basis(
    key: PRNGKey,
    params: Any,
    rank: int,
    roles: Roles,
    kinds: tuple[Kind, ...] = ("matrix",),
) -> Any:
    """A uniformly random subspace of the same rank for each matrix.

    Args:
      key: PRNG key; a leaf's draw depends on it and on the leaf's place in the tree.
      params: the parameters, for their shapes.
      rank: k.
      roles: the role table.
      kinds: as in `leading_right_basis`.

    Returns:
      A tree of float32 `[*stack, n, k]` and None.

    Raises:
      ValueError: k below 1 or above a matrix's smaller dimension; names every leaf.
    """
    problems: list[str] = []
    count = iter(range(len(jax.tree.leaves(params))))

    def of_leaf(path: Path, leaf: Any, role: Role) -> Any:
        place = next(count)
        if role.kind not in kinds:
            return None
        if not _has_rank(path, leaf.shape, rank, problems):
            return None
        shape = (*leaf.shape[:-2], leaf.shape[-1], rank)
        draw = jax.random.normal(jax.random.fold_in(key, place), shape, jnp.float32)
        q = np.linalg.qr(np.asarray(draw, np.float64))[0]
        return q.astype(np.float32)

    basis = map_with_roles(of_leaf, params, roles)
    _raise(problems, rank)
    return basis


def save_basis(directory: str | os.PathLike[str], basis: Any) -> None:
    """Writes a basis: one float32 tensor for each leaf that has one, by dotted path.

    Args:
      directory: a folder, made where it is missing.
      basis: as in `project_updates`.

    Raises:
      CheckpointWriteError: the disk is full or not writable; what was there stays.
    """
    leaves = jax.tree_util.tree_leaves_with_path(basis)
    tensors = {dotted(path_of(keys)): np.asarray(v, np.float32) for keys, v in leaves}
    write_safetensors(directory, tensors)


def load_basis(directory: str | os.PathLike[str], params: Any, roles: Roles) -> Any:
    """Reads a basis and checks that it is one of this model.

    Args:
      directory: the folder.
      params: the model's parameters, or their shapes.
      roles: its role table.

    Returns:
      The basis, None where the folder holds none.

    Raises:
      CheckpointError: the folder holds no whole checkpoint; a ValueError too.
      ValueError: a basis of another model, or columns that are not orthonormal.
    """
    source = SafetensorsSource(directory)
    tensors = {name: source.read(name) for name in source.keys()}
    wrong = [f"{n}: got {v.dtype}" for n, v in tensors.items() if v.dtype != np.float32]
    if wrong:
        raise CheckpointError(directory, [*wrong, "expected float32"])
    basis = jax.tree_util.tree_map_with_path(
        lambda keys, _: tensors.pop(dotted(path_of(keys)), None), params
    )
    if tensors:
        listed = "\n  ".join(sorted(tensors))
        raise ValueError(
            f"{directory} is a basis of another model; no such parameter:\n  {listed}"
        )
    check_basis(basis, params, roles)
    return basis


def _has_rank(
    path: Path, shape: tuple[int, ...], rank: int, problems: list[str]
) -> bool:
    """Whether matrices of a shape have bases of a rank; if not, that is a problem."""
    if 1 <= rank <= min(shape[-2:]):
        return True
    problems.append(
        f"{dotted(path)}: a matrix {list(shape[-2:])} has ranks from 1 to "
        f"{min(shape[-2:])}"
    )
    return False


def _raise(problems: list[str], rank: int) -> None:
    if problems:
        raise ValueError(f"a basis of rank {rank}:\n  " + "\n  ".join(problems))
