"""`experiments.evaluate` on problems with images, and on a mesh."""

import shutil

import pytest
from evaluate_runs import evaluated, lines
from vl_folders import save_geometry3k, save_vl

from experiments.common import workdir as workdirs


def geometry3k(folder, problems, **fields):
    """Flags of an evaluation of a random model on drawn problems."""
    model = save_vl(folder / "model", 0, **fields)
    data = save_geometry3k(folder / "test.parquet", problems)
    return {
        "checkpoint": str(model),
        "suite": f"geo3k={data}",
        "samples": 2,
        "max_new_tokens": 4,
        "rows": 8,
        "limit": 0,
    }


def test_geometry3k_is_evaluated_with_its_images(tmp_path, capsys):
    changes = geometry3k(tmp_path, 5)
    record = evaluated(tmp_path / "run", **changes)
    found = record["suites"]["geo3k"]["checkpoint"]
    assert sum(found["statuses"].values()) == 10
    assert found["mean"]["problems"] == 5
    assert record["rewards"]["geo3k"].endswith(":mathematics")
    assert "<|image|><|image|>Find x." in capsys.readouterr().out
    problems = lines(tmp_path / "run" / "checkpoint" / "geo3k.problems.jsonl")
    assert len({problem["prompt"] for problem in problems}) == 1
    assert len({tuple(problem["images"]) for problem in problems}) == 5
    # The prompts differ in their figures alone: greedily, so do the completions' odds.
    rows = lines(tmp_path / "run" / "checkpoint" / "geo3k.jsonl")
    assert len({row["completion"] for row in rows}) > 1

    # Other figures are other problems.
    save_geometry3k(tmp_path / "test.parquet", 4)
    folder = tmp_path / "run" / "checkpoint"
    shutil.rmtree(tmp_path / "again", ignore_errors=True)
    shutil.copytree(folder, tmp_path / "again" / "checkpoint")
    with pytest.raises(workdirs.WorkdirError, match="problems have changed"):
        evaluated(tmp_path / "again", **changes)


def test_images_are_refused_for_a_model_of_text(tmp_path):
    data = save_geometry3k(tmp_path / "test.parquet", 2)
    with pytest.raises(ValueError, match="with images, but Qwen3ForCausalLM sees none"):
        evaluated(tmp_path / "run", suite=f"geo3k={data}", limit=0)


def test_images_without_a_chat_template_are_refused(tmp_path):
    data = save_geometry3k(tmp_path / "test.parquet", 2)
    with pytest.raises(ValueError, match="--chat=off, but geo3k has images"):
        evaluated(
            tmp_path / "run", suite=f"tiny-world,geo3k={data}", limit=0, chat="off"
        )


def test_a_mesh_gives_the_generations_of_one_device(tmp_path):
    settings = {"samples": 2, "limit": 24, "rows": 16}
    evaluated(tmp_path / "one", **settings)
    evaluated(tmp_path / "mesh", **settings, mesh="data=4,tensor=2")
    name = "checkpoint/tiny-world.jsonl"
    assert lines(tmp_path / "mesh" / name) == lines(tmp_path / "one" / name)


def test_images_on_a_mesh_give_the_generations_of_one_device(tmp_path):
    settings = geometry3k(tmp_path, 6, kv_heads=2)
    evaluated(tmp_path / "one", **settings)
    evaluated(tmp_path / "mesh", **settings, mesh="data=2,fsdp=2,tensor=2")
    name = "checkpoint/geo3k.jsonl"
    made = lines(tmp_path / "mesh" / name)
    assert made == lines(tmp_path / "one" / name)
    assert len({row["completion"] for row in made}) > 1
