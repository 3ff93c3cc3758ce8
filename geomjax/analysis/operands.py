"""What a metric is computed from: W, W', D of a stack, and what metrics share."""

from functools import cached_property

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from geomjax.geometry import factor
from geomjax.geometry.factor import Factors
from geomjax.geometry.sparsity import energy


class Operands:
    """A stack of tensors of one shape, seen by the metrics of one compiled program.

    What several metrics need, such as the factors of W, is computed by the first that
    asks for it and by none if none does: the attributes are traced lazily.

    Args:
        source: W, float32.
        tuned: W', float32.
        delta: D, float32.
        source_is_bf16: whether W and W' hold bfloat16 values.
        delta_is_bf16: whether D does.
        directions: leading singular vectors of W and W' that the metrics will need.
    """

    source: Float[Array, "p *s"]
    tuned: Float[Array, "p *s"]
    delta: Float[Array, "p *s"]

    def __init__(
        self,
        source: Float[Array, "p *s"],
        tuned: Float[Array, "p *s"],
        delta: Float[Array, "p *s"],
        *,
        source_is_bf16: bool,
        delta_is_bf16: bool,
        directions: int,
    ):
        self.source, self.tuned, self.delta = source, tuned, delta
        self.source_is_bf16, self.delta_is_bf16 = source_is_bf16, delta_is_bf16
        self.directions = directions
        # The widest enabled float: float64 under `jax.enable_x64(True)`.
        self.dtype = jnp.result_type(float)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one tensor, in checkpoint orientation."""
        return self.source.shape[1:]

    @property
    def r(self) -> int:
        """min(m, n)."""
        return min(self.shape)

    def flat(self, x: Array) -> Array:
        """A stack with each tensor flattened: `[p, numel]`."""
        return x.reshape(x.shape[0], -1)

    @cached_property
    def source_energy(self) -> Float[Array, " p"]:
        """`||W||_F^2`."""
        return energy(self.flat(self.source))

    @cached_property
    def tuned_energy(self) -> Float[Array, " p"]:
        """`||W'||_F^2`."""
        return energy(self.flat(self.tuned))

    @cached_property
    def delta_energy(self) -> Float[Array, " p"]:
        """`||D||_F^2`."""
        return energy(self.flat(self.delta))

    @cached_property
    def source_factors(self) -> Factors:
        """Singular values of W and its leading `directions` vectors."""
        return factor.factor(self.source.astype(self.dtype), self.directions)

    @cached_property
    def tuned_factors(self) -> Factors:
        """Singular values of W' and its leading `directions` vectors."""
        return factor.factor(self.tuned.astype(self.dtype), self.directions)

    @cached_property
    def delta_values(self) -> Float[Array, "p r"]:
        """Singular values of D, which needs no vectors."""
        return factor.singular_values(self.delta.astype(self.dtype))

    def source_defined(self, k: int) -> Bool[Array, " p"]:
        """Whether W has a unique leading k-dimensional subspace."""
        return factor.is_defined(self.source_factors.values, k)

    def both_defined(self, k: int) -> Bool[Array, " p"]:
        """Whether W and W' both have a unique leading k-dimensional subspace."""
        return self.source_defined(k) & factor.is_defined(self.tuned_factors.values, k)
