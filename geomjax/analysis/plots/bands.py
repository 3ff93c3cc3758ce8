"""Mean and spread over repeats, the same in every figure and table."""

from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Float
from scipy import special

BandKind = Literal["range", "ci95"]


class Band(NamedTuple):
    """A mean with its lower and upper edge, each of shape [T]."""

    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray


def student_half_width(
    values: Float[np.ndarray, "S T"], confidence: float = 0.95
) -> Float[np.ndarray, "T"]:
    """Half width of the confidence interval of the mean over axis 0.

    t_{(1+c)/2, n-1} * s / sqrt(n), with n the finite values of a column and s their
    sample standard deviation.

    Args:
      values: Repeats, shape [S, T]; NaN where one is missing.
      confidence: Coverage c in (0, 1).

    Returns:
      Half widths, shape [T]; NaN where fewer than two values are finite.
    """
    count = np.sum(np.isfinite(values), axis=0)
    known = np.where(np.isfinite(values), values, 0.0)
    size = np.maximum(count, 1)
    mean = np.sum(known, axis=0) / size
    square = np.where(np.isfinite(values), (values - mean[None]) ** 2, 0.0)
    freedom = np.maximum(count - 1, 1)
    deviation = np.sqrt(np.sum(square, axis=0) / freedom)
    quantile = special.stdtrit(freedom.astype(np.float64), 0.5 * (1.0 + confidence))
    return np.where(count > 1, quantile * deviation / np.sqrt(size), np.nan)


def band_over_repeats(values: Float[np.ndarray, "S T"], kind: BandKind) -> Band:
    """Mean over axis 0, with the range of the values or a 95 % interval of the mean.

    Args:
      values: Repeats, shape [S, T]; NaN where one is missing.
      kind: `range` (least to greatest) or `ci95` (Student t).

    Returns:
      Mean and edges, shape [T]. The edges are NaN where they are undefined: where
      nothing is finite, and for `ci95` where fewer than two values are.
    """
    finite = np.isfinite(values)
    count = np.sum(finite, axis=0)
    total = np.sum(np.where(finite, values, 0.0), axis=0)
    mean = np.where(count > 0, total / np.maximum(count, 1), np.nan)
    if kind == "range":
        low = np.min(np.where(finite, values, np.inf), axis=0)
        high = np.max(np.where(finite, values, -np.inf), axis=0)
        none = count == 0
        return Band(mean, np.where(none, np.nan, low), np.where(none, np.nan, high))
    half = student_half_width(values)
    return Band(mean, mean - half, mean + half)


def describe_band(kind: BandKind, repeats: int, what: str = "seeds") -> str:
    """The sentence that a caption owes its reader about the line and its band."""
    if repeats == 1:
        return "A single measurement a point: no band."
    edges = {
        "range": "the least and the greatest of them",
        "ci95": "a 95 % confidence interval of the mean (Student t)",
    }
    return f"Line: mean over {repeats} {what}; band: {edges[kind]}."
