"""Makes the golden checkpoints: small Qwen3 models with the logits of transformers.

    python tests/models/make_golden.py

writes tests/models/golden/NAME/{config.json, model.safetensors, logits.npz}. The files
committed were made with transformers 5.23 and torch 2.13 on a CPU.
"""

from pathlib import Path

import numpy as np

GOLDEN = Path(__file__).parent / "golden"
CONFIGS = {
    # Queries wider than the residual stream, two of them to a key.
    "untied": {
        "vocab_size": 48,
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
        "tie_word_embeddings": False,
    },
    # Three layers, one key for all queries, the shorter rotary base.
    "tied": {
        "vocab_size": 40,
        "hidden_size": 32,
        "intermediate_size": 24,
        "num_hidden_layers": 3,
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
        "head_dim": 6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
        "tie_word_embeddings": True,
    },
}


def main() -> None:
    import torch
    from peer import make_peer, peer_logits

    for seed, (name, fields) in enumerate(CONFIGS.items()):
        peer = make_peer(seed, **fields)
        peer.save_pretrained(GOLDEN / name)
        generator = np.random.default_rng(seed)
        tokens = generator.integers(0, fields["vocab_size"], (3, 9)).astype(np.int32)
        segment_ids = np.ones((3, 9), np.int32)
        segment_ids[1, :4] = 0  # Padded on the left.
        segment_ids[2, 6:] = 0  # Padded on the right.
        positions = np.maximum(np.cumsum(segment_ids, axis=1) - 1, 0).astype(np.int32)
        with torch.no_grad():
            logits = peer_logits(peer, tokens, positions, segment_ids)
        np.savez(
            GOLDEN / name / "logits.npz",
            tokens=tokens,
            positions=positions,
            segment_ids=segment_ids,
            logits=logits,
        )
        (GOLDEN / name / "generation_config.json").unlink(missing_ok=True)


if __name__ == "__main__":
    main()
