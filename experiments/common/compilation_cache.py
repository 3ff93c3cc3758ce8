"""JAX's persistent cache of compiled programs, in a folder that suits the machine."""

import hashlib
import os
import platform
from pathlib import Path

import jax

KEPT_S = 0.1
"""Programs that took so long to compile are kept.

JAX's own limit of 1 s leaves out nearly all of the programs of `geomjax.analysis`, some
two dozen of half a second in a study.
"""

_CPU_INFO = Path("/proc/cpuinfo")
_LIMIT = "jax_persistent_cache_min_compile_time_secs"
_LIMIT_VARIABLE = "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"


def enable(folder: str | None) -> Path | None:
    """Keeps compiled programs between processes; they save time and change no result.

    JAX's key of a program holds its text, the options and the versions of JAX and XLA.
    It does not hold what the processor can do, for which CPU programs are compiled, so
    the default folder is one of the version and the processor: a home shared by
    different machines, or a new JAX, starts an empty one.

    Args:
      folder: Where to keep them. None for a default under `$XDG_CACHE_HOME`, or
        `~/.cache`, unless `JAX_COMPILATION_CACHE_DIR` names one; empty for no cache.
        JAX's variable for the shortest compilation kept goes before `KEPT_S`.

    Returns:
      The folder, or None without a cache, as `JAX_ENABLE_COMPILATION_CACHE=false`
      orders too.
    """
    settings = jax.config.values
    if folder == "" or not settings["jax_enable_compilation_cache"]:
        jax.config.update("jax_enable_compilation_cache", False)
        return None
    if folder is None:
        folder = settings["jax_compilation_cache_dir"] or str(default_folder())
    jax.config.update("jax_compilation_cache_dir", folder)
    if _LIMIT_VARIABLE not in os.environ:
        jax.config.update(_LIMIT, KEPT_S)
    return Path(folder)


def default_folder() -> Path:
    """The folder of this version and processor."""
    name = f"jax-{jax.__version__}-{platform.machine()}-{_processor()}"
    return cache_home() / "geomjax" / name


def cache_home() -> Path:
    """Where this user's programs keep what they can make again."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")


def _processor() -> str:
    """A short digest of the processor's name and instructions."""
    known = platform.processor()
    if _CPU_INFO.exists():
        lines = _CPU_INFO.read_text().splitlines()
        first = [line for line in lines if line.startswith(("model name", "flags"))]
        known += "\n".join(first[:2])
    return hashlib.sha256(known.encode()).hexdigest()[:8]
