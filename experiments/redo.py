"""Does a run again from its folder alone: same configuration, seeds and inputs.

    python -m experiments.redo --run=runs/ablation --workdir=runs/again

The inputs must be where the configuration says, and hold what they held (their digests
are compared). On the same machine, versions and device count the results are the same
bits; what differs from the first run is printed.

A configuration names functions by import path, which are imported and called: redo only
runs you trust.
"""

import importlib
import json
import re
import shutil
from pathlib import Path
from typing import Any

import ml_collections
from absl import flags

from experiments.common import cli, provenance
from experiments.common import workdir as workdirs
from experiments.common.environment import environment
from geomjax import hosts

FOLDER = Path(__file__).parent


def define_flags() -> None:
    """Defines the flags; not at import: experiments can be imported together."""
    flags.DEFINE_string("run", "", "Folder of the run to do again.")
    flags.DEFINE_string("workdir", "", "Folder of the new run.")


def main() -> None:
    """Redoes the run that the flags name."""
    if not flags.FLAGS.run or not flags.FLAGS.workdir:
        raise ValueError("expected --run=FOLDER and --workdir=NEW_FOLDER")
    redo(Path(flags.FLAGS.run), Path(flags.FLAGS.workdir))


def redo(run: Path, workdir: Path) -> dict[str, Any]:
    """Does a run again.

    Args:
      run: Folder of a run whose experiment records its start.
      workdir: Folder of the new one.

    Returns:
      What the experiment returns.

    Raises:
      WorkdirError: The folder holds no such run, or an input has changed.
    """
    record = provenance.read(run)
    experiment = load_experiment(record["experiment"])
    for line in differences(record):
        print(line)
    path = run / workdirs.CONFIG_FILE
    if not path.exists():
        raise workdirs.WorkdirError(f"{run} holds no {workdirs.CONFIG_FILE}")
    config = ml_collections.ConfigDict(json.loads(path.read_text()))
    with workdirs.locked(workdir):
        config = workdirs.claim(workdir, config, resume=False)
        # Compared by the experiment, as when a run is resumed.
        inputs = workdirs.INPUTS_FILE
        hosts.on_main(lambda: _copy(run / inputs, workdir / inputs))
        return experiment.run(config, workdir)


def _copy(source: Path, target: Path) -> None:
    shutil.copyfile(source, target)


def load_experiment(name: str) -> Any:
    """The module of an experiment: one of this folder, whatever a record says.

    Raises:
      WorkdirError: There is none of this name, or it cannot be redone.
    """
    known = re.fullmatch(r"[a-z_]+", name) and (FOLDER / f"{name}.py").is_file()
    module = importlib.import_module(f"experiments.{name}") if known else None
    if not hasattr(module, "run"):
        raise workdirs.WorkdirError(
            f"the run is one of {name!r}, which is no experiment that can be redone"
        )
    return module


def differences(record: dict[str, Any]) -> list[str]:
    """What differs between the first start of a run and this process."""
    first = record["starts"][0]
    lines = []
    now = environment()
    for name in sorted(now.keys() | first["environment"].keys()):
        then = first["environment"].get(name)
        if then != now.get(name):
            lines.append(f"{name}: {then} then, {now.get(name)} now")
    commit = provenance.git_commit()
    if first["git"] != commit:
        lines.append(f"code: {first['git']} then, {commit} now")
    return lines


if __name__ == "__main__":
    cli.main(main, define_flags, shared=True)
