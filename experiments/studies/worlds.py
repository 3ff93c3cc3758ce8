"""The worlds that studies can take place in: the bundled one, and built ones."""

import ml_collections

from experiments.tiny_world import world_folder

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
    folder = world_folder(config.world)
    found = config.copy_and_resolve_references()
    for field, place in PLACES.items():
        found[field] = config[field] or str(folder / place)
    return found
