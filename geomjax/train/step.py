"""One optimizer update, and one training step of distillation made of several."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from geomjax import hosts
from geomjax.data.batches import PromptBatch
from geomjax.objectives.base import Batch, Metrics, Objective, token_mean
from geomjax.optim.apply import apply_updates
from geomjax.optim.roles import leaf_paths
from geomjax.optim.state_figures import adam_state_figures
from geomjax.rollout.sample import Rollout, sample
from geomjax.typing import LanguageModel, Params, PRNGKey, prompted


class TrainState(NamedTuple):
    """What a run is at a step; everything else follows from the configuration.

    Attributes:
      step: Scalar int32, training steps done.
      params: Parameters, float32.
      opt_state: State of the optimizer.
    """

    step: Int[Array, ""]
    params: Params
    opt_state: Any


StepMetrics = dict[str, Float[Array, " u"]]
"""One value for each of the u optimizer updates of a training step."""

Step = Callable[..., tuple[TrainState, StepMetrics]]

Update = Callable[..., tuple[Params, Any, dict[str, Float[Array, ""]]]]


def init_state(
    params: Params, tx: optax.GradientTransformation, layout: TrainState | None = None
) -> TrainState:
    """The state before the first step; copies `params`, as a step donates its state.

    Args:
      params: Parameters.
      tx: The optimizer.
      layout: Shardings of the state on a mesh, see `geomjax.train.layout`; what `tx`
        makes elsewhere is moved there.

    Returns:
      The state.
    """
    params = jax.tree.map(jnp.copy, params)
    state = TrainState(jnp.int32(0), params, tx.init(params))
    return state if layout is None else hosts.put(state, layout)


def _laid_out(tree: Any, layout: Any | None) -> Any:
    return tree if layout is None else jax.lax.with_sharding_constraint(tree, layout)


def accumulate_gradients(
    objective: Objective,
    params: Params,
    context: Params,
    batch: Batch,
    parts: int,
    layout: Params | None = None,
) -> tuple[Params, Float[Array, ""], Metrics]:
    """Gradient of the loss over a mini-batch, in `parts` micro-batches.

    The weights of the batch sum to one over the whole of it, so that the parts' losses,
    gradients and metrics add.

    Args:
      objective: Loss and metrics of a batch.
      params: Parameters to differentiate in.
      context: Passed on to the objective.
      batch: A mini-batch; `parts` divides its rows.
      parts: Number of micro-batches, which bounds the memory of activations.
      layout: Shardings of the gradients on a mesh.

    Returns:
      Gradients, loss and metrics.
    """
    value_and_grad = jax.value_and_grad(objective, has_aux=True)

    def of_part(part):
        (loss, metrics), gradients = value_and_grad(params, context, part)
        return _laid_out(gradients, layout), loss, metrics

    if parts == 1:
        return of_part(batch)

    def body(total, part):
        return jax.tree.map(jnp.add, total, of_part(part)), None

    split = split_rows(batch, parts)
    first = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), split)
    # Of all numbers only minus zero leaves each that is added to it as it is.
    gradients, *rest = jax.tree.map(
        lambda x: jnp.full(x.shape, -0.0, x.dtype), jax.eval_shape(of_part, first)
    )
    return jax.lax.scan(body, (_laid_out(gradients, layout), *rest), split)[0]


def split_rows(tree: Any, parts: int) -> Any:
    """Reshapes the rows `[B, ...]` of every leaf to `[parts, B / parts, ...]`."""
    rows = jax.tree.leaves(tree)[0].shape[0]
    if rows % parts:
        raise ValueError(f"{rows} sequences cannot be split into {parts} equal parts")
    return jax.tree.map(lambda x: x.reshape(parts, rows // parts, *x.shape[1:]), tree)


def make_update(
    objective: Objective,
    tx: optax.GradientTransformation,
    *,
    micro_batches: int,
    layout: TrainState | None = None,
) -> Update:
    """One optimizer update from a mini-batch, as a pure function.

    Args:
      objective: Loss and metrics of a batch.
      tx: Any optax transform.
      micro_batches: Parts in which the gradient is accumulated.
      layout: Shardings of the state on a mesh.

    Returns:
      `update(params, opt_state, context, batch, **given) -> (params, opt_state,
      metrics)`, where `given` goes on to `tx`. The metrics are the objective's, with
      `loss`, `grad_norm`, `update_norm`, the optimizer's figures where it has moments
      (`adam_state_figures`; the cosine with the momentum before the update, 0 at the
      first), and `finite/PATH` for every parameter, 1.0 where its gradient is finite.
    """
    of_params, of_state = (None, None) if layout is None else layout[1:]

    def update(params, opt_state, context, batch, **given):
        gradients, loss, metrics = accumulate_gradients(
            objective, params, context, batch, micro_batches, of_params
        )
        before = opt_state
        updates, opt_state = tx.update(gradients, before, params, **given)
        metrics = metrics | {
            "loss": loss,
            "grad_norm": optax.tree.norm(gradients),
            "update_norm": optax.tree.norm(updates),
            **_optimizer_figures(gradients, before, opt_state),
            **_finite_flags(gradients),
        }
        params = _laid_out(apply_updates(params, updates), of_params)
        return params, _laid_out(opt_state, of_state), metrics

    return update


def jit_step(step: Callable[..., Any], layout: TrainState | None) -> Step:
    """Jits a step that donates its state and returns it in its layout."""
    if layout is None:
        return jax.jit(step, donate_argnums=0)
    whole = NamedSharding(jax.tree.leaves(layout)[0].mesh, PartitionSpec())
    return jax.jit(step, donate_argnums=0, out_shardings=(layout, whole))


def _optimizer_figures(gradients, before, after) -> dict[str, Float[Array, ""]]:
    """The gradient beside the momentum that it meets, and the second moment after it.

    Of a momentum that holds the gradient already, the cosine of unrelated gradients
    would not be 0 but sqrt(1 - b1^2), 0.44 for b1 = 0.9.
    """
    momentum = adam_state_figures(gradients, before)
    second = adam_state_figures(gradients, after)
    if momentum is None or second is None:
        return {}
    return {
        "momentum_gradient_cosine": momentum.momentum_gradient_cosine,
        "root_second_moment_variation": second.root_second_moment_variation,
    }


FINITE = "finite/"
"""Prefix of the metrics that say whether a parameter's gradient is finite."""


