"""LAMB with one trust ratio for each matrix of a stack."""

from typing import Any

import optax

from geomjax.optim.per_matrix import per_matrix
from geomjax.optim.roles import Roles


def lamb(
    learning_rate: optax.ScalarOrSchedule,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-6,
    eps_root: float = 0.0,
    weight_decay: float = 0.0,
    mask: Any = None,
    *,
    roles: Roles,
) -> optax.GradientTransformationExtraArgs:
    r"""LAMB over stacked layers, equal to `optax.lamb` over separate ones.

    With Adam's direction :math:`r` and decay :math:`\lambda`, for each tensor W:

    .. math::
      W \leftarrow W - \eta \frac{\|W\|_F}{\|r + \lambda W\|_F} (r + \lambda W)

    Only the trust ratio is matrix-wise, so it alone goes through `per_matrix`; moments
    are shaped as the parameters.

    Args:
      learning_rate: a number or a schedule of the update count.
      b1: decay rate of the first moment.
      b2: decay rate of the second moment.
      eps: added to the root of the second moment.
      eps_root: added to the second moment under the root.
      weight_decay: rate of the decoupled weight decay, 0 for none.
      mask: as in `optax.lamb`: which leaves decay; None for all.
      roles: stack depth of each leaf.

    Returns:
      The transform; its `update` needs `params`.

    References:
      You et al., Large Batch Optimization for Deep Learning, arXiv 1904.00962.
    """
    return optax.chain(
        optax.scale_by_adam(b1=b1, b2=b2, eps=eps, eps_root=eps_root),
        optax.add_decayed_weights(weight_decay, mask),
        per_matrix(optax.scale_by_trust_ratio(), roles),
        optax.scale_by_learning_rate(learning_rate),
    )
