"""What P1 reports of AdamW's state along training."""

import math
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from geomjax.optim.coordinate_mask import CoordinateMaskState
from geomjax.optim.packing import Packing, pack, used
from geomjax.optim.roles import dotted, path_of
from geomjax.optim.sparse_adamw import SparseAdamWState
from geomjax.typing import Path


class AdamStateFigures(NamedTuple):
    """Two figures of an Adam state, over all trainable coordinates at once.

    Attributes:
      momentum_gradient_cosine: cosine of m and g, within [-1, 1]; 0 if either is zero.
      root_second_moment_variation: standard deviation of sqrt(v) over its mean, at
        least 0; 0 if v is zero.
      coordinates: how many coordinates went in, rounded to float32.
    """

    momentum_gradient_cosine: Float[Array, ""]
    root_second_moment_variation: Float[Array, ""]
    coordinates: Float[Array, ""]


class _Moments(NamedTuple):
    gradient: Array
    first: Array
    second: Array
    mask: Array | None


def adam_state_figures(gradients: Any, opt_state: Any) -> AdamStateFigures | None:
    r"""How far momentum has left the gradient, and how uneven the second moment is.

    Implements P1 (arXiv 2606.13657), appendix A.8, with m, v and g flattened over all
    trainable coordinates i = 1..n:

    .. math::
      \cos(m, g) = \frac{\sum_i m_i g_i}{\|m\| \|g\|}, \qquad
      \mathrm{CV} = \frac{\sqrt{\frac1n \sum_i (s_i - \bar s)^2}}{\bar s},
      \quad s_i = \sqrt{v_i}

    Both are the same with and without bias correction, and the cosine with and without
    global-norm clipping. P1 does not say whether :math:`m_t` includes :math:`g_t`. If
    it does (the state after the update), gradients of equal norm that have nothing to
    do with each other have a cosine of :math:`\sqrt{1 - \beta_1^2}`, 0.44 for 0.9, and
    values near 0 or below, such as P1's end and minimum, hardly occur; so in training
    ours is of the state before the update, where such gradients have 0.

    Trainable are the coordinates that an Adam state has moments for, frozen parameters
    therefore not, and of those the ones on the mask of a `coordinate_mask`, or packed
    by `sparse_adamw`. With Muon they are the parameters that Muon leaves to Adam;
    `coordinates` tells.

    Sums are float32 for any dtype of the moments and are taken one axis at a time, with
    an optimization barrier between axes, and at last over the leaves. So whatever order
    a compiler adds in, no number takes up more terms than an axis is long, at most some
    1e5, and rounding stays near 1e-5 for 1e9 coordinates and more, where one running
    sum would stop growing after 2**24 equal terms. The variance is summed about the
    mean, in a second pass, so nothing cancels.

    Works under `jit` and `vmap`, and on sharded leaves.

    Args:
      gradients: the gradients, a tree shaped as the parameters.
      opt_state: the state of any optax transform, with at most one pair of moments
        (fields `mu` and `nu`) for each parameter anywhere in it.

    Returns:
      The figures, or None if no part of the state has both moments (SGD, Lion,
      RMSProp); which of the two depends on the transform alone.

    Raises:
      ValueError: the state has moments of parameters that have no gradient, or two
        pairs for one parameter.
    """
    moments = _find(gradients, opt_state)
    if not moments:
        return None
    dot, first, second = _total(_dot_products(x) for x in moments)
    # Two roots, since the product of the squares may leave the range of float32.
    norm = jnp.sqrt(first) * jnp.sqrt(second)
    count = _total(_count(x) for x in moments)
    mean = _total(_sum(_root(x), x.mask) for x in moments) / count
    squares = _total(_sum(jnp.square(_root(x) - mean), x.mask) for x in moments)
    return AdamStateFigures(
        momentum_gradient_cosine=_ratio(dot, norm),
        root_second_moment_variation=_ratio(jnp.sqrt(squares / count), mean),
        coordinates=count,
    )


def _dot_products(x: _Moments) -> Float[Array, "3"]:
    first, gradient = x.first.astype(jnp.float32), x.gradient.astype(jnp.float32)
    pairs = ((first, gradient), (first, first), (gradient, gradient))
    return jnp.stack([_sum(a * b, x.mask) for a, b in pairs])


def _root(x: _Moments) -> Float[Array, "*shape"]:
    return jnp.sqrt(x.second.astype(jnp.float32))


