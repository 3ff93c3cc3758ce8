"""Recipes: every field marked, values as the papers have them, needs by estimate."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from configs import marks as marks_module
from configs import optimizer_ablation, p1_opd, p1_vl_opd, p2
from experiments import evaluate
from experiments.ablation.arms import check_settings, read_arms
from experiments.aot.programs import make_programs
from experiments.describe import describe, estimate, recipe_marks
from experiments.recipe import needs
from experiments.recipe.compiled import aot_config
from experiments.recipe.published import PUBLISHED, shaped
from geomjax.meshes import mesh_from_string

ROOT = Path(p2.__file__).parent.parent
RECIPES = [
    (p1_opd, "deepscaler"),
    (p1_opd, "justrl"),
    (p1_vl_opd, ""),
    (p2, "sft"),
    (p2, "opd"),
    (p2, "rlvr"),
]


def of(module, variant):
    arguments = (variant,) if variant else ()
    return module.get_fields(*arguments), module.get_config(*arguments)


@pytest.mark.parametrize(("module", "variant"), RECIPES)
def test_every_field_is_marked_and_described(module, variant):
    fields, config = of(module, variant)
    known = marks_module.marks(fields)
    file = f"{module.__file__}:{variant}" if variant else module.__file__
    if hasattr(module, "get_besides"):
        known |= marks_module.marks(module.get_besides(), "besides.")
    assert recipe_marks(file) == known
    lines = describe(config, known)
    assert len(lines) == len(known)
    for line in lines:
        name, *_ = line.split()
        mark = known[name]
        assert mark.origin in ("paper", "ours")
        assert line.endswith(mark.note)
        assert mark.note.strip()
        assert f"  {mark.origin} " in line
    origins = {mark.origin for mark in known.values()}
    assert origins == {"paper", "ours"}
    text = "\n".join(estimate(config, "TPU v5e", 16))
    assert "GiB a device" in text
    assert f"days for {config.num_steps} steps" in text


def test_the_papers_numbers():
    config = p1_opd.get_config()
    assert config.prompts_per_step // config.mini_batches == 32
    assert (config.samples_per_prompt, config.prompts_per_step) == (4, 128)
    assert (config.max_prompt_tokens, config.max_new_tokens) == (1024, 7168)
    assert config.optimizers.adamw.learning_rates == (1e-6,)
    assert config.optimizers.sgd.learning_rates == (1e-2,)
    assert config.mask_threshold == 1e-5
    assert p1_vl_opd.get_config().top_k == 32
    sft, opd, rlvr = (p2.get_config(name) for name in ("sft", "opd", "rlvr"))
    assert (sft.num_steps, opd.num_steps, rlvr.num_steps) == (5375, 299, 1023)
    assert rlvr.ratio_clip == (0.2, 0.28)
    assert rlvr.optimizers.adamw.options.eps == 1e-15
    assert {c.optimizers.adamw.options.weight_decay for c in (sft, opd, rlvr)} == {0.1}
    for config, sequences in ((opd, 64), (rlvr, 512)):
        assert config.prompts_per_step * config.samples_per_prompt == sequences


def test_the_evaluation_of_p1_is_what_evaluate_does(monkeypatch):
    besides = p1_opd.get_besides()
    assert {name: mark.value for name, mark in besides["gpus"].items()} == {
        "actor": 4,
        "teacher": 2,
    }
    defaults = {}

    def define(name, default, *_, **__):
        defaults[name] = default

    kinds = ("string", "integer", "float", "enum")
    recorder = SimpleNamespace(**{f"DEFINE_{kind}": define for kind in kinds})
    monkeypatch.setattr(evaluate, "flags", recorder)
    evaluate.define_flags()
    told = {name: mark.value for name, mark in besides["evaluate"].items()}
    assert told["max_new_tokens"] == 15_360
    assert {name: defaults[name] for name in told} == told


def test_the_ablation_takes_p1s_recipe():
    config = p1_opd.get_config()
    base = optimizer_ablation.get_config()
    assert set(config) == set(base)
    for name in ("data", "reward"):
        assert set(config[name]) == set(base[name])
    check_settings(config)
    assert [arm.name for arm in read_arms(config)] == [
        "adamw",
        "sgd",
        "adamw_opd_mask",
        "adamw_teacher_mask",
        "adamw_random_mask",
    ]


@pytest.mark.parametrize(
    ("name", "billions"),
    [  # The model cards; of the two that see, the cards of their language models.
        ("deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B", 1.78),
        ("Qwen/Qwen2.5-VL-3B-Instruct", 3.09),
        ("NoisyRollout-Geo3K-7B", 7.61),
        ("Qwen/Qwen3-1.7B-Base", 1.7),
        ("Qwen/Qwen3-4B", 4.0),
        ("Qwen/Qwen3-8B-Base", 8.2),
        ("Qwen/Qwen3-14B", 14.8),
        ("Qwen/Qwen3-32B", 32.8),
        ("Qwen/Qwen3-30B-A3B", 30.5),
    ],
)
def test_published_shapes_have_the_parameters_of_their_cards(name, billions):
    count = needs.count(shaped(name, "bfloat16"))
    assert count / 1e9 == pytest.approx(billions, abs=0.06)
    assert name in PUBLISHED


def test_memory_by_hand():
    config = p1_opd.get_config()
    lines = {line.what: line.amount for line in needs.memory(config)}
    weights = needs.count(shaped(config.student, "bfloat16"))
    assert lines["student"] == lines["gradients"] == 4 * weights
    assert lines["moments"] == 2 * 4 * weights
    # 28 layers, keys and values of 2 heads of 128, two bytes each.
    assert lines["rollout cache"] == 512 * 8192 * 28 * 2 * 2 * 128 * 2
    # By what an optimizer does, not by what it is called.
    config.optimizers = {"adamw": config.optimizers.sgd.to_dict()}
    assert {line.what: line.amount for line in needs.memory(config)}["moments"] == 0


def test_the_command_marks_what_was_changed_on_it():
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "experiments.describe",
            "--config=configs/p1_opd.py:justrl",
            "--config.num_steps=7",
            "--devices=4",
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        env={"JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1", "HOME": str(Path.home())},
    )
    assert done.returncode == 0, done.stderr
    (line,) = [x for x in done.stdout.splitlines() if x.startswith("num_steps")]
    assert line.split()[:3] == ["num_steps", "7", "changed"]
    assert "hbx/JustRL-DeepSeek-1.5B" in done.stdout
    assert "over 4 x TPU v5e" in done.stdout


def test_an_unknown_model_is_named():
    config = p2.get_config("opd")
    config.student = "nobody/model"
    with pytest.raises(ValueError, match="nobody/model is no local folder"):
        estimate(config, "TPU v5e", 1)
    with pytest.raises(ValueError, match="variant 'dpo'; known: sft, opd, rlvr"):
        p2.get_config("dpo")


def test_a_recipe_as_it_is_compiled_ahead_of_time():
    config = aot_config(p1_opd.get_config("justrl"), layers=2)
    assert config.layers == 2
    assert (config.student.name, config.teacher.name) == (
        "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B",
        "hbx/JustRL-DeepSeek-1.5B",
    )
    # 32 prompts a mini-batch, 4 samples each.
    assert config.sequences_per_update == config.sequences_per_rollout == 128
    assert config.max_prompt_tokens + config.max_new_tokens == 8192
    programs = make_programs(config, mesh_from_string("fsdp=8"))
    assert set(programs) == {"update", "rollout"}
    with pytest.raises(ValueError, match="only on-policy distillation is compiled"):
        aot_config(p2.get_config("rlvr"))
