"""A run's folder: it belongs to one configuration, its inputs, and one run.

Of several processes, process 0 holds it, and what it finds wrong is raised in all.
"""

import fcntl
import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import ml_collections

from geomjax import hosts

CONFIG_FILE = "config.json"
INPUTS_FILE = "inputs.json"
PROVENANCE_FILE = "provenance.json"
LOCK_FILE = ".lock"

_OWN_FILES = {
    LOCK_FILE,
    *(
        name
        for file in (CONFIG_FILE, INPUTS_FILE, PROVENANCE_FILE)
        for name in (file, f".{file}.tmp")
    ),
}
_INPUT_SUFFIXES = (".json", ".jsonl", ".jinja", ".safetensors", ".txt")
_SAMPLE_BYTES = 1 << 16
_SAMPLES = 256
_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:/")


class WorkdirError(ValueError):
    """The workdir belongs to another configuration, or to another process."""


def resolved(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """The configuration as plain JSON data (tuples become lists)."""
    return json.loads(json.dumps(config.to_dict()))


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            out.update(_flat(value, f"{prefix}{name}."))
        else:
            out[prefix + name] = value
    return out


def claim(
    workdir: Path,
    config: ml_collections.ConfigDict,
    *,
    resume: bool,
    free: frozenset[str] = frozenset(),
) -> ml_collections.ConfigDict:
    """Makes the workdir this configuration's, or finds that it already is.

    A run that was interrupted continues when it is started again with the same
    configuration. Another configuration is refused.

    Args:
      workdir: The run's folder.
      config: The configuration asked for.
      resume: Continue what the folder holds, with the configuration it was begun with;
        fields that it does not know yet, and free ones, are those asked for.
      free: Fields that no result depends on, which may be changed between starts.

    Returns:
      The configuration to run.

    Raises:
      WorkdirError: The folder belongs to another configuration (the fields that differ
        are listed), holds files but no configuration, or a damaged one.
    """
    values = hosts.on_main(lambda: _claim(workdir, resolved(config), resume, free))
    return ml_collections.ConfigDict(values)


def claimed_hash(workdir: Path, free: frozenset[str] = frozenset()) -> str:
    """Names the configuration that a folder belongs to, whatever its free fields are.

    Empty for a folder that was not claimed.
    """

    def of_folder() -> str:
        path = workdir / CONFIG_FILE
        if not path.exists():
            return ""
        flat = _flat(_read(path))
        kept = {name: flat[name] for name in sorted(flat) if name not in free}
        return hashlib.sha256(json.dumps(kept).encode()).hexdigest()[:16]

    return hosts.on_main(of_folder)


def _claim(
    workdir: Path, wanted: dict[str, Any], resume: bool, free: frozenset[str]
) -> dict[str, Any]:
    path = workdir / CONFIG_FILE
    if path.exists():
        found = _read(path)
        ours, theirs = _flat(wanted), _flat(found)
        fields = [
            f"  {name}: {theirs.get(name)!r} there, {ours.get(name)!r} asked for"
            for name in sorted(ours.keys() | theirs.keys())
            if ours.get(name) != theirs.get(name) and name not in free
        ]
        if resume:
            if fields:
                print("--resume continues with the folder's configuration:")
                print("\n".join(fields))
            kept = {name: value for name, value in found.items() if name not in free}
            return wanted | kept
        if fields:
            raise WorkdirError(
                f"{workdir} belongs to a run with another configuration:\n"
                + "\n".join(fields)
                + "\nChoose another --workdir, or continue that run with --resume"
            )
        return wanted
    if resume:
        raise WorkdirError(f"--resume: {workdir} holds no run")
    if _names(workdir) - _OWN_FILES:
        raise WorkdirError(
            f"{workdir} holds files that are no run of this project; choose an empty "
            "or a new folder"
        )
    workdir.mkdir(parents=True, exist_ok=True)
    _write(path, wanted)
    return wanted


def claim_inputs(
    workdir: Path, paths: Mapping[str, Path], hashes: Mapping[str, str]
) -> None:
    """Records what the inputs hold, or finds that they have not changed since.

    Every process reads them, as each has its own copy of a disk that is not shared.

    Args:
      workdir: The run's folder.
      paths: Files and checkpoint folders, by name. Of a file above 16 MiB its size and
        256 samples are compared, not every byte.
      hashes: Hashes of inputs that were read already, such as a data set's
        `fingerprint`, by name.

    Raises:
      WorkdirError: An input holds something else than when the run was begun.
      ValueError: Processes have different inputs.
    """
    wanted = _wanted(paths, hashes)
    require_alike(wanted)
    hosts.on_main(lambda: _claim_inputs(workdir, wanted))


def require_alike(inputs: Mapping[str, Any]) -> None:
    """Raises ValueError in every process unless all have read the same inputs.

    Args:
      inputs: Hashes of what this process has read, by name, as JSON data.
    """
    flat = [_flat(each) for each in hosts.gather(dict(inputs))]
    names = sorted(set().union(*flat))
    different = [n for n in names if len({each.get(n) for each in flat}) > 1]
    if different:
        raise ValueError(
            f"the processes read different inputs: {', '.join(different)}; give each "
            "the same files"
        )


def check_inputs(
    workdir: Path, paths: Mapping[str, Path], hashes: Mapping[str, str]
) -> None:
    """Compares inputs with what a folder records of them, where it does.

    Args:
      workdir: A folder that may have been begun, or not.
      paths: As in `claim_inputs`, and so are the hashes; all or some of the inputs.
      hashes: By name.

    Raises:
      WorkdirError: An input holds something else than when the run was begun.
    """
    path = workdir / INPUTS_FILE
    if path.exists():
        found, wanted = _read(path), _wanted(paths, hashes)
        both = found.keys() & wanted.keys()
        _compare(workdir, *({n: d[n] for n in both} for d in (found, wanted)))


def _claim_inputs(workdir: Path, wanted: Mapping[str, Any]) -> None:
    path = workdir / INPUTS_FILE
    if path.exists():
        _compare(workdir, _read(path), wanted)
    else:
        _write(path, wanted)


def _wanted(paths: Mapping[str, Path], hashes: Mapping[str, str]) -> dict[str, Any]:
    digests = {name: _digests(place) for name, place in sorted(paths.items())}
    return {**digests, **hashes}


def _compare(
    workdir: Path, found: Mapping[str, Any], wanted: Mapping[str, Any]
) -> None:
    if found != wanted:
        ours, theirs = _flat(wanted), _flat(found)
        names = [
            n
            for n in sorted(ours.keys() | theirs.keys())
            if ours.get(n) != theirs.get(n)
        ]
        raise WorkdirError(
            f"{workdir} was begun with other inputs; changed since: "
            + ", ".join(names)
            + ". Choose another --workdir"
        )


def _digests(place: Path) -> dict[str, str]:
    """A digest of every file of a checkpoint folder that a run reads, or of a file."""
    if not place.is_dir():
        return {place.name: _digest(place)}
    return {
        file.name: _digest(file)
        for file in sorted(place.iterdir())
        if file.suffix in _INPUT_SUFFIXES and file.is_file()
    }


def _digest(path: Path) -> str:
    size = path.stat().st_size
    digest = hashlib.blake2b(str(size).encode(), digest_size=16)
    with path.open("rb") as file:
        if size <= _SAMPLES * _SAMPLE_BYTES:
            digest.update(file.read())
        else:
            for i in range(_SAMPLES):
                file.seek(i * (size - _SAMPLE_BYTES) // (_SAMPLES - 1))
                digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()


def _write(path: Path, record: Mapping[str, Any]) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(record, indent=2) + "\n")
    temporary.replace(path)


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except ValueError as error:  # Neither JSON nor, perhaps, text.
        raise WorkdirError(f"{path} is damaged: {error}") from None
    if not isinstance(found, dict):
        raise WorkdirError(f"{path} is damaged: it holds no JSON object")
    return found


def _names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} if folder.exists() else set()


