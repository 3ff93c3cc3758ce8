"""The papers' settings of every study compile, from shapes alone.

Blocks are those of the papers' models, one of each; what a device would hold of them is
not allocated. Programs of whole runs for a TPU are `experiments.aot_check`'s.
"""

import dataclasses
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.common.world import load_world
from experiments.recipe.published import PUBLISHED
from experiments.studies.run import Run
from experiments.studies.settings import check_settings
from experiments.studies.study import Start, Study
from geomjax.models.families import model_config
from geomjax.models.load import Loaded, make_model
from geomjax.optim import random_basis
from geomjax.rewards.judge import Judge
from geomjax.rollout.sample import Rollout
from geomjax.train.learn import Controls, PolicyExtras
from geomjax.train.step import init_state

# What names its student in words starts from this.
ANCHOR = "Qwen/Qwen3-8B-Base"
STUDIES = (
    "training_regimes",
    "subspace_locking",
    "objective_controls",
    "loss_forms",
    "precision",
    "dynamics",
    "subnetwork",
)


def shapes(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


def published(name, dtype):
    """A model of the papers with one block, its parameters as shapes."""
    fields = PUBLISHED.get(name, PUBLISHED[ANCHOR]) | {"num_hidden_layers": 1}
    model = make_model(model_config(fields), dtype=dtype)
    params = jax.eval_shape(model.init, jax.random.key(0))
    return Loaded(model, params)


@pytest.fixture(scope="module")
def tiny():
    """The bundled world, for its tokenizer and prompts."""
    module = importlib.import_module("configs.training_regimes")
    return load_world(module.get_config("smoke"))


def paper_study(config, tiny, tmp_path):
    dtype = jnp.dtype(config.compute_dtype)
    models = [published(config[role], dtype) for role in ("student", "teacher")]
    # Two models of two sizes have two heads: of one tokenizer, one vocabulary.
    size = min(loaded.model.vocab_size for loaded in models)
    student, teacher = (
        Loaded(dataclasses.replace(m.model, vocab_size=size), m.params) for m in models
    )
    world = tiny._replace(
        student=student,
        teacher=teacher,
        sampling=tiny.sampling._replace(
            samples_per_prompt=config.samples_per_prompt,
            max_new_tokens=config.max_new_tokens,
        ),
        prompt_length=config.max_prompt_tokens,
    )
    return Study(config, world, tmp_path, Judge("exact"))


def arguments(study, config, run, tx):
    """State, context, rows and extras of a step, as shapes."""
    params = study.world.student.params
    state = jax.eval_shape(lambda p: init_state(p, tx), params)
    rows = config.prompts_per_step * config.samples_per_prompt
    length = config.max_prompt_tokens + config.max_new_tokens
    if run.kind.startswith("privileged:"):
        length += study._sequences.privileged_slots
    ids = jax.ShapeDtypeStruct((rows, length), jnp.int32)
    drawn = Rollout(
        ids, ids, ids, ids.update(dtype=jnp.bool_), ids.update(dtype=jnp.float32)
    )
    extras = ()
    if run.kind in ("distill", "foreign", "reward"):
        rewards = jax.ShapeDtypeStruct((rows,), jnp.float32)
        key = jax.eval_shape(jax.random.key, 0)
        controls = shapes(jax.tree.map(jnp.asarray, Controls()))
        extras = PolicyExtras(rewards, controls, key)
    return state, shapes(study.context(run.kind)), drawn, extras


def kinds(config):
    return sorted({arm.kind for arm in config.arms.values()})


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_step_of_every_kind_compiles(tiny, tmp_path):
    """One program a kind, whichever study has it: those of a kind share it."""
    compiled = set()
    for name in STUDIES:
        config = importlib.import_module(f"configs.{name}").get_config("paper")
        check_settings(config)
        study = paper_study(config, tiny, tmp_path / name)
        for kind in kinds(config):
            if kind in compiled:
                continue
            run = Run("arm", kind, 1e-6, 0)
            start = Start(study.world.student.params)
            tx = study._transform(run, start)
            step = study._program(run, tx, start, None)
            program = step.lower(*arguments(study, config, run, tx)).compile()
            memory = program.memory_analysis()
            assert memory.argument_size_in_bytes > 2**30
            compiled.add(kind)
    assert {"distill", "reward", "responses", "foreign", "privileged:jsd"} <= compiled
    assert sum(kind.startswith("top_k:") for kind in compiled) == 4


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("held", ["masked", "constrained"])
def test_a_masked_and_a_constrained_step_compile(tiny, tmp_path, held):
    """P1's masked runs, and P2's inside a subspace of every matrix."""
    name = {"masked": "subnetwork", "constrained": "subspace_locking"}[held]
    config = importlib.import_module(f"configs.{name}").get_config("paper")
    study = paper_study(config, tiny, tmp_path)
    params, mask, basis = study.world.student.params, None, None
    if held == "masked":
        # Broadcast, its values take no memory until they are in a state.
        mask = jax.tree.map(lambda x: np.broadcast_to(np.bool_(1), x.shape), params)
    else:
        basis = random_basis(jax.random.key(0), params, config.rank, study.roles)
    start = Start(params, mask=mask, basis=basis)
    run = Run("arm", "distill", 1e-6, 0)
    tx = study._transform(run, start)
    state, *others = arguments(study, config, run, tx)
    program = study._program(run, tx, start, None).lower(state, *others).compile()
    free = jax.eval_shape(
        lambda p: init_state(p, study._transform(run, Start(params))), params
    )
    more = sum(x.nbytes for x in jax.tree.leaves((mask, basis)))
    assert size(state) == pytest.approx(size(free) + more, rel=1e-3)
    assert program.memory_analysis().argument_size_in_bytes > size(state)


def size(tree):
    """Bytes of arrays, or of their shapes."""
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_step_of_the_largest_student_compiles(tiny, tmp_path):
    """P2's 14B student with its 32B teacher, of whose models each arm names its own."""
    config = importlib.import_module("configs.opd_variants").get_config("paper")
    arm = config.arms.large_student
    assert (arm.student, arm.teacher) == ("qwen3-14b-sft-anchor", "Qwen/Qwen3-32B")
    config.student, config.teacher = "Qwen/Qwen3-14B", arm.teacher
    study = paper_study(config, tiny, tmp_path)
    run = Run("arm", arm.kind, arm.learning_rate, 0)
    start = Start(study.world.student.params)
    tx = study._transform(run, start)
    step = study._program(run, tx, start, None)
    program = step.lower(*arguments(study, config, run, tx)).compile()
    assert program.memory_analysis().argument_size_in_bytes > 2**30
