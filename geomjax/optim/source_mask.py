"""Masks predicted before any training, from the source alone.

P1 and PNT (arXiv 2511.08567) find updates where weights are small and away from the
principal directions of W. Turned around, that predicts a subnetwork without a single
step: these rules choose the coordinates, and a masked run tests the prediction.
"""

import math
from fractions import Fraction
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from geomjax.geometry.blocks import transpose, wide
from geomjax.geometry.factor import factor, matmul
from geomjax.geometry.spectrum import leading_rank
from geomjax.optim.roles import Role, Roles, map_with_roles
from geomjax.typing import Params, Path

SOURCE_RULES = ("low", "nonprincipal", "low_nonprincipal")


def source_mask(
    params: Params,
    roles: Roles,
    rule: str,
    density: float,
    *,
    principal_fraction: float = 0.1,
) -> Any:
    r"""Selects, in every tensor, the coordinates where the source predicts an update.

    With :math:`W_k = U_k S_k V_k^T`, the reconstruction of rank
    :math:`k = \max(1, \lfloor \rho r \rfloor)`, the
    :math:`\lceil \text{density} \cdot mn \rceil` coordinates are those with the

    - `low`: smallest :math:`|W_{ij}|`, PNT's :math:`M_{low}`;
    - `nonprincipal`: smallest :math:`|(W_k)_{ij}|`, the complement of PNT's and P1's
      :math:`M_{princ}`;
    - `low_nonprincipal`: smallest value of the larger of their two ranks in these
      orders: low and outside the principal mask at once. The two together at equal
      density are our choice; PNT joins its masks instead, which fixes the density.

    Among equal values the earlier coordinate wins. Vectors have no singular vectors and
    go by magnitude under every rule.

    Differs from masks made of an update in that each tensor gets the same density: the
    source says where in a matrix, not in which matrix.

    Args:
      params: the source's parameters, float32 or bfloat16; None leaves stay None.
      roles: a role for every path.
      rule: one of `SOURCE_RULES`.
      density: above 0 and at most 1, taken as the decimal that it prints as.
      principal_fraction: :math:`\rho`; 10 % as in P1's Table 2.

    Returns:
      NumPy booleans shaped as `params`.

    Raises:
      ValueError: an unknown rule, or a density or fraction out of range.
    """
    if rule not in SOURCE_RULES:
        raise ValueError(f"rule {rule!r}; known: {', '.join(SOURCE_RULES)}")
    for name, value in (
        ("density", density),
        ("principal_fraction", principal_fraction),
    ):
        if not 0 < value <= 1:
            raise ValueError(f"{name}: got {value}, expected above 0 and at most 1")
    share = Fraction(repr(float(density)))

    def select(path: Path, leaf: Any, role: Role) -> np.ndarray:
        shape = leaf.shape[role.stack_depth :]
        tensors = np.asarray(leaf).reshape(-1, *shape)
        mask = np.zeros(tensors.shape, bool)
        for one, tensor in zip(mask, tensors, strict=True):
            known = "low" if role.kind == "vector" else rule
            scores = _scores(tensor, known, principal_fraction)
            order = np.argsort(scores, axis=None, kind="stable")
            one.flat[order[: math.ceil(share * tensor.size)]] = True
        return mask.reshape(leaf.shape)

    return map_with_roles(select, params, roles)


def _scores(tensor: np.ndarray, rule: str, fraction: float) -> np.ndarray:
    """What is small where the update is predicted."""
    low = np.abs(tensor.astype(np.float32))
    if rule == "low":
        return low
    with jax.enable_x64(True):
        rank = leading_rank(fraction, min(tensor.shape))
        principal = np.asarray(_reconstruction(tensor.astype(np.float32), rank=rank))
    if rule == "nonprincipal":
        return principal
    return np.maximum(_ranks(low), _ranks(principal))


@partial(jax.jit, static_argnames="rank")
def _reconstruction(matrix: jax.Array, *, rank: int) -> jax.Array:
    """`|U_k S_k V_k^T|` in float64."""
    matrix = matrix.astype(jnp.float64)
    short = wide(matrix)
    factors = factor(short, rank)
    columns = transpose(factors.short * factors.values[:rank, None])
    rebuilt = jnp.abs(matmul(columns, factors.long_rows(short)))
    return rebuilt if rebuilt.shape == matrix.shape else transpose(rebuilt)


def _ranks(values: np.ndarray) -> np.ndarray:
    """Place of each value in ascending order; the earlier of two equal ones first."""
    order = np.argsort(values, axis=None, kind="stable")
    ranks = np.empty(order.size, np.int64)
    ranks[order] = np.arange(order.size)
    return ranks.reshape(values.shape)
