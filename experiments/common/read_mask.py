"""A mask file as a tree of booleans."""

import os
from typing import Any

import jax
import numpy as np

from geomjax.models import hf
from geomjax.models.config import ModelConfig
from geomjax.optim.mask_file import load_mask
from geomjax.typing import Params


def read_mask(path: str | os.PathLike[str], params: Params, config: ModelConfig) -> Any:
    """Booleans shaped as the parameters, on the host.

    Args:
      path: The file.
      params: Parameters, for their shapes; they may lie over devices of several hosts.
      config: The model's configuration, for the names of tensors.

    Raises:
      FileNotFoundError: There is no such file.
      CheckpointError: It is damaged, or its tensors are not the model's.
    """
    tensors = hf.to_hf(nowhere(params), config)
    shapes = {name: tensor.shape for name, tensor in tensors}
    return hf.from_hf(load_mask(path, shapes), config)


def nowhere(params: Params) -> Params:
    """The mask without any coordinate; it takes no memory."""
    return jax.tree.map(lambda leaf: np.broadcast_to(np.bool_(0), leaf.shape), params)
