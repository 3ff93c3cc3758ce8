"""On-policy distillation: sampled-token policy gradient and whole-vocabulary losses."""

import jax

from geomjax.objectives.base import (
    Batch,
    Objective,
    shift_targets,
    target_hidden,
    weighted_sum,
)
from geomjax.objectives.divergence import Divergence
from geomjax.objectives.privileged import split_views
from geomjax.objectives.surrogate import Clip, clipped_surrogate
from geomjax.objectives.vocabulary import (
    DEFAULT_CHUNK_TOKENS,
    head,
    logits,
    map_tokens,
    token_log_probs,
)
from geomjax.typing import LanguageModel, Params


def sampled_token(
    student: LanguageModel,
    teacher: LanguageModel,
    *,
    temperature: float,
    clip: float,
    chunk_tokens: int = DEFAULT_CHUNK_TOKENS,
) -> Objective:
    """Distillation on the sampled tokens alone, P1 eq. (9).

    The gradient of `KL(student || teacher)` is `E[k1 grad log pi(a)]` with
    `k1 = log pi(a) - log pi_T(a)`, so the loss is a policy gradient with the advantage

        A_t = log pi_T(a_t) - log pi_behaviour(a_t)

    which is constant under differentiation, and the clipped importance ratio of PPO
    `rho_t = pi(a_t) / pi_behaviour(a_t)`, because several mini-batch updates follow one
    rollout:

        L = -sum_t w_t min(rho_t A_t, clip(rho_t, 1 - c, 1 + c) A_t)

    P1 does not give its clipping; c is a setting of ours. Eq. (9) sums over the tokens
    of a response: the mean that the weights make is ours, and that of the scripts which
    P1 follows. The advantage uses the log-probabilities recorded at sampling, as P1's
    framework does.

    Args:
      student: The model that is trained.
      teacher: The model it learns from; its parameters are the objective's context.
      temperature: That of the rollout.
      clip: c above; 0.2 allows ratios from 0.8 to 1.2.
      chunk_tokens: Tokens whose logits exist at a time.

    Returns:
      The objective. Metrics: `reverse_kl` (the mean k1, nats a token), `ratio` and
      `clip_fraction`.
    """

    def objective(params: Params, teacher_params: Params, batch: Batch):
        targets, shifted = shift_targets(batch)
        weights, behaviour = shifted.weights, shifted.behaviour_log_probs
        teacher_log_probs = token_log_probs(
            teacher,
            teacher_params,
            target_hidden(teacher, teacher_params, batch),
            targets,
            temperature=temperature,
            chunk_tokens=chunk_tokens,
        )
        advantage = jax.lax.stop_gradient(teacher_log_probs - behaviour)
        log_probs = token_log_probs(
            student,
            params,
            target_hidden(student, params, batch),
            targets,
            temperature=temperature,
            chunk_tokens=chunk_tokens,
        )
        loss, metrics = clipped_surrogate(
            log_probs, behaviour, advantage, weights, Clip(clip, clip)
        )
        return loss, {"reverse_kl": weighted_sum(-advantage, weights), **metrics}

    return objective


def full_vocabulary(
    student: LanguageModel,
    teacher: LanguageModel,
    divergence: Divergence,
    *,
    temperature: float,
    chunk_tokens: int = DEFAULT_CHUNK_TOKENS,
    privileged: int = 0,
) -> Objective:
    """Distillation on the whole next-token distribution, P1 eq. (1) and (8).

    `L = sum_t w_t D(pi_T(. | x, y_<t), pi(. | x, y_<t))` on sequences that were
    sampled; the sampling itself is not differentiated. Both distributions are taken at
    the rollout's temperature, over the tokenizer's vocabulary.

    With `privileged` slots the teacher reads the same completion after another prompt,
    x': rows are then those of `geomjax.objectives.privileged`, which has the papers.

    Args:
      student: The model that is trained.
      teacher: The model it learns from; its parameters are the objective's context.
      divergence: From `geomjax.objectives.divergence`.
      temperature: That of the rollout.
      chunk_tokens: Tokens whose logits exist at a time.
      privileged: Slots of the teacher's view in front of the student's; 0 where both
        read the same.

    Returns:
      The objective. It has no metrics of its own.

    Raises:
      ValueError: The two vocabularies differ in size.
    """
    if student.vocab_size != teacher.vocab_size:
        raise ValueError(
            f"the student's vocabulary has {student.vocab_size} tokens, the teacher's "
            f"{teacher.vocab_size}; distillation needs one tokenizer"
        )
    placement = student.placement

    def objective(params: Params, teacher_params: Params, batch: Batch):
        batch, read = split_views(batch, privileged)
        _, shifted = shift_targets(batch)
        student_hidden = target_hidden(student, params, batch)
        teacher_hidden = target_hidden(teacher, teacher_params, read)
        heads = (
            head(student, params, placement),
            jax.lax.stop_gradient(head(teacher, teacher_params, placement)),
        )

        def token_losses(student_head, teacher_head, student_hidden, teacher_hidden):
            ours = logits(student, student_head, student_hidden, temperature, placement)
            theirs = logits(
                teacher, teacher_head, teacher_hidden, temperature, placement
            )
            return divergence(jax.nn.log_softmax(theirs), jax.nn.log_softmax(ours))

        hidden = student_hidden, jax.lax.stop_gradient(teacher_hidden)
        losses = map_tokens(token_losses, heads, hidden, chunk_tokens, placement)
        return weighted_sum(losses, shifted.weights), {}

    return objective
