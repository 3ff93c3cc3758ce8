"""The worlds that studies can take place in: the bundled one, and built ones."""

from collections.abc import Callable
from pathlib import Path

import ml_collections

from configs import tiny_world
from experiments.common.kept import recipe_digest
from experiments.common.world import TINY_WORLD
from experiments.tiny_world import world_folder
from geomjax import hosts

PLACES = {
    "student": "anchor",
    "teacher": "teacher",
    "base": "base",
    "prompts": "prompts.jsonl",
}
"""Field of the configuration -> what of a world it names."""


def in_world(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """The configuration with the folders of `config.world`, built on first use.

    Folders that the configuration names itself stay; where it names all, no world is
    looked for. Where `world` is empty, empty fields are the bundled world's.

    Raises:
      ValueError: There is no such world.
    """
    if not config.world or all(config[field] for field in PLACES):
        return config
    folder = shared_folder(lambda: world_folder(config.world))
    found = config.copy_and_resolve_references()
    for field, place in PLACES.items():
        found[field] = config[field] or str(folder / place)
    return found


def shared_folder(build: Callable[[], Path]) -> Path:
    """A folder that process 0 builds on first use, and all processes read."""
    folder = Path(hosts.on_main(lambda: str(build())))
    hosts.await_file(folder)
    return folder


def recipes(config: ml_collections.ConfigDict) -> dict[str, str]:
    """What `config.world` is built by, as an input of a study; none if nothing is.

    Without it a study would count as current when its world is another by now.

    Raises:
      ValueError: There is no such world.
    """
    if not config.get("world") or all(config[field] for field in PLACES):
        return {}
    return {"world": recipe_digest(tiny_world.get_config(config.world))}


def bundled(config: ml_collections.ConfigDict) -> dict[str, Path]:
    """The checkpoints of the bundled world that a study reads, by role."""
    if config.get("world"):
        return {}
    return {
        field: TINY_WORLD / place
        for field, place in PLACES.items()
        if field != "prompts" and not config.get(field)
    }
