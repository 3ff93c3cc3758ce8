"""The whole chain that a training run uses, from one description of it."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import optax
from jaxtyping import Array, Float

from geomjax.optim.coordinate_mask import coordinate_mask
from geomjax.optim.freeze import freeze
from geomjax.optim.make import make
from geomjax.optim.project import project_updates
from geomjax.optim.roles import Roles
from geomjax.optim.schedules import learning_rate_schedule


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerSpec:
    """Description of an optimizer, made of plain values.

    Attributes:
      name: as in `make`: an optax name or "package.module:function".
      learning_rate: the rate after warm-up; traced in `given_rate`.
      schedule: "constant", "linear" or "cosine", as in `learning_rate_schedule`.
      warmup_steps: optimizer updates of linear warm-up.
      total_steps: optimizer updates in all; needed by schedules that decay.
      clip_norm: largest global norm of the gradients of trainable coordinates, None for
        no clipping.
      frozen: patterns of parameters to hold fixed, as in `freeze`.
      decay_kinds: kinds of parameter that weight decay applies to, None for all.
      kwargs: further keyword arguments of the optimizer, as in `make`.
    """

    name: str
    learning_rate: float | Float[Array, ""]
    schedule: str = "constant"
    warmup_steps: int = 0
    total_steps: int | None = None
    clip_norm: float | None = None
    frozen: tuple[str, ...] = ()
    decay_kinds: tuple[str, ...] | None = None
    kwargs: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def build(
    spec: OptimizerSpec, roles: Roles, mask: Any = None, basis: Any = None
) -> optax.GradientTransformation:
    """Builds the transform that a description stands for.

    The order, from the outside in:

        coordinate_mask(mask, project_updates(
            basis, roles, freeze(spec.frozen, chain(clip, optimizer))))

    Gradients meet the mask or the basis first, lose the frozen parameters, are clipped
    by the global norm of what is left, and then reach the optimizer; its update, weight
    decay included, is masked or projected again on the way out. A part that is not
    asked for is absent. A mask and a basis exclude each other: masked, the parameters
    would leave the subspace. "sparse_adamw" masks and clips by itself, in the same
    order within `freeze`.

    Args:
      spec: the description.
      roles: the role table of the model.
      mask: as in `coordinate_mask`; None trains all coordinates. Runs that differ in
        the values of their masks alone share one compiled step.
      basis: as in `project_updates`; None trains all directions. Likewise.

    Returns:
      The transform. Apply its updates with `geomjax.optim.apply_updates`.

    Raises:
      ValueError: a bad name, keyword, schedule, pattern or clipping norm, or a basis
        beside a mask; from `init`, patterns, masks and bases that do not fit the
        parameters.
    """
    if basis is not None and mask is not None:
        raise ValueError(
            "a basis constrains whole directions; a mask would leave its subspace. "
            "Give it alone"
        )
    schedule = learning_rate_schedule(
        spec.schedule,
        spec.learning_rate,
        warmup_steps=spec.warmup_steps,
        total_steps=spec.total_steps,
    )
    clip_norm = spec.clip_norm
    if clip_norm is not None and not (math.isfinite(clip_norm) and clip_norm > 0):
        raise ValueError(
            f"clip_norm: got {clip_norm}, expected a finite number above 0, or None for"
            " no clipping"
        )
    packs = spec.name == "sparse_adamw"
    tx = make(
        spec.name,
        schedule,
        roles=roles,
        decay_kinds=spec.decay_kinds,
        kwargs={
            **spec.kwargs,
            **({"coordinates": mask, "clip_norm": clip_norm} if packs else {}),
        },
    )
    if clip_norm is not None and not packs:
        tx = optax.chain(optax.clip_by_global_norm(clip_norm), tx)
    if spec.frozen:
        tx = freeze(spec.frozen, tx)
    if basis is not None:
        tx = project_updates(basis, roles, tx)
    if mask is not None and not packs:
        tx = coordinate_mask(mask, tx)
    return tx