def _count(x: _Moments) -> Float[Array, ""]:
    if x.mask is None:
        return jnp.float32(math.prod(x.second.shape))
    return _sum(jnp.ones(x.mask.shape, jnp.float32), x.mask)


def _sum(values: Float[Array, "*shape"], mask: Array | None) -> Float[Array, ""]:
    """The float32 sum of the values on the mask."""
    if mask is not None:
        values = jnp.where(mask, values, 0.0)
    while values.ndim:
        # The barrier keeps a compiler from merging two axes into one long sum.
        values = jax.lax.optimization_barrier(jnp.sum(values, axis=-1))
    return values


def _total(terms: Iterable[Float[Array, "*shape"]]) -> Float[Array, "*shape"]:
    return jnp.sum(jnp.stack(list(terms)), axis=0)


def _ratio(numerator: Float[Array, ""], denominator: Float[Array, ""]) -> Array:
    """The quotient, or 0 where the denominator is 0."""
    safe = jnp.where(denominator == 0, 1.0, denominator)
    return jnp.where(denominator == 0, 0.0, numerator / safe)


def _find(gradients: Any, opt_state: Any) -> list[_Moments]:
    """Moments with the gradients and masks that belong to them."""
    by_path = _by_path(gradients)
    masks = _trees(opt_state, CoordinateMaskState, "mask")
    packings = _trees(opt_state, SparseAdamWState, "packings")
    found: dict[Path, _Moments] = {}
    for prefix, state in _adam_states(opt_state):
        second = _by_path(state.nu)
        for path, first in _by_path(state.mu).items():
            parameter = _parameter((*prefix, *path), by_path)
            if parameter in found:
                raise ValueError(
                    f"opt_state: {dotted(parameter)} has two pairs of moments, expected"
                    " one; hand over the part of the state that is meant"
                )
            moments = _Moments(
                by_path[parameter], first, second[path], masks.get(parameter)
            )
            if parameter in packings:
                moments = _folded(moments, packings[parameter])
            found[parameter] = moments
    return list(found.values())


def _adam_states(opt_state: Any) -> Iterator[tuple[Path, Any]]:
    """Every state with first and second moments, and the dict keys that lead to it."""

    def has_moments(node: Any) -> bool:
        return hasattr(node, "mu") and hasattr(node, "nu")

    for keys, node in jax.tree_util.tree_leaves_with_path(
        opt_state, is_leaf=has_moments
    ):
        if has_moments(node):
            yield _dict_keys(keys), node


def _trees(opt_state: Any, kind: type, field: str) -> dict[Path, Any]:
    """A field of all states of a kind, by parameter."""

    def is_kind(node: Any) -> bool:
        return isinstance(node, kind)

    states = [
        node for node in jax.tree.leaves(opt_state, is_leaf=is_kind) if is_kind(node)
    ]
    return {
        path_of(keys): leaf
        for state in states
        for keys, leaf in jax.tree_util.tree_leaves_with_path(
            getattr(state, field), is_leaf=lambda node: isinstance(node, Packing)
        )
    }


def _folded(x: _Moments, packing: Packing) -> _Moments:
    """Packed moments, their long axis folded into a square that keeps sums short."""
    length = packing.columns.shape[-1]
    side = math.isqrt(max(length - 1, 0)) + 1

    def fold(values: Array) -> Array:
        padding = [(0, 0)] * (values.ndim - 1) + [(0, side * side - length)]
        return jnp.pad(values, padding).reshape(*values.shape[:-1], side, side)

    parts = pack(packing, x.gradient), x.first, x.second, used(packing)
    return _Moments(*map(fold, parts))


def _by_path(tree: Any) -> dict[Path, Any]:
    return {
        path_of(keys): leaf for keys, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def _dict_keys(keys: tuple[Any, ...]) -> Path:
    """The string keys of a key path, without fields and positions in tuples."""
    return path_of(tuple(k for k in keys if isinstance(k, jax.tree_util.DictKey)))


def _parameter(path: Path, parameters: dict[Path, Any]) -> Path:
    """The parameter that a path within a state ends in.

    A state may put keys of its own in front (the labels of `optax.partition`), so the
    longest ending that is a parameter counts.
    """
    for start in range(len(path)):
        if path[start:] in parameters:
            return path[start:]
    raise ValueError(
        f"opt_state: moments of {dotted(path)}, which has no gradient; expected a state"
        " made for the same parameters as the gradients"
    )
