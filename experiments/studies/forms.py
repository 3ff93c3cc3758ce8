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
PRIVILEGED = "privileged"


def is_form(kind: str) -> bool:
    """Whether a kind of run is a loss of this module, well written or not."""
    return kind in DIVERGENCES or kind.startswith(f"{TOP_K}:") or is_privileged(kind)


def is_privileged(kind: str) -> bool:
    """Whether it is self-distillation from a prompt with privileged information."""
    return kind.startswith(f"{PRIVILEGED}:")


def make_form(
    kind: str,
    student: LanguageModel,
    teacher: LanguageModel,
    temperature: float,
    privileged: int = 0,
) -> Objective:
    """The objective of a name.

    Args:
      kind: A name in `DIVERGENCES` for the whole vocabulary,
        `top_k:DIVERGENCE:K:SUPPORT:TAIL`, as in `geomjax.objectives.top_k`, or
        `privileged:DIVERGENCE`, with the model before training as its own teacher.
      student: The model that is trained.
      teacher: The model it learns from.
      temperature: That of the rollout.
      privileged: Slots of the privileged view, for the last of these.

    Raises:
      ValueError: The name is no such form, or K does not fit the vocabulary.
    """
    if kind in DIVERGENCES:
        return full_vocabulary(
            student, teacher, DIVERGENCES[kind], temperature=temperature
        )
    parts = kind.split(":")
    if parts[0] == PRIVILEGED and parts[1:] and parts[1] in DIVERGENCES:
        return full_vocabulary(
            student,
            student,
            DIVERGENCES[parts[1]],
            temperature=temperature,
            privileged=privileged,
        )
    if len(parts) != 5 or parts[1] not in DIVERGENCES or not parts[2].isdigit():
        raise ValueError(
            f"loss {kind!r}; expected one of {sorted(DIVERGENCES)}, "
            f"{PRIVILEGED}:DIVERGENCE, or {TOP_K}:DIVERGENCE:K:SUPPORT:TAIL, such as "
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
