"""Logits, loading and export against transformers' Qwen3ForCausalLM, in float32."""

import jax
import numpy as np
import pytest
from tiny_decoder import ragged

from geomjax.models.load import export, load

pytest.importorskip("torch", reason="needs PyTorch: the parity extra")

from peer import make_peer, peer_logits  # noqa: E402  (imports torch)

pytestmark = pytest.mark.parity

GRID = {
    "untied, plain heads": {"num_attention_heads": 2, "num_key_value_heads": 2},
    "tied": {"tie_word_embeddings": True},
    "grouped by 2, wide heads": {"num_attention_heads": 4, "head_dim": 16},
    "one key head, narrow heads": {"num_key_value_heads": 1, "head_dim": 4},
    "small rotary base": {
        "rope_parameters": {"rope_type": "default", "rope_theta": 50.0}
    },
    "coarse epsilon": {"rms_norm_eps": 1e-2},
    "deeper than is unrolled": {"num_hidden_layers": 10},
}
DEFAULTS = {
    "vocab_size": 37,
    "hidden_size": 24,
    "intermediate_size": 28,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    "tie_word_embeddings": False,
}


def our_logits(model, params, inputs):
    hidden = jax.jit(model.apply)(params, *inputs)
    return np.asarray(hidden) @ np.asarray(model.unembedding(params)).T


@pytest.mark.parametrize("fields", GRID.values(), ids=GRID.keys())
def test_logits_of_ragged_batches_agree(fields, tmp_path):
    peer = make_peer(7, **DEFAULTS | fields)
    peer.save_pretrained(tmp_path)
    model, params = load(tmp_path)
    inputs = ragged(3, 37, [(0, 0), (5, 0), (0, 4), (2, 3)], length=11)
    real = inputs[2] != 0
    expected = peer_logits(peer, *inputs)[real]
    np.testing.assert_allclose(
        our_logits(model, params, inputs)[real], expected, atol=1e-4
    )


@pytest.mark.parametrize("tied", [False, True])
def test_sharded_checkpoint_loads_and_export_loads_in_transformers(tied, tmp_path):
    import torch
    from transformers import AutoModelForCausalLM

    source, target = tmp_path / "source", tmp_path / "target"
    peer = make_peer(11, **DEFAULTS | {"tie_word_embeddings": tied})
    peer.save_pretrained(source, max_shard_size="8KB")
    assert len(list(source.glob("*.safetensors"))) > 1
    model, params = load(source)
    export(target, params, model, like=source)
    back, info = AutoModelForCausalLM.from_pretrained(
        target, dtype=torch.float32, output_loading_info=True
    )
    assert not any(info.values())
    inputs = ragged(5, 37, [(0, 0), (3, 1)], length=8)
    real = inputs[2] != 0
    stored = load(target)
    np.testing.assert_allclose(
        our_logits(*stored, inputs)[real], peer_logits(back, *inputs)[real], atol=1e-4
    )
    # bfloat16 storage moved the logits, so the two above did not read the source.
    moved = our_logits(model, params, inputs) - our_logits(*stored, inputs)
    assert 1e-3 < np.abs(moved[real]).max() < 0.2
