"""The programs of a distillation run, as shapes and layouts alone."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from experiments.recipe.published import PUBLISHED
from geomjax.data.batches import PromptBatch
from geomjax.meshes import Placement
from geomjax.models import hf
from geomjax.models.choose_attention import choose_attention
from geomjax.models.decoder import Decoder
from geomjax.models.families import model_config
from geomjax.models.read import layout
from geomjax.objectives.base import Batch
from geomjax.objectives.distill import sampled_token
from geomjax.optim.build import OptimizerSpec, build
from geomjax.train.layout import state_layout
from geomjax.train.step import Sampling, TrainState, make_update, rollout
from geomjax.typing import Params

PROGRAMS = ("update", "rollout")
"""Those of a step of training."""


class Program(NamedTuple):
    """A function to compile, and its arguments as shapes with shardings."""

    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    donated: tuple[int, ...] = ()


def make_model(fields: dict, config: ml_collections.ConfigDict, mesh: Mesh) -> Decoder:
    """A model of the run, bfloat16, laid out over the mesh.

    Args:
      fields: Of its config.json; those that are not given are those of the published
        model of its `name`.
      config: As `configs/aot_check.py`.
      mesh: Over devices that need not be there.

    Raises:
      ValueError: The mesh does not divide it, or its config is not read.
    """
    fields = PUBLISHED.get(fields.get("name", ""), {}) | fields
    fields.pop("name", None)
    if config.layers:
        fields["num_hidden_layers"] = config.layers
    shape = model_config(fields)
    assert shape.text is shape
    placement = Placement(mesh)
    return Decoder(
        shape.text,
        config.tokenizer_size,
        jnp.bfloat16,
        jax.lax.Precision.DEFAULT,
        attention=choose_attention(mesh.devices.flat[0].platform, placement),
        remat=config.remat,
        placement=placement,
    )


def make_programs(config: ml_collections.ConfigDict, mesh: Mesh) -> dict[str, Program]:
    """One optimizer update, teacher included, and one rollout, on a mesh.

    Both take the whole training state and the teacher, so that the memory of each is
    that of the run while it runs.

    Args:
      config: As `configs/aot_check.py`.
      mesh: Over devices that need not be there.

    Returns:
      The programs by name.

    Raises:
      ValueError: The mesh does not divide a model or the sequences.
    """
    student = make_model(config.student.to_dict(), config, mesh)
    teacher = make_model(config.teacher.to_dict(), config, mesh)
    clip, rate = 0.2, 1e-6
    objective = sampled_token(
        student,
        teacher,
        temperature=1.0,
        clip=clip,
        chunk_tokens=config.loss_chunk_tokens,
    )
    spec = OptimizerSpec(name="adamw", learning_rate=rate, clip_norm=1.0)
    tx = build(spec, hf.roles(student.config))
    state, of_state = _state(student, tx)
    context = _laid_out(teacher, jnp.bfloat16)
    parts = student.placement.parts("batch") * config.sequences_per_chip
    for name in ("sequences_per_update", "sequences_per_rollout"):
        if config[name] % parts:
            raise ValueError(
                f"{name} is {config[name]}, expected a multiple of {parts}: "
                f"{config.sequences_per_chip} on each group of chips of the mesh "
                f"{dict(mesh.shape)}"
            )
    update = make_update(
        objective,
        tx,
        micro_batches=config.sequences_per_update // parts,
        layout=of_state,
    )

    def train(state: TrainState, context: Params, batch: Batch):
        params, opt_state, metrics = update(
            state.params, state.opt_state, context, batch
        )
        return TrainState(state.step + 1, params, opt_state), metrics

    sampling = Sampling(1, config.max_new_tokens, 1.0, (0,), 0)

    def draw(state: TrainState, context: Params, prompts: PromptBatch, key):
        del context
        return rollout(student, state.params, prompts, key, sampling)

    whole = NamedSharding(mesh, PartitionSpec())
    batch, prompts = _sequences(config, whole)
    seed = jax.eval_shape(jax.random.key, 0)
    key = jax.ShapeDtypeStruct(seed.shape, seed.dtype, sharding=whole)
    return {
        "update": Program(train, (state, context, batch), (0,)),
        "rollout": Program(draw, (state, context, prompts, key)),
    }


def _state(student: Decoder, tx: Any) -> tuple[TrainState, TrainState]:
    """The training state as shapes, and its layout."""
    params = _laid_out(student, jnp.float32)
    of_state = state_layout(params, tx)
    assert of_state is not None
    step: Any = jax.ShapeDtypeStruct((), jnp.int32)
    shapes = TrainState(step, params, jax.eval_shape(tx.init, params))
    state = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        shapes,
        of_state,
    )
    return state, of_state


def _laid_out(model: Decoder, dtype: Any) -> Params:
    params: Params = {}
    for path, place in layout(model.config, model.shapes, model.placement).items():
        shape = hf.leaf(model.shapes, path).shape
        hf.insert(params, path, jax.ShapeDtypeStruct(shape, dtype, sharding=place))
    return params


def _sequences(
    config: ml_collections.ConfigDict, whole: NamedSharding
) -> tuple[Batch, PromptBatch]:
    """What an update and a rollout read, whole on every chip: some megabytes."""

    def array(dtype: Any, *shape: int) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=whole)

    rows, new = config.sequences_per_update, config.max_new_tokens
    length = config.max_prompt_tokens + new
    ids = array(jnp.int32, rows, length)
    of_new = array(jnp.float32, rows, new)
    batch = Batch(ids, ids, ids, of_new, of_new)
    rows = config.sequences_per_rollout
    ids = array(jnp.int32, rows, config.max_prompt_tokens)
    return batch, PromptBatch(ids, ids, ids, array(jnp.int32, rows))
