"""Which tensors of a checkpoint are weights: those of a floating-point dtype."""

import ml_dtypes
import numpy as np

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)

WEIGHT_DTYPES: frozenset[np.dtype] = frozenset(
    {np.dtype(np.float64), np.dtype(np.float32), np.dtype(np.float16), BFLOAT16}
)
"""The dtypes that every reader returns.

float8 is not among them: its values mean nothing without scales that lie elsewhere.
"""


def is_weight(dtype: object) -> bool:
    """Whether tensors of `dtype` are weights; JAX's extended dtypes are not."""
    return isinstance(dtype, np.dtype) and dtype in WEIGHT_DTYPES


def left_out_reason(dtype: object) -> str:
    """Why a tensor of `dtype` is not read."""
    return f"{dtype} is not read as a floating-point weight"
