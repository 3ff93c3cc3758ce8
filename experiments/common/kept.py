"""Folders that are built on first use and kept."""

import fcntl
import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import ml_collections


def built_once(folder: Path, build: Callable[[Path], None]) -> Path:
    """The folder, after building it where it is not there yet.

    It appears under its name when it is whole. Of two processes that need it at once,
    one builds it while the other waits.

    Args:
      folder: Where it belongs.
      build: Writes it into another, empty folder, which is then renamed.

    Returns:
      `folder`.
    """
    if folder.exists():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (folder.parent / f".{folder.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if folder.exists():
            return folder
        print(f"{folder} is built once and kept")
        made = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        try:
            build(made)
            made.rename(folder)
        finally:
            shutil.rmtree(made, ignore_errors=True)
    return folder


def recipe_digest(config: ml_collections.ConfigDict) -> str:
    """Names what a recipe builds: the same for equal fields alone."""
    text = json.dumps(config.to_dict(), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]
