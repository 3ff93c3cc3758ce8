"""The one thing that matching has to know from a config.json."""

import json
from pathlib import Path

from geomjax.checkpoints.errors import CheckpointError


def ties_word_embeddings(folder: Path) -> bool | None:
    """Whether the checkpoint in `folder` says that its head is its embedding.

    Args:
        folder: the folder that may hold a `config.json`.

    Returns:
        `tie_word_embeddings`, also from the text part of a multimodal config; None
        where nothing is said, since the default depends on the model.

    Raises:
        CheckpointError: the config is there, but is not a JSON object.
    """
    path = folder / "config.json"
    if not path.is_file():
        return None
    try:
        config = json.loads(path.read_bytes())
    except OSError as error:
        raise CheckpointError(path, [f"cannot be opened: {error.strerror}"]) from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(path, [f"not valid JSON: {error}"]) from None
    if not isinstance(config, dict):
        raise CheckpointError(path, ["not a JSON object"])
    for part in (config, config.get("text_config")):
        if isinstance(part, dict) and isinstance(part.get("tie_word_embeddings"), bool):
            return part["tie_word_embeddings"]
    return None
