"""Distillation losses by name, for runs on the student's own sequences."""

from geomjax.objectives import divergence
from geomjax.objectives.base import Objective
from geomjax.objectives.distill import full_vocabulary
from geomjax.objectives.top_k import top_k
from geomjax.typing import LanguageModel

DIVERGENCES = {
    "forward_kl": divergence.forward_kl,
    "reverse_kl": divergence.reverse_kl,
    "jsd": divergence.jsd(0.5),
}
TOP_K = "top_k"


def is_form(kind: str) -> bool:
    """Whether a kind of run is a loss of this module, well written or not."""
    return kind in DIVERGENCES or kind.startswith(f"{TOP_K}:")


def make_form(
    kind: str, student: LanguageModel, teacher: LanguageModel, temperature: float
) -> Objective:
    """The objective of a name.

    Args:
      kind: A name in `DIVERGENCES` for the whole vocabulary, or
        `top_k:DIVERGENCE:K:SUPPORT:TAIL`, as in `geomjax.objectives.top_k`.
      student: The model that is trained.
      teacher: The model it learns from.
      temperature: That of the rollout.

    Raises:
      ValueError: The name is no such form, or K does not fit the vocabulary.
    """
    if kind in DIVERGENCES:
        return full_vocabulary(
            student, teacher, DIVERGENCES[kind], temperature=temperature
        )
    parts = kind.split(":")
    if len(parts) != 5 or parts[1] not in DIVERGENCES or not parts[2].isdigit():
        raise ValueError(
            f"loss {kind!r}; expected one of {sorted(DIVERGENCES)}, or "
            f"{TOP_K}:DIVERGENCE:K:SUPPORT:TAIL, such as "
            "top_k:reverse_kl:3:student:bucket"
        )
    _, name, k, support, tail = parts
    return top_k(
        student,
        teacher,
        DIVERGENCES[name],
        k=int(k),
        support=support,
        tail=tail,
        temperature=temperature,
    )
