"""Checks shared by the plotting functions: clear errors before anything is drawn."""

import math
from collections.abc import Mapping, Sized
from typing import NamedTuple, SupportsFloat

import numpy as np


class Curve(NamedTuple):
    """A quantity measured at some points by one or several repeats.

    Attributes:
      x: Points, shape [T], strictly increasing.
      values: Measurements, shape [S, T], a row a repeat (seed or matrix); NaN where a
        repeat has none.
    """

    x: np.ndarray
    values: np.ndarray


def require_some(name: str, items: Sized) -> None:
    """Raises ValueError if a collection is empty."""
    if len(items) == 0:
        raise ValueError(f"{name} is empty, expected at least one entry to draw")


def as_number(value: SupportsFloat | None) -> float:
    """The value as a float; None, as in JSON, is NaN: not measured."""
    return math.nan if value is None else float(value)


def check_curve(name: str, curve: Curve, positive: bool = False) -> Curve:
    """Returns `curve` in float64 after checking its shapes and values.

    Args:
      name: What the curve is called in an error.
      curve: The curve to check.
      positive: Whether the values go on a logarithmic axis; zeros are then dropped
        (drawn as gaps), and negative values are an error.

    Raises:
      ValueError: The curve is empty, its shapes disagree, `x` does not increase, or
        nothing is left to draw.
    """
    x = np.asarray(curve.x, np.float64)
    values = np.asarray(curve.values, np.float64)
    if x.ndim != 1 or values.ndim != 2 or values.shape[1:] != x.shape:
        raise ValueError(
            f"curve {name!r} has x of shape {x.shape} and values of shape "
            f"{values.shape}, expected [T] and [S, T]; add a leading axis for one seed"
        )
    if values.size == 0:
        raise ValueError(f"curve {name!r} has shape {values.shape}: nothing to draw")
    if not np.all(np.isfinite(x)) or np.any(np.diff(x) <= 0):
        raise ValueError(
            f"curve {name!r} needs finite, strictly increasing x; sort its points"
        )
    if positive:
        if np.any(values < 0):
            raise ValueError(
                f"curve {name!r} has negative values (least {np.nanmin(values)}), "
                "expected none on a logarithmic axis; draw it on a linear one"
            )
        values = np.where(values == 0, np.nan, values)
    values = np.where(np.isfinite(values), values, np.nan)
    if np.all(np.isnan(values)):
        raise ValueError(f"curve {name!r} has no finite value to draw")
    return Curve(x, values)


def check_curves(
    name: str, curves: Mapping[str, Curve], positive: bool = False
) -> dict[str, Curve]:
    """Checks every curve of a panel; see `check_curve`."""
    require_some(name, curves)
    return {key: check_curve(key, curve, positive) for key, curve in curves.items()}