def refuse_address(workdir: Path | str) -> None:
    """Refuses what would become a relative folder named after a bucket's address.

    Raises:
      WorkdirError: It begins as `gs://...` does; a `Path` has one slash left of it.
    """
    if _ADDRESS.match(str(workdir)):
        raise WorkdirError(
            f"{workdir} is an address, and a workdir is a folder: mount the bucket and "
            "give its path"
        )


@contextmanager
def locked(workdir: Path) -> Iterator[None]:
    """Holds the workdir for this run; the lock goes with it, however it ends.

    A run that fails before it has written anything but its configuration leaves the
    folder as it was found, so that it can be started again with a corrected one.

    Raises:
      WorkdirError: Another process holds it, or it is an address, not a folder.
    """
    refuse_address(workdir)
    with ExitStack() as stack:
        hosts.on_main(lambda: stack.enter_context(_locked(workdir)))
        yield


@contextmanager
def _locked(workdir: Path) -> Iterator[None]:
    made = not workdir.exists()
    workdir.mkdir(parents=True, exist_ok=True)
    before = _names(workdir)
    path = workdir / LOCK_FILE
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(file.fileno()).st_nlink == 0:  # Removed before we had it.
                raise BlockingIOError
        except BlockingIOError:
            raise WorkdirError(f"{workdir} is in use by another process") from None
        try:
            yield
        except BaseException:
            written = _names(workdir) - before
            if written <= _OWN_FILES:
                for name in written:
                    (workdir / name).unlink()
                if made:
                    workdir.rmdir()
            raise