def _finite_flags(gradients: Params) -> dict[str, Float[Array, ""]]:
    return {
        FINITE + ".".join(path): jnp.isfinite(leaf).all().astype(jnp.float32)
        for path, leaf in zip(
            leaf_paths(gradients), jax.tree.leaves(gradients), strict=True
        )
    }


def make_supervised_step(
    objective: Objective,
    tx: optax.GradientTransformation,
    *,
    micro_batches: int = 1,
    layout: TrainState | None = None,
) -> Step:
    """A training step on given sequences: `step(state, context, batch)`, jitted.

    The state is donated, and stays in its layout where it has one.
    """
    update = make_update(objective, tx, micro_batches=micro_batches, layout=layout)

    def step(state: TrainState, context: Params, batch: Batch):
        params, opt_state, metrics = update(
            state.params, state.opt_state, context, batch
        )
        metrics = jax.tree.map(lambda x: x[None], metrics)
        return TrainState(state.step + 1, params, opt_state), metrics

    return jit_step(step, layout)


class Sampling(NamedTuple):
    """How rollouts are drawn.

    Attributes:
      samples_per_prompt: Completions of each prompt, n.
      max_new_tokens: Most tokens of a completion.
      temperature: Softmax temperature, that of the loss too.
      stop_tokens: Ids that end a completion.
      pad_token: Id written after the end.
    """

    samples_per_prompt: int
    max_new_tokens: int
    temperature: float
    stop_tokens: tuple[int, ...]
    pad_token: int


def rollout(
    student: LanguageModel,
    params: Params,
    prompts: PromptBatch,
    key: PRNGKey,
    sampling: Sampling,
) -> Rollout:
    """Samples n completions of each prompt; those of one prompt are adjacent rows."""

    def repeat(array):
        return jnp.repeat(jnp.asarray(array), sampling.samples_per_prompt, axis=0)

    images = jax.tree.map(repeat, prompts.images)
    drawn = sample(
        prompted(student, images),
        params,
        repeat(prompts.tokens),
        repeat(prompts.positions),
        repeat(prompts.segment_ids),
        key,
        max_new_tokens=sampling.max_new_tokens,
        stop_tokens=sampling.stop_tokens,
        temperature=sampling.temperature,
        pad_token=sampling.pad_token,
    )
    return drawn._replace(images=images)


def mini_batch(part: Rollout, max_new_tokens: int) -> Batch:
    """A mini-batch of sampled sequences, its completion tokens weighted equally.

    Completions lie in the last `max_new_tokens` slots, the only ones with weights.
    """
    return Batch(
        tokens=part.tokens,
        positions=part.positions,
        segment_ids=part.segment_ids,
        weights=token_mean(part.completion)[:, -max_new_tokens:],
        behaviour_log_probs=part.log_probs[:, -max_new_tokens:],
        images=part.images,
    )


def make_distill_step(
    student: LanguageModel,
    objective: Objective,
    tx: optax.GradientTransformation,
    sampling: Sampling,
    *,
    mini_batches: int,
    micro_batches: int = 1,
    layout: TrainState | None = None,
) -> Step:
    """A training step of on-policy distillation, P1's outer loop, jitted.

    `step(state, teacher_params, prompts, key, **given)` samples n completions of each
    prompt from the student, and then takes `mini_batches` optimizer updates on them,
    each on its own share of the prompts; `given` is what the optimizer takes beside
    them, such as the rate of `given_rate`. The state is donated. Images of the prompts
    are read again in each update, so that a vision tower is trained too.

    Args:
      student: The model that samples and is trained.
      objective: Takes the teacher's parameters as its context.
      tx: Any optax transform.
      sampling: How rollouts are drawn.
      mini_batches: Optimizer updates a rollout.
      micro_batches: Parts in which the gradient of one update is accumulated.
      layout: Shardings of the state on a mesh, from `geomjax.train.layout`.

    Returns:
      The step. Metrics, one value an update: those of `make_update`, and
      `completion_tokens`, the mean length of a completion in the mini-batch.
    """
    update = make_update(objective, tx, micro_batches=micro_batches, layout=layout)

    def step(state: TrainState, teacher_params, prompts: PromptBatch, key, **given):
        count = prompts.tokens.shape[0]
        if count % mini_batches:
            raise ValueError(
                f"{count} prompts cannot be split into {mini_batches} mini-batches; "
                "the samples of a prompt belong to one update"
            )
        drawn = rollout(student, state.params, prompts, key, sampling)

        def body(carry, part):
            batch = mini_batch(part, sampling.max_new_tokens)
            params, opt_state = carry
            *updated, metrics = update(
                params, opt_state, teacher_params, batch, **given
            )
            lengths = part.completion.sum(axis=-1, dtype=jnp.float32)
            metrics["completion_tokens"] = lengths.mean()
            return tuple(updated), metrics

        (params, opt_state), metrics = jax.lax.scan(
            body, (state.params, state.opt_state), split_rows(drawn, mini_batches)
        )
        return TrainState(state.step + 1, params, opt_state), metrics

    return jit_step(step, layout)
