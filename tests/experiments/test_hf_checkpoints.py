"""The ablation on checkpoints that transformers wrote, with their own tokenizer."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import pytest
from hf_folders import PADDED, TEXT, bpe_tokenizer, save_model
from transformers import AutoTokenizer

from configs.optimizer_ablation import get_config
from experiments import optimizer_ablation
from geomjax.models.load import load

torch = pytest.importorskip("torch", reason="needs PyTorch: the parity extra")

from transformers import (  # noqa: E402  (torch must be there)
    AutoModelForCausalLM,
    Qwen3ForCausalLM,
)

pytestmark = pytest.mark.parity


class Run(NamedTuple):
    folder: Path
    record: dict[str, Any]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Run:
    """A tied student with padded vocabulary and a larger, untied teacher."""
    folder = tmp_path_factory.mktemp("hf")
    tokenizer = bpe_tokenizer()
    save_model(
        folder / "student",
        tokenizer,
        "Qwen3",
        head_dim=8,
        hidden_size=16,
        intermediate_size=24,
        num_attention_heads=2,
        tie_word_embeddings=True,
    )
    save_model(
        folder / "teacher",
        tokenizer,
        "Qwen3",
        head_dim=8,
        hidden_size=32,
        intermediate_size=40,
        num_attention_heads=4,
        tie_word_embeddings=False,
    )
    prompts = [
        {"prompt": [{"role": "user", "content": f"{text} ({i})"}]}
        for text in TEXT
        for i in range(6)
    ]
    (folder / "prompts.jsonl").write_text("\n".join(map(json.dumps, prompts)))
    config = get_config("smoke")
    config.student = str(folder / "student")
    config.teacher = str(folder / "teacher")
    config.prompts = str(folder / "prompts.jsonl")
    config.max_prompt_tokens, config.max_new_tokens = 64, 8
    config.accuracy = False
    config.num_steps, config.evaluate_every, config.save_every = 2, 1, 2
    config.prompts_per_step, config.samples_per_prompt = 2, 2
    config.validation_fraction = config.test_fraction = 0.3
    with config.unlocked():
        config.arms = {
            name: config.arms[name]
            for name in ("adamw", "adamw_opd_mask", "adamw_teacher_mask")
        }
    config.export_masters = True
    return Run(folder, optimizer_ablation.run(config, folder / "run"))


def test_the_teacher_mask_is_skipped_and_said_so(run):
    assert set(run.record["arms"]) == {"adamw", "adamw_opd_mask"}
    why = run.record["skipped"]["adamw_teacher_mask"]
    assert "other shapes" in why
    assert "adamw_teacher_mask was not run" in (
        run.folder / "run" / "report.html"
    ).read_text().replace("&#95;", "_")


def test_without_answers_there_is_a_divergence_and_no_accuracy(run):
    for arm in run.record["arms"].values():
        assert arm["accuracy_start"] is None
        assert arm["accuracy_late"] is None
        assert arm["loss_first"] > 0
        assert arm["loss_final"] > 0
    assert run.record["claims"] == []


@pytest.mark.parametrize("arm", ["adamw", "adamw_opd_mask"])
def test_the_exported_student_has_equal_logits_in_transformers(run, arm):
    folder = run.folder / "run" / "arms" / arm / "checkpoint"
    peer = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert isinstance(peer, Qwen3ForCausalLM)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = np.array([tokenizer.encode(TEXT[0])], np.int32)
    with torch.no_grad():
        theirs = peer(torch.tensor(ids, dtype=torch.long)).logits.numpy()
    model, params = load(folder)
    positions = np.arange(ids.shape[1], dtype=np.int32)[None]
    inputs = map(jnp.asarray, (ids, positions, np.ones_like(ids)))
    hidden = model.apply(params, *inputs)
    ours = np.asarray(hidden) @ np.asarray(model.unembedding(params)).T
    np.testing.assert_allclose(ours, theirs[..., : ours.shape[-1]], atol=1e-4)
    assert ours.shape[-1] == len(tokenizer) + PADDED


def test_the_exported_student_is_a_trained_one(run):
    before = AutoModelForCausalLM.from_pretrained(
        run.folder / "student", dtype=torch.float32
    ).state_dict()
    after = AutoModelForCausalLM.from_pretrained(
        run.folder / "run" / "arms" / "adamw" / "masters", dtype=torch.float32
    ).state_dict()
    assert before.keys() == after.keys()
    assert all(not torch.equal(before[name], after[name]) for name in before)
    # Neither loss nor sampler sees the padding; weight decay alone may shrink it.
    rows = before["model.embed_tokens.weight"].shape[0] - PADDED
    padding = [state["model.embed_tokens.weight"][rows:] for state in (before, after)]
    torch.testing.assert_close(padding[1], padding[0], rtol=1e-4, atol=0)


def test_the_companions_are_copied(run):
    folder = run.folder / "run" / "arms" / "adamw" / "checkpoint"
    original = json.loads((run.folder / "student" / "config.json").read_text())
    exported = json.loads((folder / "config.json").read_text())
    assert exported == original
    assert exported["tie_word_embeddings"] is True
    tokenizer = AutoTokenizer.from_pretrained(folder)
    messages = [{"role": "user", "content": "hello"}]
    assert tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True
    ) == ("<s>user\nhello<e>\n<s>assistant\n")
