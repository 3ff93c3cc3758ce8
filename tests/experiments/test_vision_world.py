"""The small vision-language world, built at its smallest, and how it is kept."""

import json
import threading
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
import pytest
from transformers import Qwen2_5_VLConfig

from configs.vision_world import get_config
from experiments import vision_world
from experiments.common.kept import built_once
from geomjax.data import shapes
from geomjax.data.image_processor import ImageProcessor
from geomjax.data.prompts import read_prompts
from geomjax.models.load import load

SMALL = {
    "num_training_images": 16,
    "anchor_accuracy": 0.0,
    "evaluate_every": 2,
    "warmup_steps": 1,
    "teacher_steps": 4,
    "batch_size": 4,
    "num_problems": 6,
    "num_validation": 4,
}


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processor")
    config = get_config()
    vision_world.write_processor(folder, config)
    return vision_world.Task(config, ImageProcessor(folder))


def test_a_cell_of_the_grid_is_a_token(task):
    image = task.model.config.image_token
    for question, ids in task.questions.items():
        assert (ids == image).sum() == shapes.SIDE**2
        text = task.tokenizer.decode(ids[-2:])
        assert text == question
    drawn = shapes.draw(np.random.default_rng(0))
    assert task.patches(drawn).grid == (1, 4, 4)  # Taken as it is, not resized.


def test_the_template_renders_what_the_task_trains_on(task):
    parts = [{"type": "image"}, {"type": "text", "text": "2="}]
    text = task.tokenizer.apply_chat_template(
        [{"role": "user", "content": parts}], tokenize=False
    )
    short = [i for i in task.questions["2="]]
    image = task.model.config.image_token
    first = short.index(image)
    del short[first : first + shapes.SIDE**2 - 1]
    assert task.tokenizer.encode(text) == short


def test_slips_are_no_targets_and_the_rest_is_right(task):
    generator = np.random.default_rng(0)
    pool = vision_world.Pool(task, generator, 8)
    problems = pool.problems(generator, 64)
    start = task.prompt_length
    right = vision_world.training_batch(task, problems, generator, slips=0.0)
    wrong = vision_world.training_batch(task, problems, generator, slips=1.0)
    for row, text in enumerate(problems.answers):
        ids = task.answer_ids(text)
        told, targets = (
            np.asarray(x)[row, start : start + len(ids)]
            for x in (right.tokens, right.weights)
        )
        np.testing.assert_array_equal(told, ids)
        assert (targets > 0).all()
        told, targets = (
            np.asarray(x)[row, start : start + len(ids)]
            for x in (wrong.tokens, wrong.weights)
        )
        assert (targets == 0).sum() == 1
        np.testing.assert_array_equal(told[targets > 0], ids[targets > 0])


def test_a_folder_is_built_once_and_whole(tmp_path):
    calls = []

    def build(folder):
        calls.append(folder)
        (folder / "a").write_text("1")

    place = tmp_path / "cache" / "made"
    assert built_once(place, build) == place
    assert built_once(place, build) == place
    assert len(calls) == 1
    assert (place / "a").read_text() == "1"

    def broken(folder):
        (folder / "a").write_text("1")
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        built_once(tmp_path / "cache" / "broken", broken)
    found = {path.name for path in (tmp_path / "cache").iterdir()}
    assert found == {"made", ".made.lock", ".broken.lock"}


def test_who_needs_a_folder_that_is_being_built_waits_for_it(tmp_path):
    begun, finish, calls = threading.Event(), threading.Event(), []

    def build(folder):
        calls.append(folder)
        begun.set()
        assert finish.wait(60)
        (folder / "a").write_text("1")

    place = tmp_path / "made"
    with ThreadPoolExecutor() as pool:
        first = pool.submit(built_once, place, build)
        assert begun.wait(60)
        second = pool.submit(built_once, place, build)
        with pytest.raises(TimeoutError):
            second.result(0.2)
        finish.set()
        assert first.result() == second.result() == place
    assert len(calls) == 1


@pytest.mark.slow
def test_the_world_is_built_kept_and_read(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = vision_world.world_folder(SMALL)
    monkeypatch.setattr(vision_world, "build_world", lambda *_: pytest.fail("again"))
    assert vision_world.world_folder(SMALL) == folder
    made = json.loads((folder / "recipe.json").read_text())
    assert set(made["snapshots"]) == {"anchor", "teacher"}
    anchor, teacher = (load(folder / name) for name in ("anchor", "teacher"))
    assert anchor.model == teacher.model
    moved = jax.tree.map(
        lambda a, b: bool((a != b).any()),
        anchor.params["visual"]["patch_embed"],
        teacher.params["visual"]["patch_embed"],
    )
    assert all(jax.tree.leaves(moved))  # The tower learns through the images.
    examples = read_prompts(folder / vision_world.PROMPTS, require_answers=True)
    assert len(examples) == SMALL["num_problems"]
    assert all(len(example.images) == 1 for example in examples)
    assert anchor.image_processor.merge_size == 2
    assert anchor.tokenizer.chat_template == vision_world.TEMPLATE


@pytest.mark.slow
def test_a_recipe_without_an_anchor_is_refused(task):
    config = get_config()
    config.update(SMALL | {"anchor_accuracy": 2.0, "teacher_steps": 2})
    with pytest.raises(ValueError, match="no snapshot reached an accuracy of 2.0"):
        vision_world.train(config, task, lambda params: 0.0)


def test_transformers_reads_the_same_configuration(task):
    fields = vision_world.config_json(get_config(), task.tokenizer)
    read = Qwen2_5_VLConfig.from_dict(fields)
    ours = task.model.config
    text, vision = read.text_config, read.vision_config
    assert text.vocab_size == ours.text.vocab_size == len(task.tokenizer)
    assert text.hidden_size == vision.out_hidden_size == ours.text.hidden_size
    assert text.num_key_value_heads == ours.text.num_kv_heads
    assert text.rope_parameters["rope_theta"] == ours.text.rope_theta
    assert tuple(text.rope_parameters["mrope_section"]) == ours.mrope_sections
    assert vision.window_size == ours.vision.window_size
    assert vision.fullatt_block_indexes == [1]
    assert read.image_token_id == ours.image_token
    assert text.bos_token_id is None
