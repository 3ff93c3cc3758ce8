"""How often a jitted function was compiled."""

from collections.abc import Callable


def compiled(function: Callable) -> int:
    """How many programs a jitted function has compiled."""
    return function._cache_size()  # type: ignore[attr-defined]
