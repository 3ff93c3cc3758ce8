"""Distillation of a model that sees, on a file in Geometry3K's schema."""

import json

import numpy as np
import pytest
from vl_folders import figure, save_geometry3k, save_vl

from configs.optimizer_ablation import get_config
from experiments import optimizer_ablation
from geomjax.checkpoints.safetensors import SafetensorsSource
from geomjax.optim.mask_file import load_mask

ARMS = ("adamw", "adamw_opd_mask")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return [save_vl(folder / name, i) for i, name in enumerate(("student", "teacher"))]


@pytest.fixture
def config(models, tmp_path):
    config = get_config("smoke")
    for name in set(config.arms) - set(ARMS):
        del config.arms[name]
    config.student, config.teacher = map(str, models)
    path = save_geometry3k(tmp_path / "train.parquet", 24)
    config.prompts = f"geometry3k={path}"
    config.reward.name = "math"
    config.reward.timeout_s = 60.0
    config.max_prompt_tokens, config.max_new_tokens = 400, 3
    config.num_steps = config.evaluate_every = config.save_every = 2
    config.prompts_per_step, config.samples_per_prompt = 4, 2
    config.validation_fraction = config.test_fraction = 0.25
    config.evaluation_batch = 4
    return config


def tensors(folder):
    source = SafetensorsSource(folder)
    return {name: source.read(name) for name in source.keys()}


@pytest.mark.slow
def test_distillation_on_geometry3k(config, tmp_path, capsys, models):
    workdir = tmp_path / "run"
    record = optimizer_ablation.run(config, workdir)
    assert set(record["arms"]) == set(ARMS)
    rows = [
        json.loads(line)
        for line in (workdir / "metrics.jsonl").read_text().splitlines()
    ]
    trained = [row for row in rows if row["kind"] == "train"]
    assert len(trained) == 2 * 2 * 2  # Arms, steps, mini-batches.
    assert all(row["update_norm"] > 0 for row in trained)
    evaluated = [row for row in rows if row["kind"] == "eval"]
    assert all(0 <= row["test_accuracy"] <= 1 for row in evaluated)
    assert all(row["validation_reverse_kl"] > 0 for row in evaluated)
    said = capsys.readouterr().out
    assert "<|image|><|image|>" in said
    assert "Find x." in said

    # Images were seen: the tower moved, by gradients that came through them, and the
    # masked arm left what its mask leaves out, in the tower too.
    start = tensors(models[0])
    mask = load_mask(
        workdir / "arms" / "adamw_opd_mask" / "mask.safetensors",
        {name: tensor.shape for name, tensor in start.items()},
    )
    for arm in ARMS:
        tuned = tensors(workdir / "arms" / arm / "lr_0.0001" / "seed_0" / "final")
        moved = {n: w != start[n].astype(np.float32) for n, w in tuned.items()}
        assert moved["visual.patch_embed.proj.weight"].any()
        if arm != "adamw":
            assert not any((moved[n] & ~np.asarray(mask[n])).any() for n in moved)
    # The geometry of the delta holds the tower's matrices.
    geometry = record["arms"]["adamw"]["geometry"]["master"]["groups"]
    assert geometry["vision"]["delta_frobenius"] > 0
    drawn = (workdir / "figures" / "sparsity_map.svg").read_text()
    assert "visual.attn.qkv" in drawn


@pytest.mark.slow
def test_distillation_on_images_on_a_mesh_ends_where_one_device_does(config, tmp_path):
    names = ("student", "teacher")
    config.student, config.teacher = (
        str(save_vl(tmp_path / name, i, kv_heads=2)) for i, name in enumerate(names)
    )
    del config.arms["adamw_opd_mask"]
    config.prompts_per_step, config.export_masters = 8, True
    masters = {}
    for mesh in ("", "data=2,fsdp=2,tensor=2"):
        config.mesh = mesh
        workdir = tmp_path / f"run-{mesh}"
        optimizer_ablation.run(config, workdir)
        masters[mesh] = tensors(workdir / "arms" / "adamw" / "masters")
    one, many = masters.values()
    start = tensors(config.student)
    assert any(name.startswith("visual.") for name in one)
    for name, expected in one.items():
        moved = np.linalg.norm(expected - start[name].astype(np.float32))
        assert moved > 0, name
        assert np.linalg.norm(many[name] - expected) < 1e-2 * moved, name


def test_problems_that_differ_in_figures_alone_are_split(config, tmp_path):
    world = optimizer_ablation.load_world(config)
    sizes = [len(part.examples) for part in world.prompts[:3]]
    assert sum(sizes) == 24
    assert min(sizes) > 1
    assert len({example.prompt for example in world.train.examples}) == 1


def test_splits_of_mixed_data_are_encoded_alike(config, tmp_path):
    """One prompt in twenty has an image: some split has none."""
    (tmp_path / "a.png").write_bytes(figure(0, 8, 16))
    rows = [{"prompt": f"{i}+1=", "answer": str(i + 1)} for i in range(20)]
    rows[7] |= {"prompt": "<image>7+1=", "images": ["a.png"]}
    path = tmp_path / "mixed.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config.prompts = str(path)
    world = optimizer_ablation.load_world(config)
    parts = world.prompts[:3]
    assert sum(len(part.examples) for part in parts) == 20
    seen = [name for name in ("train", "validation", "test") if world.images_of(name)]
    assert len(seen) == 1
    for part in parts:
        for example, ids in zip(part.examples, part.token_ids, strict=True):
            prompt = example.prompt.removeprefix("<image>")
            text = world.tokenizer.decode(ids).replace("<|image|>", "")
            assert text == f"u:{prompt}a:"


def test_what_cannot_see_the_images_is_refused(config, tmp_path, models):
    config.student = config.teacher = ""
    config.max_prompt_tokens = 50  # The tiny world's context is 64.
    with pytest.raises(ValueError, match="with images, but Qwen3ForCausalLM sees none"):
        optimizer_ablation.run(config, tmp_path / "run")
    config.student, config.max_prompt_tokens = str(models[0]), 400
    config.teacher = str(save_vl(tmp_path / "other", 2, window_size=16))
    with pytest.raises(ValueError, match="student and teacher take images differently"):
        optimizer_ablation.run(config, tmp_path / "run")
