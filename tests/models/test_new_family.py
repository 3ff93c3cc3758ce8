"""The README's new family is the function that transformers computes."""

import re
from pathlib import Path

import jax
import numpy as np
import pytest
from tiny_decoder import ragged

from geomjax.models.families import FAMILIES
from geomjax.models.load import export, load

pytest.importorskip("torch", reason="needs PyTorch: the parity extra")

pytestmark = pytest.mark.parity

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
NAME = "SeedOssForCausalLM"


@pytest.fixture
def seed_oss(monkeypatch):
    """The entry that the example makes."""
    (example,) = [
        block
        for block in re.findall(r"^```python\n(.*?)^```$", README, re.M | re.S)
        if NAME in block
    ]
    before = dict(FAMILIES)
    exec(example, {"__name__": "example"})
    made = FAMILIES[NAME]
    FAMILIES.clear()
    FAMILIES.update(before)
    monkeypatch.setitem(FAMILIES, NAME, made)
    return made


@pytest.mark.parametrize(
    "fields", [{}, {"attention_out_bias": True, "tie_word_embeddings": True}]
)
def test_logits_agree_and_export_loads_there(seed_oss, fields, tmp_path):
    import torch
    import transformers

    config = transformers.SeedOssConfig(
        vocab_size=29,
        hidden_size=24,
        intermediate_size=28,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=10,
        max_position_embeddings=64,
        attn_implementation="eager",
        pad_token_id=None,
        **fields,
    )
    torch.manual_seed(0)
    peer = transformers.SeedOssForCausalLM(config).float().eval()
    with torch.no_grad():
        for parameter in peer.parameters():
            parameter.copy_(parameter + 0.2 * torch.randn(parameter.shape))
    peer.save_pretrained(tmp_path / "source")
    model, params = load(tmp_path / "source")
    assert model.config.architecture == NAME
    tokens, positions, segments = ragged(3, 29, [(0, 0), (4, 0), (0, 3)], length=9)
    with torch.no_grad():
        expected = peer(
            input_ids=torch.tensor(tokens, dtype=torch.long),
            position_ids=torch.tensor(positions, dtype=torch.long),
            attention_mask=torch.tensor(segments, dtype=torch.long),
        ).logits.numpy()
    hidden = jax.jit(model.apply)(params, tokens, positions, segments)
    logits = np.asarray(hidden) @ np.asarray(model.unembedding(params)).T
    real = segments != 0
    assert expected[real].std() > 0.3
    np.testing.assert_allclose(logits[real], expected[real], atol=1e-4)
    source = tmp_path / "source"
    export(tmp_path / "target", params, model, like=source, dtype=np.float32)
    back, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "target", dtype="float32", output_loading_info=True
    )
    assert not any(info.values())
    for name, value in back.state_dict().items():
        assert torch.equal(value, peer.state_dict()[name]), name
