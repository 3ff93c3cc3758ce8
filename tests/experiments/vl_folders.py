"""Checkpoint folders of a small Qwen2.5-VL, and prompts in Geometry3K's schema."""

import io
import json
import string
from pathlib import Path

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from geomjax.checkpoints import write_safetensors
from geomjax.data.characters import character_tokenizer
from geomjax.models.families import model_config
from geomjax.models.load import make_model, stored_tensors

MARKS = ["<|image|>", "<|video|>"]
TEMPLATE = (
    "{% for m in messages %}{{ m.role[0] }}:{% if m.content is string %}"
    "{{ m.content }}{% else %}{% for part in m.content %}"
    "{% if part.type == 'image' %}<|image|>{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}{% endif %}\n{% endfor %}{% if add_generation_prompt %}a:{% endif %}"
)
VISION = {
    "depth": 2,
    "hidden_size": 16,
    "intermediate_size": 12,
    "num_heads": 2,
    "in_channels": 3,
    "patch_size": 2,
    "temporal_patch_size": 2,
    "spatial_merge_size": 2,
    "window_size": 8,
    "out_hidden_size": 16,
    "fullatt_block_indexes": [1],
    "hidden_act": "silu",
}
TEXT = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 1e4,
        "mrope_section": [1, 1, 2],
    },
}
PROCESSOR = {
    "image_processor_type": "Qwen2VLImageProcessor",
    "min_pixels": 16,
    "max_pixels": 256,
    "patch_size": VISION["patch_size"],
    "temporal_patch_size": VISION["temporal_patch_size"],
    "merge_size": VISION["spatial_merge_size"],
}


def save_vl(folder: Path, seed: int, *, kv_heads: int = 1, **vision: int) -> Path:
    """Random weights with a tokenizer of characters and an image processor."""
    folder.mkdir()
    printable = "".join(dict.fromkeys(string.printable[:95] + "\n"))
    tokenizer = character_tokenizer(printable, pad="<pad>", eos="<eos>")
    tokenizer.add_special_tokens({"additional_special_tokens": MARKS})
    tokenizer.chat_template = TEMPLATE
    image, video = tokenizer.convert_tokens_to_ids(MARKS)
    config = {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "model_type": "qwen2_5_vl",
        "image_token_id": image,
        "video_token_id": video,
        "vision_config": VISION | vision,
        "vocab_size": -(-len(tokenizer) // 8) * 8,  # Padded, as published ones are.
        **TEXT,
        "num_key_value_heads": kv_heads,
    }
    model = make_model(model_config(config))
    params = model.init(jax.random.key(seed))
    write_safetensors(folder, stored_tensors(params, model))
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    tokenizer.save_pretrained(folder)
    return folder


def figure(seed: int, height: int, width: int) -> bytes:
    """A PNG file of noise."""
    pixels = np.random.default_rng(seed).integers(
        0, 256, (height, width, 3), dtype=np.uint8
    )
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def save_geometry3k(path: Path, count: int) -> Path:
    """As the hub's Parquet; many problems differ in their figures alone, as there."""
    rows = [
        {
            "images": [{"bytes": figure(i, 8, 16), "path": None}],
            "problem": "<image>Find x.",
            "answer": str(i),
        }
        for i in range(count)
    ]
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path
