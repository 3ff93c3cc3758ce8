"""Logits of a checkpoint as transformers computes them, in float32 on the CPU."""

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import transformers

from experiments.common.check_rows import Rows
from geomjax.models.fields import read_config


def missing(directory: Path) -> str | None:
    """Why transformers cannot compute the checkpoint here, or None where it can.

    Args:
      directory: Folder of the checkpoint.

    Returns:
      A reason in a few words.
    """
    if importlib.util.find_spec("torch") is None:
        return 'needs PyTorch: pip install "geomjax[parity]"'
    if model_class(directory) is None:
        return "transformers has no class of this architecture"
    return None


def transformers_logits(directory: Path, rows: Rows) -> np.ndarray:
    """Logits of every slot; those at padding mean nothing.

    No code of the checkpoint is executed.

    Args:
      directory: Folder of the checkpoint.
      rows: Token ids, and images where the model sees.

    Returns:
      float32 `[B, T, V]`, V as stored.

    Raises:
      ValueError: transformers cannot compute it, for the reason of `missing`.
    """
    reason = missing(directory)
    if reason is not None:
        raise ValueError(f"{directory}: {reason}")
    import torch

    model = model_class(directory).from_pretrained(
        directory,
        dtype=torch.float32,
        attn_implementation="eager",
        trust_remote_code=False,
    )
    inputs = {
        "input_ids": torch.tensor(rows.tokens, dtype=torch.long),
        "attention_mask": torch.tensor(rows.segment_ids, dtype=torch.long),
    }
    if rows.images is None:
        inputs["position_ids"] = torch.tensor(rows.positions, dtype=torch.long)
    else:  # The model makes the positions of images itself.
        images = [image for row in rows.images for image in row]
        values = np.concatenate([image.values for image in images])
        placeholder = model.config.image_token_id
        inputs["pixel_values"] = torch.tensor(values)
        inputs["image_grid_thw"] = torch.tensor([image.grid for image in images])
        inputs["mm_token_type_ids"] = torch.tensor(rows.tokens == placeholder).int()
    with torch.inference_mode():
        out = model.eval()(**inputs)
    return np.asarray(out.logits.numpy(), np.float32)


def model_class(directory: Path) -> Any:
    """The class that a checkpoint names, or None where transformers has none."""
    names = read_config(directory).get("architectures") or []
    found = [getattr(transformers, name, None) for name in names]
    return next((each for each in found if each is not None), None)
