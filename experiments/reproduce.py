"""Both papers in the tiny world: all studies, one document of all tables and claims.

Runs the optimizer ablation, its comparison of optimizers, and the studies, each as a
process of its own in a folder of `--workdir`, and writes `REPRODUCTION.md`: every table
and figure of both papers, ours beside theirs, every claim with its verdict, and what is
not reproduced and why.

    python -m experiments.reproduce --workdir=runs/reproduction --jobs=2
    python -m experiments.reproduce --workdir=runs/smoke --smoke

Started again it goes on: finished studies are kept, one that was interrupted continues.
`--only=NAME,NAME` runs some of them, `--jobs=N` N at once: one for each core is fastest
on a CPU, as the tiny world's programs hardly use two. The document is written after
each study, of all that have finished. `--only=training_regimes_midsize` and its like
run a study at 104 million parameters, for a GPU; their rows then stand beside the tiny
world's. A smoke run has these too, in the bundled world.
"""

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from absl import flags
from tqdm import tqdm

from experiments.common import cli
from experiments.common import workdir as workdirs
from experiments.reproduction.document import Status, write_document
from experiments.reproduction.plan import KNOWN, MIDSIZE, Entry, select
from experiments.reproduction.process import Command, Ended, run_processes
from experiments.reproduction.results import Results, read_results
from geomjax.analysis.journal import write_atomically
from geomjax.train.errors import Preempted

TIMES, TOTAL = "times.json", "total"
UNKNOWN = (None, None)
LOGS = "logs"


def define_flags() -> None:
    """Defines the flags; not at import: experiments can be imported together."""
    names = ", ".join(entry.name for entry in KNOWN)
    flags.DEFINE_string("workdir", "runs/reproduction", "Folder of studies, document.")
    flags.DEFINE_bool("smoke", False, "Run every study at its smallest.")
    flags.DEFINE_integer("jobs", 1, "Studies that run at once.", lower_bound=1)
    flags.DEFINE_list(
        "only",
        [],
        f"Studies to run, of {names}; if empty all, midsize ones only with --smoke.",
    )


def main() -> None:
    """Runs what the flags name."""
    values, workdir = flags.FLAGS, Path(flags.FLAGS.workdir)
    extra = []
    if values.compilation_cache is not None:
        extra.append(f"--compilation_cache={values.compilation_cache}")
    with workdirs.locked(workdir):
        path = run(
            workdir,
            select(values.only, smoke=values.smoke),
            smoke=values.smoke,
            jobs=values.jobs,
            extra=extra,
        )
    print(f"document: {path}")


def run(
    workdir: Path,
    entries: Sequence[Entry],
    *,
    smoke: bool = False,
    jobs: int = 1,
    extra: Sequence[str] = (),
) -> Path:
    """Runs what has not finished, and writes the document.

    Args:
      workdir: Folder of the lot.
      entries: Which studies to run; the document shows all that have finished.
      smoke: Whether each is run at its smallest.
      jobs: How many run at once.
      extra: Further flags of every study.

    Returns:
      Path of the document.

    Raises:
      WorkdirError: A folder there belongs to another configuration, or is damaged.
      Preempted: A study was told to end.
      ValueError: Studies failed; the others were run and are in the document.
    """
    for entry in KNOWN:
        entry.check(workdir, smoke=smoke)
    (workdir / LOGS).mkdir(parents=True, exist_ok=True)
    missing = [entry for entry in entries if not entry.finished(workdir)]
    commands = [
        Command(
            entry.name,
            [*entry.arguments(workdir, smoke=smoke), *extra],
            _log(workdir, entry.name),
        )
        for entry in missing
    ]
    lot = _Lot(workdir, missing, smoke=smoke, jobs=jobs)
    lot.write()
    with lot.bar:
        run_processes(commands, lot.on_line, lot.on_end, lot.on_stop, jobs=jobs)
    if lot.failed:
        listed = "\n".join(
            f"  {name} failed ({ended.status}): {ended.message}; "
            f"see {_log(workdir, name)}"
            for name, ended in lot.failed.items()
        )
        raise ValueError(
            f"{len(lot.failed)} of {len(missing)} studies failed:\n{listed}"
        )
    return lot.write()


