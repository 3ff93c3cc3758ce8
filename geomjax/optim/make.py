"""Optimizers by name or by import path."""

import importlib
import inspect
from collections.abc import Callable, Collection, Mapping
from typing import Any, get_args

import optax

from geomjax.optim.lamb import lamb
from geomjax.optim.muon import muon
from geomjax.optim.promotion import standard_promotion
from geomjax.optim.roles import Kind, Role, Roles, map_with_roles
from geomjax.optim.sparse_adamw import sparse_adamw
from geomjax.typing import Path

_OPTIMIZERS: dict[str, Callable[..., optax.GradientTransformation]] = {
    "adagrad": optax.adagrad,
    "adam": optax.adam,
    "adamw": optax.adamw,
    "lamb": lamb,
    "lion": optax.lion,
    "muon": muon,
    "rmsprop": optax.rmsprop,
    "sgd": optax.sgd,
    "sparse_adamw": sparse_adamw,
}

# Parameters of a factory that `make` fills in itself.
_OURS = ("learning_rate", "roles", "mask")


def make(
    name: str,
    learning_rate: optax.ScalarOrSchedule,
    *,
    roles: Roles,
    decay_kinds: Collection[str] | None = None,
    kwargs: Mapping[str, Any] | None = None,
) -> optax.GradientTransformation:
    """Makes an optimizer from its name, or from the import path of a function.

    The names are optax's, with optax's defaults (weight decay of AdamW: 1e-4, of Lion:
    1e-3, of LAMB and Muon: 0; momentum of SGD: none). LAMB and Muon are the versions of
    this package, which know stacked layers, and "sparse_adamw" keeps state for the
    coordinates of a mask alone; it takes them and the norm to clip by as keywords,
    which `build` fills in.

    Args:
      name: "adagrad", "adam", "adamw", "lamb", "lion", "muon", "rmsprop", "sgd" or
        "sparse_adamw"; or "package.module:function", for a function that takes
        `learning_rate` and returns an optax transform. If it takes `roles`, it is given
        the role table.
      learning_rate: a number, or a schedule of the update count.
      roles: the role table of the model.
      decay_kinds: kinds of parameter that weight decay applies to. None decays all of
        them, as optax does; P1 and P2 do not say what they decay.
      kwargs: further keyword arguments of the function.

    Returns:
      The optimizer alone, under `standard_promotion`; `build` adds clipping, frozen
      groups and a coordinate mask.

    Raises:
      ValueError: an unknown name or keyword, a path that does not import, a function
        that does not fit, or one that returns something else.

    Examples:
      >>> from geomjax.optim import make
      >>> tx = make("sgd", 1e-2, roles={}, kwargs={"momentum": 0.9})
      >>> make("sgd", 1e-2, roles={}, kwargs={"momentun": 0.9})
      Traceback (most recent call last):
      ...
      ValueError: optimizer 'sgd': unknown keywords ['momentun'], expected some of \
['accumulator_dtype', 'momentum', 'nesterov']
    """
    kwargs = dict(kwargs or {})
    factory = _find(name)
    parameters = inspect.signature(factory).parameters
    open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    accepted = sorted(
        key
        for key, parameter in parameters.items()
        if key not in _OURS
        and parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
    )
    if "learning_rate" not in parameters and not open_ended:
        raise ValueError(
            f"optimizer {name!r}: it takes {accepted}, expected a `learning_rate`"
        )
    unknown = sorted(set(kwargs) - set(accepted))
    if unknown and (not open_ended or set(unknown) & set(_OURS)):
        raise ValueError(
            f"optimizer {name!r}: unknown keywords {unknown}, expected some of"
            f" {accepted}"
        )
    if "roles" in parameters:
        kwargs["roles"] = roles
    if decay_kinds is not None:
        if "mask" not in parameters:
            raise ValueError(
                f"decay_kinds: optimizer {name!r} has no mask for its weight decay;"
                " leave decay_kinds unset, or use adamw, lamb, lion or sparse_adamw"
            )
        kwargs["mask"] = decay_mask(decay_kinds, roles)
    tx = factory(learning_rate=learning_rate, **kwargs)
    if not isinstance(tx, optax.GradientTransformation):
        raise ValueError(
            f"optimizer {name!r} is no optax transform: it returned"
            f" {type(tx).__name__}, expected optax.GradientTransformation"
        )
    return standard_promotion(tx)


def decay_mask(kinds: Collection[str], roles: Roles) -> Callable[[Any], Any]:
    """Which leaves decay, in the form that optax's `mask` arguments take.

    Args:
      kinds: the kinds of parameter that decay.
      roles: kind of each leaf.

    Returns:
      A function from parameters to a tree of bools.

    Raises:
      ValueError: an unknown kind.
    """
    unknown = sorted(set(kinds) - set(get_args(Kind)))
    if unknown:
        raise ValueError(
            f"decay_kinds: got {unknown}, expected some of {list(get_args(Kind))}"
        )
    chosen = frozenset(kinds)

    def decays(path: Path, leaf: Any, role: Role) -> bool:
        del path, leaf
        return role.kind in chosen

    return lambda params: map_with_roles(decays, params, roles)


def _find(name: str) -> Callable[..., Any]:
    """The factory behind a name or an import path."""
    if name in _OPTIMIZERS:
        return _OPTIMIZERS[name]
    module_name, colon, attribute = name.partition(":")
    if not colon:
        raise ValueError(
            f"optimizer: got {name!r}, expected one of {sorted(_OPTIMIZERS)} or an"
            ' import path such as "package.module:function"'
        )
    if not (module_name and attribute):
        raise ValueError(f'optimizer: got {name!r}, expected "package.module:function"')
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ValueError(
            f"optimizer {name!r}: module {module_name!r} does not import: {error}"
        ) from error
    factory = getattr(module, attribute, None)
    if not callable(factory):
        raise ValueError(
            f"optimizer {name!r}: module {module_name!r} has no function {attribute!r}"
        )
    return factory
