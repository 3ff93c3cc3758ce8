"""Both papers in the tiny world: all studies, one document of all tables and claims.

Runs the optimizer ablation, its comparison of optimizers, and the studies, each as a
process of its own in a folder of `--workdir`, and writes `REPRODUCTION.md`: every table
and figure of both papers, ours beside theirs, every claim with its verdict, and what is
not reproduced and why.

    python -m experiments.reproduce --workdir=runs/reproduction
    python -m experiments.reproduce --workdir=runs/smoke --smoke

Started again it goes on: finished studies are kept, one that was interrupted continues.
`--only=NAME,NAME` runs some of them. The document is written after each study, of all
that have finished.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from absl import flags
from tqdm import tqdm

from experiments.common import cli
from experiments.common import workdir as workdirs
from experiments.reproduction.document import Status, write_document
from experiments.reproduction.plan import ENTRIES, Entry, select
from experiments.reproduction.process import Ended, run_process
from experiments.reproduction.results import Results, read_results
from geomjax.train.errors import Preempted

TIMES = "times.json"
LOGS = "logs"


def define_flags() -> None:
    """Defines the flags; not at import: experiments can be imported together."""
    names = ", ".join(entry.name for entry in ENTRIES)
    flags.DEFINE_string("workdir", "runs/reproduction", "Folder of studies, document.")
    flags.DEFINE_bool("smoke", False, "Run every study at its smallest.")
    flags.DEFINE_list("only", [], f"Studies to run, of {names}; all if empty.")


def main() -> None:
    """Runs what the flags name."""
    values, workdir = flags.FLAGS, Path(flags.FLAGS.workdir)
    extra = []
    if values.compilation_cache is not None:
        extra.append(f"--compilation_cache={values.compilation_cache}")
    with workdirs.locked(workdir):
        path = run(workdir, select(values.only), smoke=values.smoke, extra=extra)
    print(f"document: {path}")


def run(
    workdir: Path,
    entries: Sequence[Entry],
    *,
    smoke: bool = False,
    extra: Sequence[str] = (),
) -> Path:
    """Runs what has not finished, and writes the document.

    Args:
      workdir: Folder of the lot.
      entries: Which studies to run; the document shows all that have finished.
      smoke: Whether each is run at its smallest.
      extra: Further flags of every study.

    Returns:
      Path of the document.

    Raises:
      WorkdirError: A folder there belongs to another configuration, or is damaged.
      Preempted: A study was told to end.
      ValueError: Studies failed; the others were run and are in the document.
    """
    for entry in ENTRIES:
        entry.check(workdir, smoke=smoke)
    workdir.mkdir(parents=True, exist_ok=True)
    failed: dict[str, Ended] = {}
    path = _write(workdir, failed, smoke=smoke)
    missing = [entry for entry in entries if not entry.finished(workdir)]
    interval = 0.5 if sys.stderr.isatty() else 60
    with tqdm(total=len(missing), unit="study", mininterval=interval) as bar:
        for entry in missing:
            ended = _run_study(entry, workdir, bar, smoke=smoke, extra=extra)
            if ended.status == cli.PREEMPTED_STATUS:
                raise Preempted(f"{entry.name} was told to end; start the same again")
            if ended.status or not entry.finished(workdir):
                failed[entry.name] = ended
            path = _write(workdir, failed, smoke=smoke)
            bar.update()
    if failed:
        listed = "\n".join(
            f"  {name} failed ({ended.status}): {ended.message}; "
            f"see {_log(workdir, name)}"
            for name, ended in failed.items()
        )
        raise ValueError(f"{len(failed)} of {len(missing)} studies failed:\n{listed}")
    return path


def _run_study(
    entry: Entry, workdir: Path, bar: tqdm, *, smoke: bool, extra: Sequence[str]
) -> Ended:
    bar.set_description(entry.name)
    log = _log(workdir, entry.name)
    log.parent.mkdir(exist_ok=True)
    arguments = [*entry.arguments(workdir, smoke=smoke), *extra]
    ended = run_process(arguments, log, bar.set_postfix_str)
    _add_time(workdir / TIMES, entry.name, ended)
    return ended


def _log(workdir: Path, name: str) -> Path:
    """Where a study writes what it prints: its own folder takes no other files."""
    return workdir / LOGS / f"{name}.txt"


def _add_time(path: Path, name: str, ended: Ended) -> None:
    times = _times(path)
    wall, cpu = times.get(name, (0.0, 0.0))
    times[name] = [round(wall + ended.wall_s, 1), round(cpu + ended.cpu_s, 1)]
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(times, indent=1) + "\n")
    temporary.replace(path)


def _times(path: Path) -> dict[str, list[float]]:
    return json.loads(path.read_text()) if path.exists() else {}


def _write(workdir: Path, failed: dict[str, Ended], *, smoke: bool) -> Path:
    found: dict[str, Results] = {}
    statuses = []
    times = _times(workdir / TIMES)
    for entry in ENTRIES:
        # What a study says as it fails may name folders of this machine.
        ended = failed.get(entry.name)
        state = "not run" if ended is None else f"failed ({ended.status})"
        if entry.finished(workdir):
            found[entry.name] = read_results(workdir / entry.name)
            state = "finished"
        wall, cpu = times.get(entry.name, (None, None))
        statuses.append(Status(entry, state, wall, cpu))
    command = "python -m experiments.reproduce --workdir=runs/reproduction"
    command += " --smoke" if smoke else ""
    return write_document(workdir, statuses, found, command, smoke=smoke)


if __name__ == "__main__":
    cli.main(main, define_flags)
