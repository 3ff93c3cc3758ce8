"""Bad input is refused with one clear message, before any work is done."""

import errno
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tqdm import tqdm

from configs.optimizer_ablation import get_config
from experiments import optimizer_ablation
from experiments.ablation.arms import Arm, check_settings, read_arms
from experiments.ablation.runner import make_objective
from experiments.common import cli
from experiments.common.world import TINY_WORLD, load_world
from geomjax.data.characters import character_tokenizer
from geomjax.train.errors import NonFiniteError

ROOT = Path(optimizer_ablation.__file__).parent.parent
EMBEDDING = "model.embed_tokens.weight"
PROMPTS = [{"prompt": f"{i}+{j}-1+2=", "answer": "000"} for i in "123" for j in "4567"]


@pytest.fixture
def student(tmp_path):
    """A copy of the bundled anchor, to be damaged."""
    return shutil.copytree(TINY_WORLD / "anchor", tmp_path / "student")


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in PROMPTS))
    return path


@pytest.fixture
def config(student, prompts):
    config = get_config("smoke")
    config.student, config.prompts = str(student), str(prompts)
    config.validation_fraction = config.test_fraction = 0.3
    return config


@pytest.fixture
def refused(config):
    """The message with which the world is refused."""

    def refused():
        with pytest.raises((ValueError, OSError)) as caught:
            load_world(config)
        return str(caught.value)

    return refused


