"""Singular-value spectra of updates beside their source and a null."""

from collections.abc import Mapping

import numpy as np
from jaxtyping import Float
from matplotlib.figure import Figure

from geomjax.analysis.plots.inputs import Curve, require_some
from geomjax.analysis.plots.lines import Panel, Reference, line_figure
from geomjax.analysis.plots.style import INK, SeriesStyle, resolve_styles

SOURCE_LABEL = "source W"
NULL_LABEL = "Gaussian null"


def singular_value_spectra(
    updates: Mapping[str, Float[np.ndarray, "..."]],
    *,
    source: Float[np.ndarray, "..."] | None = None,
    null: Float[np.ndarray, "..."] | None = None,
    title: str | None = None,
    styles: Mapping[str, SeriesStyle] | None = None,
) -> Figure:
    """Draws sigma_i(D) / ||D||_F against i on logarithmic axes.

    Every spectrum is divided by its own Frobenius norm, sqrt(sum_i sigma_i^2), so that
    updates of any size, the source and one null share the axes. A reader should see how
    far the leading directions rise above the flat spectrum of a random matrix.

    Args:
      updates: By run, the singular values of D in descending order, shape [r].
      source: Those of W, shape [r].
      null: Those of S random matrices of the same shape, [S, r]; drawn as their mean
        and range.
      title: A heading, if any.
      styles: Looks by run, from `assign_styles`; fresh ones if None.

    Returns:
      A figure with one axes. Singular values of zero are left out.

    Raises:
      ValueError: No update, a spectrum that is not one descending row of finite
        numbers, or one that is all zero.
    """
    require_some("updates", updates)
    if SOURCE_LABEL in updates:
        raise ValueError(f"{SOURCE_LABEL!r} is the source's name; rename that update")
    curves = {name: _scaled(name, values[None]) for name, values in updates.items()}
    looks = dict(resolve_styles(list(updates), styles))
    if source is not None:
        curves[SOURCE_LABEL] = _scaled(SOURCE_LABEL, source[None])
        looks[SOURCE_LABEL] = SeriesStyle(INK, "-", "")
    references = []
    if null is not None:
        references.append(Reference(NULL_LABEL, _scaled(NULL_LABEL, null)))
    return line_figure(
        [Panel("singular value / Frobenius norm", curves, references, y_log=True)],
        x_label="index of the singular value",
        panel_height_in=3.6,
        mark_points=False,
        x_log=True,
        title=title,
        styles=looks,
    )


def _scaled(name: str, values: np.ndarray) -> Curve:
    spectra = np.asarray(values, np.float64)
    norm = np.linalg.norm(spectra, axis=-1, keepdims=True)
    if spectra.ndim != 2 or spectra.size == 0 or not np.all(np.isfinite(spectra)):
        raise ValueError(
            f"spectrum {name!r} has shape {spectra.shape[-1:]}, expected finite values "
            "of shape [r], or [S, r] for the null"
        )
    if np.any(np.diff(spectra, axis=-1) > 0) or np.any(spectra < 0):
        raise ValueError(
            f"spectrum {name!r} is not descending and non-negative; pass singular "
            "values as the decomposition returns them"
        )
    if np.any(norm == 0):
        raise ValueError(f"spectrum {name!r} is all zero: there is no update to draw")
    return Curve(np.arange(1.0, spectra.shape[-1] + 1.0), spectra / norm)
