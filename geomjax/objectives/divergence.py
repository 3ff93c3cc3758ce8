"""Divergences of two categorical distributions, named by their direction.

All take log-probabilities of teacher and student, `[n, V]` float32, and return one
value a row in nats. A bare beta is never a divergence: libraries disagree on which end
is which.
"""

from collections.abc import Callable
from functools import partial

import jax.numpy as jnp
from jaxtyping import Array, Float

LogProbs = Float[Array, "n V"]
Divergence = Callable[[LogProbs, LogProbs], Float[Array, " n"]]


def _kl(left: LogProbs, right: LogProbs) -> Float[Array, " n"]:
    """`sum_v p log(p / q)`, with 0 log 0 = 0."""
    probability = jnp.exp(left)
    terms = probability * (left - right)
    return jnp.where(probability > 0, terms, 0.0).sum(axis=-1)


def forward_kl(teacher: LogProbs, student: LogProbs) -> Float[Array, " n"]:
    """`KL(teacher || student)`: the student covers what the teacher does."""
    return _kl(teacher, student)


def reverse_kl(teacher: LogProbs, student: LogProbs) -> Float[Array, " n"]:
    """`KL(student || teacher)`: the student avoids what the teacher does not do."""
    return _kl(student, teacher)


def jensen_shannon(
    teacher: LogProbs, student: LogProbs, *, beta: float
) -> Float[Array, " n"]:
    """Generalised Jensen-Shannon divergence, GKD (arXiv 2306.13649) eq. (1).

    `beta KL(teacher || m) + (1 - beta) KL(student || m)` with the mixture
    `m = beta teacher + (1 - beta) student`, at most log 2 at beta 1/2.
    """
    mixture = jnp.logaddexp(teacher + jnp.log(beta), student + jnp.log(1 - beta))
    return beta * _kl(teacher, mixture) + (1 - beta) * _kl(student, mixture)


def jsd(beta: float) -> Divergence:
    """The Jensen-Shannon divergence with the teacher's weight `beta`.

    Raises:
      ValueError: beta is not strictly between 0 and 1, where the divergence is
        identically zero; use `forward_kl` or `reverse_kl`.
    """
    if not 0 < beta < 1:
        raise ValueError(
            f"jsd beta is {beta}; it must lie strictly between 0 and 1 (at the ends it "
            "vanishes: choose forward_kl or reverse_kl instead)"
        )
    return partial(jensen_shannon, beta=beta)
