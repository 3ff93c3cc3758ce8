"""The oracle: Qwen3ForCausalLM of transformers with random weights."""

import numpy as np


def make_peer(seed, **fields):
    """A float32 model whose norms, too, are random."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    fields = {"max_position_embeddings": 64, "rms_norm_eps": 1e-6, **fields}
    generator = torch.Generator().manual_seed(seed)
    config = Qwen3Config(**fields, attn_implementation="eager")
    peer = Qwen3ForCausalLM(config).to(torch.float32).eval()
    with torch.no_grad():
        for name, parameter in peer.named_parameters():
            draw = torch.randn(parameter.shape, generator=generator)
            if name.endswith("norm.weight"):
                parameter.copy_(1 + 0.3 * draw)
            else:
                parameter.copy_(draw * parameter.shape[-1] ** -0.5)
    return peer


def peer_logits(peer, tokens, positions, segment_ids):
    """Logits `[B, T, V]`; those at padding mean nothing."""
    import torch

    with torch.no_grad():
        out = peer(
            input_ids=torch.tensor(tokens, dtype=torch.long),
            position_ids=torch.tensor(positions, dtype=torch.long),
            attention_mask=torch.tensor(segment_ids, dtype=torch.long),
        )
    return np.asarray(out.logits.numpy(), np.float32)
