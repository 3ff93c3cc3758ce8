"""Worlds beside the bundled one: their recipes, and studies that take place in them."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import dynamics, subnetwork, subspace_locking, training_regimes
from configs.tiny_world import VARIANTS
from configs.tiny_world import get_config as get_recipe
from experiments import tiny_world
from experiments.common.prompts import open_judge
from experiments.common.world import load_world
from experiments.studies import worlds
from experiments.studies.begin import begin
from experiments.studies.run import Run
from experiments.studies.study import Start, Study
from experiments.studies.worlds import in_world
from experiments.subnetwork import check, located
from geomjax.data.batches import PromptBatch
from geomjax.models.config import DecoderConfig
from geomjax.models.load import Loaded, make_decoder
from geomjax.optim import random_basis
from geomjax.train.learn import Controls, PolicyExtras
from geomjax.train.step import init_state

STUDIES = {
    "training_regimes": training_regimes,
    "subspace_locking": subspace_locking,
    "dynamics": dynamics,
    "subnetwork": subnetwork,
}
MIDSIZE = ("training_regimes", "subspace_locking", "subnetwork")


def decoder(recipe, vocab_size=16):
    return make_decoder(
        DecoderConfig(
            architecture="Qwen3ForCausalLM",
            vocab_size=vocab_size,
            rms_norm_eps=1e-6,
            tie_word_embeddings=False,
            **recipe.model,
        ),
        vocab_size,
        jnp.dtype(recipe.compute_dtype),
    )


def size(model):
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(model.shapes))


def test_a_world_gives_the_folders_that_are_not_named(tmp_path, monkeypatch):
    monkeypatch.setattr(worlds, "world_folder", lambda name: tmp_path / name)
    config = training_regimes.get_config("tiny_deep")
    config.teacher = "mine"
    found = in_world(config)
    assert found.student == str(tmp_path / "deep" / "anchor")
    assert found.base == str(tmp_path / "deep" / "base")
    assert found.prompts == str(tmp_path / "deep" / "prompts.jsonl")
    assert found.teacher == "mine"
    assert config.student == ""
    assert in_world(training_regimes.get_config("smoke")).student == ""


def test_an_unknown_world_is_refused(tmp_path):
    config = training_regimes.get_config("smoke")
    config.world = "wide"
    with (
        pytest.raises(ValueError, match="variant 'wide'; known: scripts, deep"),
        begin(config, tmp_path / "run", "training_regimes"),
    ):
        pass


@pytest.mark.parametrize(
    ("variant", "layers", "width", "millions"),
    [("", 2, 128, 0.4), ("deep", 6, 256, 4.7), ("midsize", 12, 768, 104)],
)
def test_sizes_are_those_that_are_said(variant, layers, width, millions):
    model = decoder(get_recipe(variant))
    assert (model.config.num_layers, model.config.hidden_size) == (layers, width)
    assert size(model) / 1e6 == pytest.approx(millions, rel=0.05)


@pytest.mark.parametrize("variant", VARIANTS)
def test_problems_fit_the_models_and_the_base_comes_first(variant):
    recipe = get_recipe(variant)
    longest = 2 * recipe.operations[1] + 2 + recipe.operations[1] + 1
    longest += recipe.operations[1] + 1 if recipe.hints else 0
    assert longest <= recipe.model.max_position_embeddings
    assert recipe.base_steps < recipe.max_anchor_steps <= recipe.teacher_steps
    held_out = recipe.num_test + recipe.num_validation
    assert held_out < recipe.num_problems / 2


@pytest.mark.parametrize(
    ("study", "variant"),
    [
        *((name, "tiny_deep") for name in STUDIES if name != "subnetwork"),
        *((name, "midsize") for name in MIDSIZE),
    ],
)
def test_studies_hold_out_what_their_world_held_out_and_fit_its_problems(
    study, variant
):
    config = STUDIES[study].get_config(variant)
    recipe = get_recipe(config.world)
    share = config.validation_fraction + config.test_fraction
    # Splits go by a hash: four standard deviations.
    expected = share * recipe.num_problems
    most = expected + 4 * math.sqrt(expected)
    assert most <= recipe.num_test + recipe.num_validation + 150
    assert expected <= recipe.num_test + recipe.num_validation
    assert 2 * recipe.operations[1] + 2 <= config.max_prompt_tokens
    assert recipe.operations[1] + 1 <= config.max_new_tokens
    if variant == "midsize":
        rates = {name: arm.learning_rate for name, arm in config.arms.items()}
        assert rates.pop("sft", 1e-5) == 1e-5
        assert set(rates.values()) == {1e-6 if study == "training_regimes" else 1e-5}
    if study == "subnetwork":
        check(config)
        # No paths: `begin` finds the world.
        assert located(config).student == ""


def test_scripts_come_in_one_after_another_and_all_before_the_end():
    recipe = get_recipe("scripts")
    first, every = recipe.one_script_steps, recipe.script_every
    drawn = [tiny_world.scripts_at(recipe, step) for step in (1, first, first + every)]
    assert drawn == [1, 1, 2]
    last = first + (recipe.scripts - 1) * every
    assert tiny_world.scripts_at(recipe, last - 1) == recipe.scripts - 1
    assert tiny_world.scripts_at(recipe, last + 5 * every) == recipe.scripts
    assert last < recipe.teacher_steps
    assert tiny_world.scripts_at(get_recipe(), 1) == 1


def brief(variant):
    recipe = get_recipe(variant)
    recipe.update(
        warmup_steps=1,
        base_steps=1,
        evaluate_every=2,
        anchor_accuracy=0.0,
        teacher_steps=2,
        batch_size=4,
        num_problems=60,
        num_test=16,
        num_validation=8,
    )
    return recipe


def test_the_deep_world_is_built_on_first_use_and_studies_begin_in_it(
    tmp_path, monkeypatch
):
    recipe = brief("deep")
    monkeypatch.setattr(tiny_world.recipe, "get_config", lambda variant: recipe)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    config = dynamics.get_config("tiny_deep")
    with begin(config, tmp_path / "run", "dynamics") as (study, origins):
        assert origins["base"]["layers"]["mlp"]["up_proj"]["weight"].shape == (
            *(6, 768, 256),
        )
        assert study.config.student == ""  # What is recorded names no folder of ours.
    monkeypatch.setattr(tiny_world, "build_world", lambda *_: pytest.fail("again"))
    in_world(config)


def test_the_other_task_is_built_with_its_own_alphabet(tmp_path):
    recipe = brief("extremes")
    recipe.model.update(hidden_size=16, intermediate_size=16, num_layers=1)
    tiny_world.build_world(recipe, tmp_path)
    text = (tmp_path / "prompts.jsonl").read_text()
    assert "<" in text
    assert "+" not in text


# --- the model of 104 million parameters, as shapes ---------------------------------


@pytest.fixture(scope="module")
def midsize(tmp_path_factory):
    """A study of the midsize world whose parameters are shapes alone."""
    config = training_regimes.get_config("midsize")
    model = decoder(get_recipe("midsize"))
    world = load_world(training_regimes.get_config("tiny"))
    loaded = Loaded(model, model.shapes)
    world = world._replace(
        student=loaded,
        teacher=loaded,
        prompt_length=config.max_prompt_tokens,
        sampling=world.sampling._replace(
            samples_per_prompt=config.samples_per_prompt,
            max_new_tokens=config.max_new_tokens,
        ),
    )
    with open_judge(config) as judge:
        yield Study(config, world, tmp_path_factory.mktemp("midsize"), judge)


def array(dtype: Any, *shape: int) -> Any:
    return jax.ShapeDtypeStruct(shape, dtype)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "held"),
    [
        ("responses", ""),
        ("distill", ""),
        ("reward", ""),
        ("distill", "masked"),
        ("distill", "constrained"),
    ],
)
def test_a_step_of_the_midsize_world_compiles_without_its_weights(midsize, kind, held):
    config, world = midsize.config, midsize.world
    shapes = world.student.params
    mask = basis = None
    rank = subspace_locking.get_config("midsize").rank
    if held == "constrained":
        basis = random_basis(jax.random.key(0), shapes, rank, midsize.roles)
    if held == "masked":
        # Its values are part of the program; broadcast, they take no memory here.
        mask = jax.tree.map(lambda x: np.broadcast_to(np.bool_(1), x.shape), shapes)
    prompts = config.prompts_per_step
    rows = prompts * config.samples_per_prompt
    ids = array(jnp.int32, prompts, world.prompt_length)
    key = jax.eval_shape(jax.random.key, 0)
    batch = PromptBatch(ids, ids, ids, array(jnp.int32, prompts))
    draw = midsize._sequences._student
    rollout = jax.eval_shape(draw, shapes, batch, key)
    assert rollout.tokens.shape == (rows, world.prompt_length + config.max_new_tokens)
    run = Run("arm", kind, 1e-6, 0)
    start = Start(shapes, mask=mask, basis=basis)
    tx = midsize._transform(run, start)
    state = jax.eval_shape(lambda params: init_state(params, tx), shapes)
    extras: Any = ()
    if kind != "responses":
        number, flag = array(jnp.float32), array(jnp.bool_)
        controls = Controls(number, number, flag)
        extras = PolicyExtras(array(jnp.float32, rows), controls, key)
    context = shapes if kind == "distill" else {}
    learn = midsize._program(run, tx, start, None)
    compiled = learn.lower(state, context, rollout, extras).compile()
    memory = compiled.memory_analysis()
    # Masters and both moments in float32, and the teacher; the mask in bytes, the
    # basis in float32.
    weights = size(world.student.model) * 4
    expected = (3 if kind != "distill" else 4) * weights
    expected += sum(leaf.nbytes for leaf in jax.tree.leaves((mask, basis)))
    assert memory.argument_size_in_bytes == pytest.approx(expected, rel=0.01)


@pytest.mark.slow
def test_a_rollout_of_the_midsize_world_compiles_without_its_weights(midsize):
    world = midsize.world
    ids = array(jnp.int32, midsize.config.prompts_per_step, world.prompt_length)
    batch = PromptBatch(ids, ids, ids, array(jnp.int32, ids.shape[0]))
    key = jax.eval_shape(jax.random.key, 0)
    draw = midsize._sequences._student
    assert draw.lower(world.student.params, batch, key).compile() is not None


@pytest.mark.slow
@pytest.mark.parametrize("study", MIDSIZE)
def test_the_arms_of_the_midsize_variants_end_in_a_report(study, smoke):
    """In the bundled world and four steps, which have the same arms and claims."""
    whole = STUDIES[study].get_config("midsize")
    small = STUDIES[study].get_config("midsize_smoke")
    assert (small.arms, small.compute_dtype) == (whole.arms, whole.compute_dtype)
    folder, record = smoke.run(f"{study}_midsize")
    assert set(whole.arms) <= set(record["arms"])
    assert record["claims"]
    # One seed decides nothing.
    assert {claim["holds"] for claim in record["claims"]} == {None}
    assert (folder / "report.html").exists()
