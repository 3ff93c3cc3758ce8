"""What the passes over a stack found, in NumPy: the operands of the metrics."""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from jaxtyping import Bool, Float

from geomjax.analysis.needs import Needs
from geomjax.analysis.programs import Measured
from geomjax.geometry import factor
from geomjax.geometry.masks import Coverage, Coverages, SourceMask, coverages
from geomjax.geometry.sparsity import top_count

Side = Literal["left", "right"]
Column = Float[np.ndarray, " p"]


class Projected(NamedTuple):
    """Energy of D in the leading k-dimensional subspaces of W.

    Attributes:
        joint: `||U_k^T D V_k||_F^2`.
        left: `||U_k^T D||_F^2`.
        right: `||D V_k||_F^2`.
    """

    joint: Column
    left: Column
    right: Column


class Reductions:
    """Sums, singular values and tables of p tensors; each must have been asked for.

    Attributes:
        r: min(m, n), of all of them.
        m: rows of each, in checkpoint orientation.
        n: columns of each.
        numel: entries of each.
        rounded: whether D was rounded to bfloat16.

    Args:
        measured: what the programs found, padding at the end of the stack included.
        shapes: the tensors' shapes.
        needs: what the programs were asked for.
        rounded: whether D was rounded to bfloat16.
    """

    def __init__(
        self,
        measured: Measured,
        shapes: Sequence[tuple[int, ...]],
        needs: Needs,
        *,
        rounded: bool,
    ):
        self._found: Any = jax.tree.map(
            lambda x: np.asarray(x)[: len(shapes)], measured
        )
        self._needs = needs
        self.rounded = rounded
        sides = [shape if len(shape) == 2 else (1, _size(shape)) for shape in shapes]
        self.r = min(sides[0])
        self.m, self.n = np.asarray(sides, np.float64).T
        self.numel = self.m * self.n

    @property
    def finite(self) -> Bool[np.ndarray, " p"]:
        """Whether all of W and W' is finite."""
        return self._found.first.not_finite == 0

    @property
    def source_energy(self) -> Column:
        """`||W||_F^2`."""
        return self._found.first.energies[:, 0]

    @property
    def tuned_energy(self) -> Column:
        """`||W'||_F^2`."""
        return self._found.first.energies[:, 1]

    @property
    def delta_energy(self) -> Column:
        """`||D||_F^2`."""
        return self._found.first.energies[:, 2]

    @property
    def delta_max_abs(self) -> Column:
        """Max |D|."""
        return self._found.first.largest

    @property
    def source_values(self) -> Float[np.ndarray, "p r"]:
        """Singular values of W."""
        return self._found.values.source

    @property
    def tuned_values(self) -> Float[np.ndarray, "p r"]:
        """Singular values of W'."""
        return self._found.values.tuned

    @property
    def delta_values(self) -> Float[np.ndarray, "p r"]:
        """Singular values of D."""
        return self._found.values.delta

    @property
    def bf16_unchanged(self) -> Column:
        """Share of the coordinates whose bfloat16 value did not move."""
        return self._found.first.unchanged / self.numel

    def within(self, atol: float) -> Column:
        """Share of `|D| <= atol`."""
        return self._found.first.within[:, self._needs.atols.index(atol)] / self.numel

    def beyond(self, atol: float) -> Column:
        """Share of `|D| > atol`."""
        upto = self._found.first.within[:, self._needs.atols.index(atol)]
        return (self.numel - upto) / self.numel

    def below_rms(self, tolerance: float) -> Column:
        """Share of `|D| < tolerance * rms(W)`."""
        count = self._found.below[:, self._needs.rms_tolerances.index(tolerance)]
        return np.where(self.source_energy > 0, count / self.numel, 0)

    def coordinate_energy(self, fraction: float) -> Column:
        """Share of the energy in the largest coordinates, a fraction of them all."""
        index = self._needs.coordinate_fractions.index(fraction)
        return self._found.finished.coordinates[:, index] / self.delta_energy

    def sines(self, side: Side, k: int) -> Float[np.ndarray, "p k"]:
        """Sines of the principal angles between leading subspaces of W and W'."""
        index = self._needs.sine_ranks.index(k)
        short = self._found.finished.short_sines[index]
        long = self._found.finished.long_sines[index]
        return np.where(self._is_short(side)[:, None], short, long)

    def projected(self, k: int) -> Projected:
        """Energy of D in the leading k-dimensional subspaces of W."""
        index = self._needs.energy_ranks.index(k)
        short, long, joint = (part[:, index] for part in self._found.finished.energies)
        left = self._is_short("left")
        return Projected(
            joint, np.where(left, short, long), np.where(left, long, short)
        )

    def coverage(self, mask: SourceMask) -> Coverages:
        """Coverage of the update's supports by a mask of W; `[p]` each."""
        index = self._needs.masks.index(mask)
        sizes = np.asarray(
            [top_count(mask.density, int(numel)) for numel in self.numel], np.int64
        )
        found = coverages(self._found.finished.tables[:, index], sizes)
        return Coverages(*(Coverage(*part) for part in found))

    def source_defined(self, k: int) -> Bool[np.ndarray, " p"]:
        """Whether W has a unique leading k-dimensional subspace."""
        return np.asarray(factor.is_defined(self.source_values, k))

    def both_defined(self, k: int) -> Bool[np.ndarray, " p"]:
        """Whether W and W' both have a unique leading k-dimensional subspace."""
        return self.source_defined(k) & factor.is_defined(self.tuned_values, k)

    def _is_short(self, side: Side) -> Bool[np.ndarray, " p"]:
        """Whether the stack was turned so that this side comes first."""
        return (self.m <= self.n) if side == "left" else (self.m > self.n)


def _size(shape: tuple[int, ...]) -> int:
    return int(np.prod(shape, dtype=np.int64))