class _Lot:
    """What has become of the studies so far: progress, times and the document."""

    def __init__(
        self, workdir: Path, missing: Sequence[Entry], *, smoke: bool, jobs: int
    ):
        self._workdir, self._smoke, self._jobs = workdir, smoke, jobs
        self._missing = {entry.name: entry for entry in missing}
        self._lines: dict[str, str] = {}
        self._counted = time.monotonic()
        self.failed: dict[str, Ended] = {}
        self.bar = tqdm(
            total=len(missing),
            unit="study",
            mininterval=0.5 if sys.stderr.isatty() else 60,
        )

    def on_line(self, name: str, line: str) -> None:
        """Shows the last line of each study that runs."""
        self._lines[name] = line
        self.bar.set_postfix_str(
            " | ".join(f"{name}: {line}" for name, line in self._lines.items()),
            refresh=False,
        )
        self.bar.update(0)

    def on_end(self, name: str, ended: Ended) -> None:
        """Takes a study's times and writes the document anew.

        Raises:
          Preempted: The study was told to end.
        """
        self._lines.pop(name, None)
        self.on_stop(name, ended)
        if ended.status == cli.PREEMPTED_STATUS:
            raise Preempted(f"{name} was told to end; start the same again")
        if ended.status or not self._missing[name].finished(self._workdir):
            self.failed[name] = ended
        self.write()
        self.bar.update()

    def on_stop(self, name: str, ended: Ended) -> None:
        """Takes the times of a study that ended, or was told to."""
        now = time.monotonic()
        _add_time(self._workdir / TIMES, name, ended.wall_s, ended.cpu_s)
        # Studies that run at once share their wall time.
        _add_time(self._workdir / TIMES, TOTAL, now - self._counted, ended.cpu_s)
        self._counted = now

    def write(self) -> Path:
        """Writes the document."""
        found: dict[str, Results] = {}
        statuses = []
        times = _times(self._workdir / TIMES)
        for entry in KNOWN:
            # What a study says as it fails may name folders of this machine.
            ended = self.failed.get(entry.name)
            state = "not run" if ended is None else f"failed ({ended.status})"
            if entry.finished(self._workdir):
                found[entry.name] = read_results(self._workdir / entry.name)
                state = "finished"
            elif entry in MIDSIZE and entry.name not in self._missing:
                continue  # It was not asked for.
            statuses.append(Status(entry, state, *times.get(entry.name, UNKNOWN)))
        start = "python -m experiments.reproduce --workdir=runs/reproduction"
        jobs = f" --jobs={self._jobs}" if self._jobs > 1 else ""
        command = start + (" --smoke" if self._smoke else "") + jobs
        large = [s.entry.name for s in statuses if s.entry in MIDSIZE]
        if large and not self._smoke:
            command += f"\n{start} --only={','.join(large)}{jobs}"
        return write_document(
            self._workdir,
            statuses,
            found,
            command,
            total=times.get(TOTAL, UNKNOWN),
            smoke=self._smoke,
        )


def _log(workdir: Path, name: str) -> Path:
    """Where a study writes what it prints: its own folder takes no other files."""
    return workdir / LOGS / f"{name}.txt"


def _add_time(path: Path, name: str, wall_s: float, cpu_s: float) -> None:
    times = _times(path)
    wall, cpu = times.get(name, (0.0, 0.0))
    times[name] = (round(wall + wall_s, 1), round(cpu + cpu_s, 1))
    write_atomically(path, json.dumps(times, indent=1) + "\n")


def _times(path: Path) -> dict[str, tuple[float, float]]:
    found = json.loads(path.read_text()) if path.exists() else {}
    return {name: (wall, cpu) for name, (wall, cpu) in found.items()}


if __name__ == "__main__":
    cli.main(main, define_flags)
