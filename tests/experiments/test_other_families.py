"""The ablation on students and teachers of other families than the tiny world's."""

import json

import numpy as np
import pytest
from hf_folders import TEXT, bpe_tokenizer, save_model

from configs.optimizer_ablation import get_config
from experiments import optimizer_ablation
from geomjax.checkpoints import open_source

torch = pytest.importorskip("torch", reason="needs PyTorch: the parity extra")

from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402

pytestmark = pytest.mark.parity

SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}
EXPERTS = {
    "head_dim": 8,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 12,
    "norm_topk_prob": True,
}
PAIRS = {
    "qwen2": (("Qwen2", {}), ("Qwen2", {"tie_word_embeddings": True})),
    "llama, taught by experts": (
        ("Llama", {"attention_bias": True}),
        ("Qwen3Moe", EXPERTS),
    ),
}


def make_config(folder, student, teacher):
    """A run of two steps of one arm, on problems without answers."""
    tokenizer = bpe_tokenizer()
    for name, (family, fields) in (("student", student), ("teacher", teacher)):
        save_model(folder / name, tokenizer, family, **SIZES, **fields)
    prompts = [{"prompt": f"{text} ({i})"} for text in TEXT for i in range(6)]
    (folder / "prompts.jsonl").write_text("\n".join(map(json.dumps, prompts)))
    config = get_config("smoke")
    config.student = str(folder / "student")
    config.teacher = str(folder / "teacher")
    config.prompts = str(folder / "prompts.jsonl")
    config.max_prompt_tokens, config.max_new_tokens = 64, 4
    config.accuracy = False
    config.num_steps, config.evaluate_every, config.save_every = 2, 2, 2
    config.prompts_per_step, config.samples_per_prompt = 2, 2
    config.validation_fraction = config.test_fraction = 0.3
    with config.unlocked():
        config.arms = {"adamw": config.arms["adamw"]}
    return config


@pytest.mark.parametrize(("student", "teacher"), PAIRS.values(), ids=PAIRS.keys())
def test_a_pair_of_other_families_is_distilled_and_exported(student, teacher, tmp_path):
    config = make_config(tmp_path, student, teacher)
    record = optimizer_ablation.run(config, tmp_path / "run")
    arm = record["arms"]["adamw"]
    assert np.isfinite(arm["loss_first"])
    assert np.isfinite(arm["loss_final"])
    exported = tmp_path / "run" / "arms" / "adamw" / "checkpoint"
    peer = AutoModelForCausalLM.from_pretrained(exported, dtype=torch.bfloat16)
    assert type(peer).__name__ == f"{student[0]}ForCausalLM"
    assert AutoTokenizer.from_pretrained(exported).eos_token == "<e>"
    before, after = open_source(tmp_path / "student"), open_source(exported)
    assert set(before.keys()) == set(after.keys())
    moved = [
        name
        for name in before.keys()
        if not np.array_equal(before.read(name), after.read(name))
    ]
    assert moved
