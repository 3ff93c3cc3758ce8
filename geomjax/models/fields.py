"""Reading config.json: the file, and typed entries of it."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def read_config(directory: Path) -> dict[str, Any]:
    """Reads `config.json` of a checkpoint directory as plain data.

    Args:
      directory: Folder of a checkpoint in the Hugging Face layout.

    Returns:
      The parsed object.

    Raises:
      ValueError: The file is missing, is not JSON, or is not an object.
    """
    path = directory / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(
            f"{directory} has no config.json; expected a checkpoint folder in the "
            "Hugging Face layout (config.json, model.safetensors, tokenizer.json)"
        ) from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(config, dict):
        raise ValueError(f"{path} holds a {type(config).__name__}, not an object")
    return config


class Fields:
    """Typed entries of a config.json, with everything that is wrong about them.

    Each reader returns a value of its type even where there is a problem, so that one
    `ValueError`, from `finish`, names all of them.

    Args:
      config: The parsed config.json.
      absent: What the family's class in transformers assumes for entries that the file
        leaves out or has as null.
    """

    def __init__(self, config: Mapping[str, Any], absent: Mapping[str, Any]):
        given = {name: value for name, value in config.items() if value is not None}
        self.config = dict(absent) | given
        self.problems: list[str] = []

    def _required(self, name: str) -> Any:
        if name not in self.config:
            self.problems.append(f"no {name!r}, which this architecture needs")
        return self.config.get(name)

    def size(self, name: str) -> int:
        """An integer above 0."""
        value = self._required(name)
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
        if value is not None:
            self.problems.append(f"{name}={value!r}; expected an integer above 0")
        return 1

    def positive(self, name: str) -> float:
        """A finite number above 0."""
        value = self._required(name)
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if number and 0 < value < math.inf:
            return float(value)
        if value is not None:
            self.problems.append(f"{name}={value!r}; expected a number above 0")
        return 1.0

    def flag(self, name: str) -> bool:
        """True or false."""
        value = self._required(name)
        if value is not None and not isinstance(value, bool):
            self.problems.append(f"{name}={value!r}; expected true or false")
        return bool(value)

    def only(self, **supported: Any) -> None:
        """Entries of which this decoder implements one value; others are refused."""
        for name, value in supported.items():
            if name in self.config and self.config[name] != value:
                self.problems.append(
                    f"{name}={self.config[name]!r}; this decoder implements "
                    f"{value!r} only"
                )

    def finish(self) -> None:
        """Raises `ValueError` with every problem found so far."""
        if self.problems:
            raise ValueError("config.json has " + "\n  and ".join(self.problems))
