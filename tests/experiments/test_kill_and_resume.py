"""A run killed with SIGKILL at any moment, and started again, ends with the same bits.

The uninterrupted run and the killed one share a cache of compiled programs, which is
JAX's own and saves time only.
"""

import json
import random
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import ablation_process
import numpy as np
import pytest

from geomjax.optim.mask_file import load_mask

pytestmark = pytest.mark.timeout(3600)

RUN = "arms/{arm}/lr_*/seed_*"
ARMS = ("adamw", "adamw_opd_mask")


class Reference(NamedTuple):
    """An uninterrupted run.

    Attributes:
      options: How it was started.
      workdir: What it wrote.
      seconds: How long it took.
    """

    options: dict[str, Any]
    workdir: Path
    seconds: float

    def start(self, workdir: Path) -> subprocess.Popen:
        """Starts the same in another folder."""
        return ablation_process.start(workdir, self._config(), **self.options)

    def run(self, workdir: Path) -> None:
        """Runs the same to its end."""
        status, output = ablation_process.run(workdir, self._config(), **self.options)
        assert status == 0, output

    def _config(self) -> str:
        return f"--config={self.workdir.parent / 'config.py'}"


@pytest.fixture(scope="module")
def reference(tmp_path_factory) -> Reference:
    """One for all tests, run with nothing compiled before."""
    folder = tmp_path_factory.mktemp("reference")
    (folder / "config.py").write_text(ablation_process.CONFIG)
    options = {"cache": folder / "cache"}
    reference = Reference(options, folder / "whole", 0.0)
    started = time.monotonic()
    reference.run(reference.workdir)
    return reference._replace(seconds=time.monotonic() - started)


Moment = Callable[[Path], bool]
"""Whether a process that has been started should be killed now, by its workdir."""


def _after(seconds: float) -> Moment:
    end = time.monotonic() + seconds
    return lambda workdir: time.monotonic() >= end


def _saving(arm: str) -> Moment:
    """While Orbax writes a checkpoint under its temporary name."""
    pattern = f"{RUN.format(arm=arm)}/checkpoints/states/*orbax-checkpoint-tmp*"
    return lambda workdir: any(workdir.glob(pattern))


def _trained(arm: str, rows: int) -> Moment:
    """When an arm's metrics file has so many rows."""

    def now(workdir: Path) -> bool:
        paths = list(workdir.glob(f"{RUN.format(arm=arm)}/metrics.jsonl"))
        return any(path.read_bytes().count(b"\n") >= rows for path in paths)

    return now


def _appeared(pattern: str) -> Moment:
    return lambda workdir: any(workdir.glob(pattern))


def _kill_at(moment: Moment, workdir: Path, reference: Reference) -> bool:
    """Starts the run and kills it at a moment; False if it ended before."""
    before = {p for p in workdir.rglob("*") if "orbax-checkpoint-tmp" in p.name}
    process = reference.start(workdir)
    try:
        # What an earlier kill left is no sign of this process.
        while any(path.exists() for path in before) and process.poll() is None:
            time.sleep(0.001)
        while not moment(workdir):
            if process.poll() is not None:
                return False
            time.sleep(0.001)
    finally:
        process.kill()
        status = process.wait()
    return status == -signal.SIGKILL


def _moments(generator: random.Random, seconds: float) -> dict[str, Moment]:
    """Every kind of moment, drawn anew."""
    arm = generator.choice(ARMS)
    return {
        "any": _after(generator.uniform(0.0, seconds)),
        "early": _after(generator.uniform(0.0, seconds / 4)),
        f"saving {arm}": _saving(arm),
        f"training {arm}": _trained(arm, generator.randint(1, 19)),
        "claimed": _appeared("config.json"),
        "between arms": _appeared("arms/adamw_opd_mask"),
        "mask": _appeared("arms/adamw_opd_mask/lr_*/seed_*/mask.safetensors"),
        "exporting": _appeared("arms/*/checkpoint/.*.tmp"),
        "exported": _appeared("arms/adamw/checkpoint/model.safetensors"),
        "masters": _appeared("arms/*/masters"),
        "results": _appeared("results.json"),
    }


SPECIAL = {
    "finished.json",
    "report.html",
    "report.md",
    "results.json",
    "mask.safetensors",
}
"""Files with the time taken or the command, and one whose header's order is free."""


def _files(workdir: Path) -> set[Path]:
    found = {path.relative_to(workdir) for path in workdir.rglob("*") if path.is_file()}
    aside = {"checkpoints", "tensorboard", "timing.jsonl", "provenance.json"}
    return {p for p in found if not aside & set(p.parts)}


def _assert_same(found: Path, expected: Path) -> None:
    assert _files(found) == _files(expected)
    assert not [path for path in found.rglob("*") if "tmp" in path.name]
    for path in _files(expected):
        if path.name not in SPECIAL:
            assert (found / path).read_bytes() == (expected / path).read_bytes(), path
        elif path.name == "mask.safetensors":
            ours, theirs = load_mask(found / path), load_mask(expected / path)
            assert ours.keys() == theirs.keys()
            for name in theirs:
                np.testing.assert_array_equal(ours[name], theirs[name], str(path))
    results = [json.loads((p / "results.json").read_text()) for p in (found, expected)]
    for each in results:
        assert each.pop("wall_s") > 0.0
        each.pop("compilations")  # Of the last process: it trains what is left.
    assert results[0] == results[1]
    # What was compared is what it should be.
    names = {str(path) for path in _files(expected)}
    for arm in ARMS:
        assert f"arms/{arm}/checkpoint/model.safetensors" in names
        assert f"arms/{arm}/masters/model.safetensors" in names
        (metrics,) = expected.glob(f"arms/{arm}/lr_*/seed_0/metrics.jsonl")
        assert len(metrics.read_text().splitlines()) == 8 * 2 + 4


def test_a_run_killed_while_saving_training_and_exporting(reference, tmp_path):
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed of the kills: {seed}")  # noqa: T201, shown when the test fails
    generator = random.Random(seed)
    workdir = tmp_path / "killed"
    for moment in (
        _saving("adamw"),
        _trained("adamw_opd_mask", generator.randint(1, 19)),
        _appeared(generator.choice(["arms/adamw/checkpoint/.*.tmp", "results.json"])),
    ):
        assert _kill_at(moment, workdir, reference)
    reference.run(workdir)
    _assert_same(workdir, reference.workdir)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_run_killed_at_many_random_moments(reference, tmp_path):
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed of the kills: {seed}")  # noqa: T201, shown when the test fails
    generator = random.Random(seed)
    workdir = tmp_path / "killed"
    killed = []
    for _ in range(6):
        moments = _moments(generator, reference.seconds)
        name = generator.choice(sorted(moments))
        # The folder may be past the moment already; then at any time.
        moment = moments[name] if not moments[name](workdir) else moments["early"]
        if _kill_at(moment, workdir, reference):
            killed.append(name)
    print(f"killed: {killed}")  # noqa: T201, shown when the test fails
    assert len(killed) >= 3
    reference.run(workdir)
    _assert_same(workdir, reference.workdir)
    # Complete, it is only reported anew.
    reference.run(workdir)
    _assert_same(workdir, reference.workdir)
