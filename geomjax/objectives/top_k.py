"""Distillation on the k most likely tokens alone."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from geomjax.meshes import ONE_DEVICE, Placement
from geomjax.objectives.base import (
    Batch,
    Objective,
    shift_targets,
    target_hidden,
    weighted_sum,
)
from geomjax.objectives.divergence import Divergence
from geomjax.objectives.vocabulary import (
    DEFAULT_CHUNK_TOKENS,
    head,
    likeliest,
    logits,
    map_tokens,
    pick_each,
    without,
)
from geomjax.typing import LanguageModel, Params

SUPPORTS = ("student", "teacher")
TAILS = ("renormalise", "bucket")


def top_k(
    student: LanguageModel,
    teacher: LanguageModel,
    divergence: Divergence,
    *,
    k: int,
    support: str,
    tail: str,
    temperature: float,
    chunk_tokens: int = DEFAULT_CHUNK_TOKENS,
) -> Objective:
    """Distillation on the k tokens that one of the models finds most likely.

    `L = sum_t w_t D(q_t, p_t)`, with q and p the distributions of teacher and student
    restricted to the set S_t of those tokens. `renormalise` divides by the mass of S_t,
    as thunlp/OPD does with the student's tokens, and is blind to how much mass lies
    outside; `bucket` keeps one more outcome that stands for all other tokens. P1's
    vision-language run is a forward KL with k = 32; it does not say whose tokens, nor
    what becomes of the tail. The choice of S_t is not differentiated.

    Args:
      student: The model that is trained.
      teacher: The model it learns from; its parameters are the objective's context.
      divergence: From `geomjax.objectives.divergence`.
      k: Tokens in S_t.
      support: Whose most likely tokens make S_t.
      tail: What becomes of the others.
      temperature: That of the rollout.
      chunk_tokens: Tokens whose logits exist at a time.

    Returns:
      The objective. It has no metrics of its own.

    Raises:
      ValueError: The two vocabularies differ in size; an unknown support or tail; k
        below 2 where S_t is renormalised (one token has nothing to compare), below 1
        otherwise, above the vocabulary, or leaving the bucket empty.
    """
    _check(student.vocab_size, teacher.vocab_size, k, support, tail)
    placement = student.placement

    def objective(params: Params, teacher_params: Params, batch: Batch):
        _, shifted = shift_targets(batch)
        heads = (
            head(student, params, placement),
            jax.lax.stop_gradient(head(teacher, teacher_params, placement)),
        )

        def token_losses(student_head, teacher_head, student_hidden, teacher_hidden):
            ours = logits(student, student_head, student_hidden, temperature, placement)
            theirs = logits(
                teacher, teacher_head, teacher_hidden, temperature, placement
            )
            chosen = jax.lax.stop_gradient(ours if support == "student" else theirs)
            index = likeliest(chosen, k, placement)
            return divergence(
                restrict(theirs, index, tail, placement),
                restrict(ours, index, tail, placement),
            )

        hidden = (
            target_hidden(student, params, batch),
            jax.lax.stop_gradient(target_hidden(teacher, teacher_params, batch)),
        )
        losses = map_tokens(token_losses, heads, hidden, chunk_tokens, placement)
        return weighted_sum(losses, shifted.weights), {}

    return objective


def restrict(
    scores: Float[Array, "n V"],
    index: Int[Array, "n k"],
    tail: str,
    placement: Placement = ONE_DEVICE,
) -> Float[Array, "n c"]:
    """Log-probabilities of the chosen tokens, and of the rest together.

    Args:
      scores: Logits.
      index: Tokens of each row.
      tail: As in `top_k`.
      placement: Where the scores lie.

    Returns:
      `[n, k]` renormalised, or `[n, k + 1]` with the rest in the last column.
    """
    picked = pick_each(scores, index, placement)
    if tail == "renormalise":
        return jax.nn.log_softmax(picked)
    rest = jax.nn.logsumexp(without(scores, index, placement), axis=-1)
    return jax.nn.log_softmax(jnp.concatenate([picked, rest[:, None]], axis=-1))


def _check(ours: int, theirs: int, k: int, support: str, tail: str) -> None:
    if ours != theirs:
        raise ValueError(
            f"the student's vocabulary has {ours} tokens, the teacher's {theirs}; "
            "distillation needs one tokenizer"
        )
    if support not in SUPPORTS or tail not in TAILS:
        raise ValueError(
            f"top_k: support {support!r} and tail {tail!r}; expected one of "
            f"{SUPPORTS} and one of {TAILS}"
        )
    least, most = (2, ours) if tail == "renormalise" else (1, ours - 1)
    if not least <= k <= most:
        raise ValueError(
            f"top_k: k is {k}; with a vocabulary of {ours} and tail {tail!r} it must "
            f"lie between {least} and {most}"
        )
