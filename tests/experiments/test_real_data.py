"""Distillation on a file in DAPO-Math-17k's schema, judged as mathematics."""

import json
import shutil
import string

import jax
import pytest

from configs.optimizer_ablation import get_config
from experiments import optimizer_ablation
from experiments.common.prompts import UNUSABLE
from experiments.common.workdir import WorkdirError
from experiments.tiny_world import write_checkpoint
from geomjax.data.characters import character_tokenizer
from geomjax.models.config import DecoderConfig
from geomjax.models.load import make_decoder

TEMPLATE = (
    "{% for m in messages %}<{{ m.role[0] }}>{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<a>"
    "{% if enable_thinking is false %}<t></t>{% endif %}{% endif %}"
)
WORDING = 'Remember to put your answer on its own line after "Answer:".'


def dapo_row(problem, answer):
    return {
        "data_source": "math_dapo",
        "prompt": [{"content": f"{problem}\n\n{WORDING}", "role": "user"}],
        "ability": "MATH",
        "reward_model": {"ground_truth": answer, "style": "rule-lighteval/MATH_v2"},
        "extra_info": {"index": problem},
    }


def lines(path):
    return path.read_text().splitlines()


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A student and a teacher of random weights, with a tokenizer of characters."""
    folder = tmp_path_factory.mktemp("models")
    printable = "".join(dict.fromkeys(string.printable[:95] + "\n"))
    tokenizer = character_tokenizer(printable, pad="<pad>", eos="<eos>")
    tokenizer.chat_template = TEMPLATE
    model = make_decoder(
        DecoderConfig(
            architecture="Qwen3ForCausalLM",
            vocab_size=len(tokenizer),
            hidden_size=16,
            intermediate_size=24,
            num_layers=1,
            num_heads=2,
            num_kv_heads=1,
            head_dim=8,
            rms_norm_eps=1e-6,
            rope_theta=1e4,
            tie_word_embeddings=False,
            max_position_embeddings=512,
        ),
        len(tokenizer),
    )
    for seed, name in enumerate(("student", "teacher")):
        params = model.init(jax.random.key(seed))
        write_checkpoint(folder / name, params, model, tokenizer)
    return folder


@pytest.fixture
def config(models, tmp_path):
    rows = [dapo_row(f"What is {i} + {i + 1}?", str(2 * i + 1)) for i in range(24)]
    rows += [dapo_row("What is 5 + 6?", "11"), dapo_row("What is this?", "???")]
    rows += [dapo_row("What is " + "1 + " * 50 + "1?", "51")]
    shared = "a b c d e f g h i j k l m"
    rows += [dapo_row(f"Given {shared}, find n.", "14")]
    path = tmp_path / "dapo.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    known = {"id": 1, "problem": f"Known: {shared}.", "answer": "14"}
    (tmp_path / "aime.jsonl").write_text(json.dumps(known) + "\n")
    config = get_config("smoke")
    for name in set(config.arms) - {"adamw", "sgd"}:
        del config.arms[name]
    config.student, config.teacher = str(models / "student"), str(models / "teacher")
    config.prompts = f"dapo-math-17k={path}"
    config.data.system = "Think."
    config.data.thinking = "off"
    config.data.remove_duplicates = config.data.remove_overlap = True
    config.data.evaluation_sets = (f"aime24={tmp_path / 'aime.jsonl'}",)
    config.reward.name = "math"
    config.reward.timeout_s = 60.0
    config.max_prompt_tokens, config.max_new_tokens = 160, 4
    config.overlong = "drop"
    config.num_steps = config.evaluate_every = config.save_every = 2
    config.prompts_per_step, config.samples_per_prompt = 4, 2
    config.validation_fraction = config.test_fraction = 0.2
    config.evaluation_batch = 8
    return config


def test_distillation_on_dapo_math_with_its_reward(config, tmp_path, capsys):
    workdir = tmp_path / "run"
    record = optimizer_ablation.run(config, workdir)
    assert set(record["arms"]) == {"adamw", "sgd"}
    rows = [json.loads(line) for line in lines(workdir / "metrics.jsonl")]
    trained = [row for row in rows if row["kind"] == "train"]
    assert len(trained) == 2 * 2 * 2  # Arms, steps, mini-batches.
    assert all(row["update_norm"] > 0 for row in trained)
    scores = [row["test_accuracy"] for row in rows if row["kind"] == "eval"]
    assert len(scores) == 4
    assert all(0 <= score <= 1 for score in scores)
    # What a person sees: the prompt as the model does, and what was done to the data.
    said = capsys.readouterr().out
    assert "<s>Think.\n<u>What is " in said
    assert f"{WORDING}\n<a><t></t>\nids: [" in said
    assert "1 prompts repeat an earlier one, 0 of them with another answer" in said
    assert "1 prompts overlap with evaluation sets: removed" in said
    assert "1 prompts are longer than max_prompt_tokens and left out" in said
    (listed,) = map(json.loads, lines(workdir / UNUSABLE))
    assert listed == {"line": 26, "answer": "???", "reason": "cannot read '???'"}

    # Started again, it has nothing to do; on other data, it is refused.
    again = optimizer_ablation.run(config, workdir)
    assert again["arms"] == record["arms"]
    path = config.prompts.partition("=")[2]
    with open(path, "a") as file:
        file.write(json.dumps(dapo_row("What is 9 + 9?", "18")) + "\n")
    with pytest.raises(WorkdirError, match="changed since: prompts"):
        optimizer_ablation.run(config, workdir)


def test_a_template_the_tokenizer_lacks_is_a_clear_error(config, tmp_path, models):
    student = shutil.copytree(models / "student", tmp_path / "student")
    teacher = shutil.copytree(models / "teacher", tmp_path / "teacher")
    for folder in (student, teacher):
        (folder / "chat_template.jinja").unlink()
    config.student, config.teacher = str(student), str(teacher)
    with pytest.raises(ValueError, match=r"thinking: got False.*knows no"):
        optimizer_ablation.run(config, tmp_path / "run")
    config.data.thinking = "default"
    with pytest.raises(ValueError, match="the tokenizer has no chat template"):
        optimizer_ablation.run(config, tmp_path / "run")
