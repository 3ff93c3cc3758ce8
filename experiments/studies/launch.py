"""How every study starts: flags, the workdir's lock and its configuration."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_collections
from absl import flags
from ml_collections import config_flags

from experiments.common import cli
from experiments.common import workdir as workdirs

CONFIGS = Path(__file__).parent.parent.parent / "configs"
FREE = frozenset({"save_every", "tracker"})
"""Settings that no result depends on."""

RunStudy = Callable[[ml_collections.ConfigDict, Path], dict[str, Any]]


def launch(name: str, run: RunStudy) -> None:
    """Parses flags and runs a study.

    Args:
      name: Its module in `experiments` and its file in `configs`.
      run: Takes the configuration and the workdir.
    """

    def define_flags() -> None:
        config_flags.DEFINE_config_file(
            "config",
            str(CONFIGS / f"{name}.py"),
            "Configuration; FILE:smoke and FILE:paper are variants.",
        )
        flags.DEFINE_string("workdir", f"runs/{name}", "Folder of results and report.")
        flags.DEFINE_bool(
            "resume", False, "Continue the run in --workdir with its configuration."
        )

    def main() -> None:
        values, workdir = flags.FLAGS, Path(flags.FLAGS.workdir)
        with workdirs.locked(workdir):
            config = workdirs.claim(
                workdir, values.config, resume=values.resume, free=FREE
            )
            run(config, workdir)

    cli.main(main, define_flags, shared=True)
