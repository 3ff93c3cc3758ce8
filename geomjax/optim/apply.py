"""Adding an update to the parameters without touching what it leaves alone."""

from typing import Any

import jax
import jax.numpy as jnp


def apply_updates(params: Any, updates: Any) -> Any:
    r"""Adds updates to parameters; a coordinate with a zero update keeps every bit.

    `optax.apply_updates` computes :math:`p + u` everywhere. With :math:`u = -0` that is
    the identity in IEEE arithmetic, but the compiled addition flushes subnormal numbers
    to zero (on CPU, and on TPU), and with :math:`u = +0` it turns :math:`p = -0` into
    :math:`+0`. Here such coordinates are selected, not computed:

    .. math:: p_i \leftarrow p_i \text{ if } u_i = 0 \text{ else } p_i + u_i

    Equal to `optax.apply_updates` wherever both are normal numbers.

    Args:
      params: a tree of arrays of any floating dtype.
      updates: a tree of the same structure, shapes and dtypes.

    Returns:
      The updated parameters, in the dtypes of `params`.
    """
    return jax.tree.map(
        lambda p, u: jnp.where(u == 0, p, (p + u).astype(p.dtype)), params, updates
    )
