"""Makes the golden Qwen2.5-VL: a small model with what transformers computes of it.

    python tests/models/make_golden_vl.py

writes tests/models/golden_vl/{config.json, model.safetensors, golden.npz}. The files
committed were made with transformers 5.23 and torch 2.13 on a CPU.
"""

from pathlib import Path

import numpy as np

GOLDEN = Path(__file__).parent / "golden_vl"
VISION = {
    "depth": 2,
    "hidden_size": 16,
    "intermediate_size": 12,
    "patch_size": 2,
    "window_size": 8,
    "out_hidden_size": 12,
    "fullatt_block_indexes": [1],
}
TEXT = {
    "hidden_size": 12,
    "intermediate_size": 20,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 1e4,
        "mrope_section": [1, 1, 1],
    },
}
PADS = [(0, 0), (3, 0), (1, 2), (0, 4)]


def main() -> None:
    import torch
    from tiny_vl import IMAGE, ragged_batch
    from vl_peer import make_vl_peer, vision_features, vl_inputs

    from geomjax.models.families import model_config
    from geomjax.models.fields import read_config

    peer = make_vl_peer(0, vision=VISION, text=TEXT, tied=True)
    peer.save_pretrained(GOLDEN)
    (GOLDEN / "generation_config.json").unlink(missing_ok=True)
    batch = ragged_batch(model_config(read_config(GOLDEN)), PADS)
    inputs = vl_inputs(batch, IMAGE)
    images = [image for row in batch.rows for image in row]
    with torch.no_grad():
        logits = peer(**inputs).logits.numpy()
    positions, deltas = peer.model.get_rope_index(
        inputs["input_ids"],
        mm_token_type_ids=inputs["mm_token_type_ids"],
        image_grid_thw=inputs["image_grid_thw"],
        attention_mask=inputs["attention_mask"],
    )
    np.savez_compressed(
        GOLDEN / "golden.npz",
        tokens=batch.tokens,
        segment_ids=batch.segment_ids,
        pixel_values=inputs["pixel_values"].numpy(),
        grids=inputs["image_grid_thw"].numpy(),
        images_per_row=np.array([len(row) for row in batch.rows]),
        features=np.concatenate(vision_features(peer, images)),
        positions=positions.numpy(),
        deltas=deltas.numpy()[:, 0],
        logits=logits,
    )


if __name__ == "__main__":
    main()
