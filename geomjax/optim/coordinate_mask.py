"""Training a fixed subset of coordinates: the masked runs of P1."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from geomjax.optim.roles import dotted, path_of
from geomjax.typing import Path


class CoordinateMaskState(NamedTuple):
    """State of `coordinate_mask`.

    Attributes:
      mask: boolean arrays of the parameters' shapes, True where trainable; None in
        place of a leaf or subtree that is trainable throughout.
      inner_state: state of the wrapped transform.
    """

    mask: Any
    inner_state: Any


def coordinate_mask(
    mask: Any, tx: optax.GradientTransformation | None = None
) -> optax.GradientTransformationExtraArgs:
    r"""Trains the coordinates of a mask and keeps all others bit for bit.

    Implements the masked training of P1 (arXiv 2606.13657): gradients are zeroed
    outside the mask, and coordinates outside it hold their initial values after every
    step. With the mask :math:`m`, gradients :math:`g`, the wrapped transform :math:`T`:

    .. math::
      u = T(m \odot g), \qquad
      p_i \leftarrow p_i + \begin{cases} u_i & m_i = 1 \\ -0 & m_i = 0 \end{cases}

    The first masking comes before everything in `tx`: global-norm clipping sees the
    norm of the trainable coordinates, and moments of frozen ones stay zero. The second
    comes after everything, decoupled weight decay included. Both select and never
    multiply, so a NaN in a frozen coordinate's gradient goes nowhere; and the update is
    the negative zero, since :math:`p + (-0)` is :math:`p` for both zeros. (Subnormal
    parameters need `geomjax.optim.apply_updates`: the compiled addition flushes them.)

    `optax.masked` is another thing: it passes the gradients of masked-out leaves
    through unchanged, and knows whole leaves alone.

    Differs from the reference in that frozen coordinates are never changed, rather than
    restored from a copy; the result is the same and no copy is kept.

    The mask is copied into the state by `init`, and `update` reads it from there alone.
    So one compiled step serves every mask, several masks can be batched with `vmap`,
    and a restored checkpoint brings its mask with it. Under `jit`, make `init`'s mask
    an argument, lest it be compiled into the program as a constant:
    `jax.jit(lambda m, p: coordinate_mask(m, tx).init(p))(mask, params)`.

    Args:
      mask: booleans shaped as the parameters, True where trainable, None in place of a
        leaf or subtree that is trainable throughout; read by `init`.
      tx: the transform to wrap, with clipping and weight decay inside it. None wraps
        the identity: the gradients, masked.

    Returns:
      The transform. Its `init` raises ValueError if the mask does not fit the
      parameters, with every leaf that does not.

    Examples:
      >>> import jax.numpy as jnp, optax
      >>> from geomjax.optim import coordinate_mask
      >>> params = {"w": jnp.array([1.0, 2.0])}
      >>> tx = coordinate_mask({"w": jnp.array([True, False])}, optax.sgd(0.5))
      >>> state = tx.init(params)
      >>> updates, state = tx.update({"w": jnp.array([4.0, 4.0])}, state, params)
      >>> print(updates["w"])
      [-2. -0.]
    """
    inner = optax.with_extra_args_support(optax.identity() if tx is None else tx)

    def init(params: Any) -> CoordinateMaskState:
        if not jax.tree.leaves(params):
            # optax.tree.map_params sends a placeholder to learn which parts of a state
            # are shaped like the parameters: the mask is.
            return CoordinateMaskState(params, inner.init(params))
        masks_by_path(mask, params)
        # A copy: a donated state must not take the caller's mask with it.
        copied = jax.tree.map(lambda m: jnp.array(m, dtype=bool, copy=True), mask)
        return CoordinateMaskState(copied, inner.init(params))

    def update(
        updates: Any, state: CoordinateMaskState, params: Any = None, **extra_args: Any
    ) -> tuple[Any, CoordinateMaskState]:
        gradients = select(state.mask, updates, 0.0)
        updates, inner_state = inner.update(
            gradients, state.inner_state, params, **extra_args
        )
        updates = select(state.mask, updates, -0.0)
        return updates, CoordinateMaskState(state.mask, inner_state)

    return optax.GradientTransformationExtraArgs(init, update)


def select(mask: Any, tree: Any, otherwise: float) -> Any:
    """`tree` where the mask is True or absent, and `otherwise` elsewhere."""
    return jax.tree.map(
        lambda m, x: x if m is None else jnp.where(m, x, otherwise),
        mask,
        tree,
        is_leaf=lambda m: m is None,
    )


def masks_by_path(mask: Any, params: Any) -> dict[Path, Any]:
    """The mask of each parameter, None for those that are trained throughout.

    Args:
      mask: as in `coordinate_mask`.
      params: the parameters. What optax has masked out (`freeze`) needs no mask, and
        one that is given is passed over.

    Returns:
      A mask or None for the path of every parameter.

    Raises:
      ValueError: every part of the mask that does not fit the parameters.
    """
    shapes = {
        path_of(keys): leaf.shape
        for keys, leaf in jax.tree_util.tree_leaves_with_path(params)
    }
    hidden = {
        path_of(keys)
        for keys, leaf in jax.tree_util.tree_leaves_with_path(
            params, is_leaf=lambda x: isinstance(x, optax.MaskedNode)
        )
        if isinstance(leaf, optax.MaskedNode)
    }
    problems = []
    masks: dict[Path, Any] = {}
    for keys, m in jax.tree_util.tree_leaves_with_path(
        mask, is_leaf=lambda m: m is None
    ):
        path = path_of(keys)
        if m is None:
            below = {p for p in (*shapes, *hidden) if p[: len(path)] == path}
            if not below:
                problems.append(f"{dotted(path)}: no such parameter")
            masks |= dict.fromkeys(below)
            continue
        masks[path] = m
        if path not in shapes:
            if path not in hidden:
                problems.append(f"{dotted(path)}: no such parameter")
        elif jnp.result_type(m) != jnp.dtype(bool) or jnp.shape(m) != shapes[path]:
            problems.append(
                f"{dotted(path)}: got {jnp.result_type(m)}{list(jnp.shape(m))},"
                f" expected bool{list(shapes[path])}"
            )
    problems += [
        f"{dotted(path)}: no mask (None trains it throughout)"
        for path in shapes
        if path not in masks
    ]
    if problems:
        raise ValueError(
            "the mask does not fit the parameters:\n  " + "\n  ".join(problems)
        )
    return {path: masks[path] for path in shapes}
