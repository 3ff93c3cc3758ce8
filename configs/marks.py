"""Recipes of papers, each field marked as the paper's or as our choice."""

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import ml_collections


class Mark(NamedTuple):
    """A setting and who chose it.

    Attributes:
      value: The setting.
      origin: `paper`, or `ours` where the paper is silent or gives something else.
      note: Where the paper gives it, or why we chose it.
    """

    value: Any
    origin: Literal["paper", "ours"]
    note: str


Fields = dict[str, Any]
"""Nested names to marks."""


def paper(value: Any, where: str) -> Mark:
    """A setting that the paper gives, and where."""
    return Mark(value, "paper", where)


def ours(value: Any, why: str) -> Mark:
    """A setting that the paper does not give, and why it is what it is."""
    return Mark(value, "ours", why)


def over(config: ml_collections.ConfigDict, fields: Fields, note: str) -> Fields:
    """The fields, with those of a configuration that they leave out marked as ours.

    A nested part that is given (`arms`, `optimizers`) is taken as given.

    Args:
      config: An experiment's own configuration.
      fields: A recipe for it.
      note: Why the others have the configuration's values.
    """

    def marked(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {name: marked(each) for name, each in value.items()}
        return ours(value, note)

    return marked(config.to_dict()) | fields


def values(fields: Fields) -> ml_collections.ConfigDict:
    """The configuration that an experiment takes."""

    def plain(value: Any) -> Any:
        if isinstance(value, Mark):
            return value.value
        return {name: plain(each) for name, each in value.items()}

    return ml_collections.ConfigDict(plain(fields))


def marks(fields: Fields, prefix: str = "") -> dict[str, Mark]:
    """The marks by dotted name, in their order."""
    found: dict[str, Mark] = {}
    for name, value in fields.items():
        if isinstance(value, Mark):
            found[prefix + name] = value
        else:
            found |= marks(value, f"{prefix}{name}.")
    return found
