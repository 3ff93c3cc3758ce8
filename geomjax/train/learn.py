"""Learning from sequences that were drawn, by whomever, in a program apart.

`make_distill_step` draws and learns in one program. Here the two are apart, so that a
reward may be computed between them, on the device or on the host, and so that student,
teacher and data sets can be drawn from while one program learns.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float

from geomjax.data.batches import PromptBatch
from geomjax.meshes import Placement
from geomjax.objectives.base import (
    Batch,
    Metrics,
    Objective,
    shift_targets,
    target_hidden,
    token_mean,
)
from geomjax.objectives.grpo import group_advantages
from geomjax.objectives.mix import keep_tokens, mix_advantages, rescaled
from geomjax.objectives.vocabulary import token_log_probs
from geomjax.rollout.sample import Rollout
from geomjax.train.step import (
    Sampling,
    Step,
    TrainState,
    jit_step,
    make_update,
    mini_batch,
    rollout,
    split_rows,
)
from geomjax.typing import LanguageModel, Params, PRNGKey

Draw = Callable[[Params, PromptBatch, PRNGKey], Rollout]


def make_draw(model: LanguageModel, sampling: Sampling) -> Draw:
    """`draw(params, prompts, key)`, jitted: n completions of each prompt, adjacent."""

    def draw(params: Params, prompts: PromptBatch, key: PRNGKey) -> Rollout:
        return rollout(model, params, prompts, key, sampling)

    return jit_rows(draw, model.placement)


def jit_rows(function: Callable[..., Any], placement: Placement) -> Callable[..., Any]:
    """Jits a function whose results all have sequences first.

    On a mesh they lie split by sequence, whatever made them, so that one program learns
    from all: another layout would be another program.
    """
    if placement.mesh is None:
        return jax.jit(function)
    return jax.jit(function, out_shardings=placement.sharding("batch"))


class Controls(NamedTuple):
    """What a policy gradient learns from; scalars, so that arms share a program.

    Attributes:
      alpha: Share of distillation in the advantage, the rest being the reward's.
      keep: Share of the tokens whose distillation signal is kept, in (0, 1].
      by_gap: Whether those with the largest gap are kept, or random ones.
    """

    alpha: float = 1.0
    keep: float = 1.0
    by_gap: bool = True

    def check(self) -> None:
        """Raises ValueError where a share is out of range."""
        if not (0 <= self.alpha <= 1 and 0 < self.keep <= 1):
            raise ValueError(
                f"controls: alpha is {self.alpha} and keep {self.keep}; expected alpha "
                "from 0 to 1, and keep above 0 and at most 1"
            )


class Signal(NamedTuple):
    """What is learnt from the tokens of a rollout.

    Attributes:
      targets: `[B, S]` the tokens with weight.
      advantages: `[B, R]` of the last R slots; None for objectives without.
      metrics: One number each for the rollout.
    """

    targets: Bool[Array, "B S"]
    advantages: Float[Array, "B R"] | None
    metrics: Metrics


Prepare = Callable[[Params, Params, Rollout, Any], Signal]
"""`(params, context, drawn, extras) -> Signal`, once a rollout, before any update."""


def imitate(params: Params, context: Params, drawn: Rollout, extras: Any) -> Signal:
    """Every completion token is a target: supervised and whole-vocabulary losses."""
    del params, context, extras
    return Signal(drawn.completion, None, {})


class PolicyExtras(NamedTuple):
    """What a policy gradient needs beside the sequences.

    Attributes:
      rewards: `[B]` float32, of each completion; zeros where alpha is 1.
      controls: `Controls`.
      key: Random key of the choice of tokens.
      known: `[B]` bool, the completions whose reward says something of them, see
        `geomjax.rewards.contract.SILENT`; None for all.
    """

    rewards: Float[Array, " B"]
    controls: Controls
    key: PRNGKey
    known: Bool[Array, " B"] | None = None


def policy_signal(
    student: LanguageModel,
    teacher: LanguageModel | None,
    sampling: Sampling,
    *,
    on_policy: bool = True,
) -> Prepare:
    """Advantages of distillation, of a reward, or of both.

    `A = alpha A_OPD + (1 - alpha) A_RLVR`, P2, with `A_OPD,t = -r_t` and
    `r_t = log pi(a_t) - log pi_T(a_t)`, thinned out to `keep` of the tokens of each
    completion and rescaled, and the group-normalised `A_RLVR`. A group without contrast
    has no reward signal: at alpha 0 its tokens get no weight, otherwise they keep their
    distillation signal. So it is with a completion whose reward is not known, which is
    left out of its group as well. The advantages are taken once, before the first
    update, as in verl.

    Args:
      student: The model that is trained.
      teacher: The teacher, whose parameters are the context; None for rewards alone.
      sampling: How the rollout was drawn.
      on_policy: Whether the student drew it, so that `log pi` is what was recorded;
        else the student scores the tokens first.

    Returns:
      The function. Metrics: `reward`, `groups_without_contrast` (a share), with a
      teacher `gap`, the mean of r_t over the completion tokens, and where rewards may
      be unknown `silent_rewards`, how many are.
    """
    last, temperature = sampling.max_new_tokens, sampling.temperature

    def scored(model: LanguageModel, params: Params, drawn: Rollout):
        batch = mini_batch(drawn, last)
        targets, _ = shift_targets(batch)
        hidden = target_hidden(model, params, batch)
        return token_log_probs(model, params, hidden, targets, temperature=temperature)

    def prepare(params: Params, context: Params, drawn: Rollout, extras: PolicyExtras):
        rewards, controls, key, known = extras
        alpha, keep = (jnp.asarray(x, jnp.float32) for x in controls[:2])
        group = group_advantages(rewards, sampling.samples_per_prompt, known)
        completion = drawn.completion[:, -last:]
        metrics = {
            "reward": rewards.mean(),
            "groups_without_contrast": 1 - group.contrast.astype(jnp.float32).mean(),
        }
        if known is not None:
            metrics |= _of_known(rewards, known, group.contrast, sampling)
        if teacher is None:
            advantages = jnp.where(completion, group.advantages[:, None], 0.0)
            return Signal(
                drawn.completion & group.contrast[:, None], advantages, metrics
            )
        ours = (
            drawn.log_probs[:, -last:] if on_policy else scored(student, params, drawn)
        )
        gap = jnp.where(completion, ours - scored(teacher, context, drawn), 0.0)
        chance = jax.random.uniform(key, gap.shape, gap.dtype)
        scores = jnp.where(controls.by_gap, gap, chance)
        kept = keep_tokens(scores, completion, keep)
        advantages = mix_advantages(
            alpha, rescaled(-gap, completion, kept), group.advantages
        )
        metrics["gap"] = gap.sum() / jnp.maximum(completion.sum(dtype=gap.dtype), 1.0)
        useful = group.contrast | (alpha > 0)
        return Signal(drawn.completion & useful[:, None], advantages, metrics)

    return prepare


def _of_known(
    rewards: Float[Array, " B"],
    known: Bool[Array, " B"],
    contrast: Bool[Array, " B"],
    sampling: Sampling,
) -> Metrics:
    """The metrics of rewards of which some may be unknown."""
    groups = contrast.reshape(-1, sampling.samples_per_prompt).any(axis=1)
    total = jnp.where(known, rewards, 0.0).sum()
    count = known.sum(dtype=jnp.float32)
    mean = total / jnp.maximum(count, 1.0)
    return {
        "reward": jnp.where(known.all(), rewards.mean(), mean),
        "groups_without_contrast": 1 - groups.astype(jnp.float32).mean(),
        "silent_rewards": (~known).sum(dtype=jnp.float32),
    }


def make_learn(
    objective: Objective,
    tx: optax.GradientTransformation,
    prepare: Prepare,
    sampling: Sampling,
    *,
    mini_batches: int,
    micro_batches: int = 1,
    layout: TrainState | None = None,
) -> Step:
    """`learn(state, context, drawn, extras)`, jitted: one training step on a rollout.

    The rows are split into `mini_batches` parts, with one optimizer update each. A part
    without any target, all of whose groups lack contrast, is skipped: parameters and
    optimizer state stay as they are. The state is donated.

    Args:
      objective: Loss of a mini-batch.
      tx: Any optax transform.
      prepare: Targets and advantages of the rollout.
      sampling: How the rollout was drawn; completions lie in its last slots.
      mini_batches: Optimizer updates a rollout.
      micro_batches: Parts in which the gradient of one update is accumulated.
      layout: Shardings of the state on a mesh, from `geomjax.train.layout`.

    Returns:
      The step. Metrics, one value an update: those of `make_update`, those of
      `prepare`, `completion_tokens` and `skipped`.
    """
    update = make_update(objective, tx, micro_batches=micro_batches, layout=layout)
    last = sampling.max_new_tokens

    def learn(state: TrainState, context: Params, drawn: Rollout, extras: Any):
        signal = prepare(state.params, context, drawn, extras)
        lengths = drawn.completion.sum(axis=1, dtype=jnp.float32)
        drawn = drawn._replace(completion=signal.targets)

        def body(carry, part):
            drawn, advantages, lengths = part
            weights = token_mean(drawn.completion)[:, -last:]
            batch: Batch = mini_batch(drawn, last)._replace(
                weights=weights, advantages=advantages
            )
            params, opt_state = carry
            *updated, metrics = update(params, opt_state, context, batch)
            taken = (weights != 0).any()
            carry = jax.tree.map(
                lambda new, old: jnp.where(taken, new, old), tuple(updated), carry
            )
            metrics |= signal.metrics
            metrics["completion_tokens"] = lengths.mean()
            metrics["skipped"] = 1 - taken.astype(jnp.float32)
            return carry, metrics

        parts = split_rows((drawn, signal.advantages, lengths), mini_batches)
        (params, opt_state), metrics = jax.lax.scan(
            body, (state.params, state.opt_state), parts
        )
        return TrainState(state.step + 1, params, opt_state), metrics

    return jit_step(learn, layout)
