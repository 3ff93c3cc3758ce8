"""What a run was started with, so that its folder alone suffices to redo it.

Beside the configuration (with its seeds) and the digests of the inputs, which
`experiments.common.workdir` keeps, `provenance.json` holds the experiment's name and,
for every process that worked on the run, its command, versions and git commit.
`python -m experiments.redo` starts from these files.
"""

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import geomjax
from experiments.common.environment import command, environment
from experiments.common.workdir import PROVENANCE_FILE, WorkdirError
from geomjax import hosts


def record_start(workdir: Path, experiment: str) -> None:
    """Adds this start to the run's record, before any work is done.

    Args:
      workdir: The run's folder.
      experiment: Name of its module in `experiments`.

    Raises:
      WorkdirError: The record there is damaged, or of another experiment.
    """
    this = {"command": command(), "environment": environment(), "git": git_commit()}
    hosts.on_main(lambda: _record(workdir, experiment, this))


def _record(workdir: Path, experiment: str, this: dict[str, Any]) -> None:
    path = workdir / PROVENANCE_FILE
    starts: list[Any] = []
    if path.exists():
        found = read(workdir)
        starts = found["starts"]
        if found["experiment"] != experiment:
            raise WorkdirError(
                f"{workdir} is a run of {found['experiment']}, not of {experiment}; "
                "choose another --workdir"
            )
    record = {"experiment": experiment, "starts": [*starts, this]}
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(record, indent=2) + "\n")
    temporary.replace(path)


def read(workdir: Path) -> dict[str, Any]:
    """The record of a run.

    Raises:
      WorkdirError: There is none, or it is damaged.
    """
    path = workdir / PROVENANCE_FILE
    try:
        found = json.loads(path.read_text())
        if isinstance(found["experiment"], str) and isinstance(found["starts"], list):
            return found
        raise ValueError("fields of other types")
    except FileNotFoundError:
        raise WorkdirError(f"{workdir} holds no {PROVENANCE_FILE}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise WorkdirError(f"{path} is damaged: {error}") from None


def git_commit() -> dict[str, Any] | None:
    """The commit of the code that runs, and whether files differ from it.

    None where the code does not lie in a git checkout, or git is not installed.
    """
    folder = Path(geomjax.__file__).parent
    if shutil.which("git") is None:
        return None

    def git(*arguments: str) -> str | None:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True
        )
        return done.stdout.strip() if done.returncode == 0 else None

    tracked = git("ls-files", "--error-unmatch", "__init__.py")
    commit = git("rev-parse", "HEAD")
    if tracked is None or commit is None:
        return None
    changed = git("status", "--porcelain", "--untracked-files=no")
    return {"commit": commit, "changed": bool(changed)}