def rewrite(folder, change):
    """Applies a change to the tensors of a checkpoint."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})


def edit_json(path, **fields):
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_the_undamaged_copy_loads(config):
    world = load_world(config)
    assert len(world.train.examples) + len(world.validation.examples) + len(
        world.test.examples
    ) == len(PROMPTS)


# --- checkpoints --------------------------------------------------------------------


def test_missing_folder(config, refused, tmp_path):
    config.student = str(tmp_path / "nowhere")
    assert "nowhere" in refused()


def test_missing_weights(student, refused):
    (student / "model.safetensors").unlink()
    message = refused()
    assert str(student) in message
    assert "safetensors" in message


@pytest.mark.parametrize("size", [0, 5, 100, 700_000])
def test_truncated_weights(student, refused, size):
    path = student / "model.safetensors"
    os.truncate(path, size)
    assert "model.safetensors" in refused()


def sharded(student, weight_map):
    path = student / "model.safetensors.index.json"
    path.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def test_index_names_a_missing_file(student, refused):
    names = list(load_file(student / "model.safetensors"))
    (student / "model.safetensors").rename(student / "model-00001-of-00002.safetensors")
    weight_map = dict.fromkeys(names, "model-00001-of-00002.safetensors")
    sharded(student, weight_map | {EMBEDDING: "model-00002-of-00002.safetensors"})
    message = refused()
    assert "model-00002-of-00002.safetensors" in message
    assert "there is none" in message


@pytest.mark.parametrize("place", ["../outside.safetensors", "/etc/passwd"])
def test_index_names_a_file_outside_its_folder(student, refused, place):
    names = list(load_file(student / "model.safetensors"))
    path = student / "model.safetensors"
    shutil.copyfile(path, student.parent / "outside.safetensors")
    path.unlink()
    sharded(student, dict.fromkeys(names, place))
    message = refused()
    assert place in message
    assert "inside its folder" in message


def test_all_misfits_are_listed_at_once(student, refused):
    def change(tensors):
        tensors["model.norm.weight"] = np.zeros(7, ml_dtypes.bfloat16)
        del tensors["model.layers.1.mlp.up_proj.weight"]
        del tensors["lm_head.weight"]
        tensors["model.layers.0.self_attn.q_proj.bias"] = np.zeros(
            128, ml_dtypes.bfloat16
        )

    rewrite(student, change)
    message = refused()
    assert "model.norm.weight has shape (7,), expected (128,)" in message
    assert "missing model.layers.1.mlp.up_proj.weight (384, 128)" in message
    assert "missing lm_head.weight" in message
    assert "unexpected model.layers.0.self_attn.q_proj.bias (128,)" in message


def test_weights_that_are_not_finite(student, refused):
    rewrite(student, lambda t: t["model.norm.weight"].__setitem__(3, np.nan))
    message = refused()
    assert "not finite" in message
    assert "model.norm.weight" in message


def test_another_architecture(student, refused):
    edit_json(
        student / "config.json",
        architectures=["OPTForCausalLM"],
        model_type="opt",
    )
    message = refused()
    assert "OPTForCausalLM" in message
    assert re.search("known: .*Qwen3ForCausalLM", message)


def test_damaged_config_json(student, refused):
    (student / "config.json").write_text('{"architectures": [')
    assert "config.json: is not JSON" in refused()


def test_missing_config_json(student, refused):
    (student / "config.json").unlink()
    assert "has no config.json" in refused()


def test_missing_tokenizer(student, refused):
    (student / "tokenizer.json").unlink()
    assert "has no tokenizer.json" in refused()


def test_teacher_with_another_tokenizer(config, refused, tmp_path):
    teacher = shutil.copytree(TINY_WORLD / "teacher", tmp_path / "teacher")
    other = character_tokenizer("9876543210+-=", pad="<pad>", eos="<eos>")
    other.save_pretrained(teacher)
    config.teacher = str(teacher)
    message = refused()
    assert "different tokenizers" in message
    assert "vocabulary" in message


def test_tokenizer_larger_than_the_head(config, student, refused):
    larger = character_tokenizer("0123456789+-=abc", pad="<pad>", eos="<eos>")
    for folder in (student, student.parent / "teacher"):
        if folder != student:
            shutil.copytree(TINY_WORLD / "teacher", folder)
        larger.save_pretrained(folder)
    config.teacher = str(student.parent / "teacher")
    assert "the tokenizer has 19 tokens but the embedding has 16 rows" in refused()


# --- prompts ------------------------------------------------------------------------


def test_prompts_longer_than_allowed(prompts, refused):
    with prompts.open("a") as file:
        file.write(json.dumps({"prompt": "1+" * 20 + "1=", "answer": "2"}) + "\n")
    assert "line 13: 42 tokens, expected at most 16" in refused()


def test_more_tokens_than_the_context(config, refused):
    config.max_new_tokens = 60
    message = refused()
    assert "max_prompt_tokens + max_new_tokens is 76" in message
    assert "the student's context is 64 tokens" in message


def test_missing_prompts_file(config, refused, tmp_path):
    config.prompts = str(tmp_path / "none.jsonl")
    assert "none.jsonl" in refused()


def test_empty_prompts_file(prompts, refused):
    prompts.write_text("\n\n")
    assert "holds no prompt" in refused()


def test_malformed_lines_are_named(prompts, refused):
    lines = prompts.read_text().splitlines()
    lines[2] = '{"prompt": "1+1="'
    lines[4] = '{"question": "1+1="}'
    lines[7] = '{"prompt": "1+1="}'
    prompts.write_text("\n".join(lines))
    message = refused()
    assert str(prompts) in message
    assert "line 3: is not JSON" in message
    assert "line 5: has no `prompt`" in message
    assert "line 8: has no `answer`, which measuring accuracy needs" in message


def test_answers_are_needed_for_accuracy_alone(config, prompts):
    rows = [{"prompt": row["prompt"]} for row in PROMPTS]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ValueError, match=r"line 1: has no `answer`"):
        load_world(config)
    config.accuracy = False
    assert load_world(config).train.examples[0].answer is None


def test_prompts_outside_the_alphabet(prompts, refused):
    with prompts.open("a") as file:
        file.write('{"prompt": "1+x=", "answer": "2"}\n')
    assert "line 13: the tokenizer does not know 'x'" in refused()


def test_too_few_prompts_to_split(prompts, refused):
    prompts.write_text(json.dumps(PROMPTS[0]) + "\n")
    assert "would be empty" in refused()


# --- configuration ------------------------------------------------------------------


def test_unknown_objective(config):
    config.objective = "revers_kl"
    known = "sampled_token, reverse_kl, forward_kl, jsd"
    with pytest.raises(ValueError, match=f"objective 'revers_kl'; known: {known}"):
        make_objective(config, load_world(config))


def test_unknown_mask(config):
    config.arms.sgd.mask = "mine"
    with pytest.raises(ValueError, match=r"arm sgd: mask 'mine'; known: \['none'"):
        read_arms(config)


def test_masks_of_a_run_that_is_not_there(config):
    del config.arms["adamw"]
    with pytest.raises(ValueError, match="'adamw' moved; there must be such an arm"):
        read_arms(config)


def test_arm_without_learning_rate(config):
    config.optimizers.sgd.learning_rates = ()
    with pytest.raises(ValueError, match="optimizer sgd: learning_rates is empty"):
        read_arms(config)


def test_arm_of_an_optimizer_that_is_not_described(config):
    config.arms.sgd.optimizer = "sgdd"
    with pytest.raises(ValueError, match=r"'sgdd' is not described.*'custom', 'sgd'"):
        read_arms(config)


def test_numbers_out_of_range_are_listed_at_once(config):
    config.save_every = 0
    config.num_steps = -1
    config.mask_density = 1.5
    config.seeds = (1, 1)
    config.temperature = 0.0
    with pytest.raises(ValueError, match="the configuration") as caught:
        check_settings(config)
    message = str(caught.value)
    assert "save_every is 0; expected a whole number above 0" in message
    assert "num_steps is -1" in message
    assert "mask_density is 1.5" in message
    assert "seeds are (1, 1)" in message
    assert "temperature is 0.0" in message


def test_prompts_that_cannot_be_split(config):
    config.prompts_per_step, config.samples_per_prompt = 5, 4
    config.mini_batches = 2
    with pytest.raises(ValueError, match="5 prompts_per_step cannot be split into 2"):
        check_settings(config)


def test_rows_that_cannot_be_split(config):
    config.prompts_per_step, config.samples_per_prompt = 5, 3
    config.mini_batches, config.micro_batches = 1, 2
    with pytest.raises(ValueError, match="15 sequences a step"):
        check_settings(config)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda c: c.optimizers.sgd.update(transform="sgdd"),
            "optimizer: got 'sgdd'",
        ),
        (
            lambda c: c.optimizers.sgd.options.update(momentun=0.9),
            r"unknown keywords \['momentun'\]",
        ),
        (lambda c: c.update(schedule="step"), "schedule"),
        (lambda c: c.optimizers.sgd.update(clip_norm=-1.0), "clip_norm: got -1.0"),
        (lambda c: c.update(frozen=("nothing",)), r"no parameter matches \['nothing'"),
    ],
)
def test_optimizers_are_checked_before_the_first_arm_runs(
    config, tmp_path, change, message
):
    with config.unlocked():
        change(config)
    with pytest.raises(ValueError, match=message):
        optimizer_ablation.run(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


# --- during the run -----------------------------------------------------------------


def only_sgd(config, *rates):
    with config.unlocked():
        config.arms = {"sgd": {"optimizer": "sgd", "mask": "none"}}
    config.optimizers.sgd.learning_rates = rates
    config.num_steps, config.evaluate_every, config.save_every = 3, 3, 1
    config.prompts_per_step = 2
    config.accuracy = False
    return config


def test_a_loss_that_is_not_finite_stops_the_run(config, tmp_path, monkeypatch):
    config = only_sgd(config, 1e30)
    monkeypatch.setattr(sys, "argv", ["ablation"])
    monkeypatch.setenv("TRANSFORMERS_VERBOSITY", "error")
    with pytest.raises(SystemExit) as caught:
        cli.main(lambda: optimizer_ablation.run(config, tmp_path / "run"))
    message = str(caught.value.code)
    assert message.startswith("error: step ")
    assert "not finite" in message
    assert "Lower the learning rate" in message
    # What was logged before is kept, and holds no number that is not finite.
    for line in (
        (tmp_path / "run/arms/sgd/lr_1e+30/seed_0/metrics.jsonl")
        .read_text()
        .splitlines()
    ):
        json.loads(line, parse_constant=pytest.fail)


class DivergingRunner:
    """Diverges at rates above 1, in the second seed."""

    def run(self, arm, rate, seed, own, on_step):
        if rate > 1 and seed == 1:
            raise NonFiniteError("step 2: loss not finite")
        return (arm.name, rate, seed)


def test_a_rate_that_diverges_does_not_end_a_sweep(config):
    config.seeds, config.num_steps = (0, 1, 2), 4
    arm = Arm("sgd", "sgd", (1e-3, 1e30), "none")
    with tqdm(total=24, disable=True) as bar:
        args = config, DivergingRunner(), arm
        good, bad = (optimizer_ablation.run_rate(*args, r, {}, bar) for r in arm[2])
    assert good.runs == [("sgd", 1e-3, seed) for seed in range(3)]
    assert good.error is None
    assert bad.runs == []
    assert bad.error == "step 2: loss not finite"
    only = arm._replace(learning_rates=(1e30,))
    with tqdm(disable=True) as bar, pytest.raises(NonFiniteError, match="step 2"):
        optimizer_ablation.run_rate(config, DivergingRunner(), only, 1e30, {}, bar)


def test_a_full_disk_during_export(ablation_run, tmp_path, monkeypatch):
    """An export that fails leaves an earlier one whole, and says what happened."""
    folder = tmp_path / "arms" / "adamw"
    shutil.copytree(
        ablation_run.workdir / "arms" / "adamw" / "checkpoint", folder / "checkpoint"
    )
    before = (folder / "checkpoint" / "model.safetensors").read_bytes()
    fsync = os.fsync

    def full(descriptor):
        if os.readlink(f"/proc/self/fd/{descriptor}").endswith(".tmp"):
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    monkeypatch.setattr(sys, "argv", ["ablation"])
    monkeypatch.setenv("TRANSFORMERS_VERBOSITY", "error")
    world = load_world(ablation_run.config)
    student = world.student

    def export():
        optimizer_ablation.export(
            folder / "checkpoint", student.params, student.model, like=world.student_dir
        )

    with pytest.raises(SystemExit) as caught:
        cli.main(export)
    assert "the disk is full" in str(caught.value.code)
    assert (folder / "checkpoint" / "model.safetensors").read_bytes() == before
    assert not list(folder.rglob("*.tmp"))


# --- the command line ---------------------------------------------------------------


def command_line(*arguments):
    """Status and output of the program; it must end with one `error:` message."""
    done = subprocess.run(
        [sys.executable, "-m", "experiments.optimizer_ablation", *arguments],
        cwd=ROOT,
        env=os.environ | {"PYTHONWARNINGS": "default"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert "Traceback" not in done.stdout + done.stderr
    return done.returncode, done.stderr


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--config.nosuch=1", "error: the configuration has no field 'nosuch'"),
        ("--config=configs/optimizer_ablation.py:nosuch", "error: variant 'nosuch'"),
        ("--config.student=/nowhere", "/nowhere:\n  - no such file or folder"),
        (
            "--config.mask_density=2.0",
            "error: the configuration:\n  mask_density is 2.0",
        ),
        ("--nosuch", "error: Unknown command line flag 'nosuch'"),
    ],
)
def test_errors_are_one_message_and_status_1(tmp_path, argument, message):
    status, stderr = command_line(f"--workdir={tmp_path / 'run'}", argument)
    assert status == 1
    assert message in stderr
