"""One small run of the ablation, and smoke runs of the studies, shared by tests."""

import fcntl
import importlib
import json
import os
from pathlib import Path
from typing import Any, NamedTuple

import ml_collections
import numpy as np
import pytest

from configs import optimizer_ablation as config_module
from experiments import optimizer_ablation
from experiments.common import arm_geometry as geometry
from experiments.common import workdir as workdirs
from experiments.reproduction.plan import select
from geomjax.models import hf


class Run(NamedTuple):
    """A finished run; `finals` holds the last parameters of each arm and seed."""

    config: ml_collections.ConfigDict
    workdir: Path
    record: dict[str, Any]
    finals: dict[str, list[dict[str, np.ndarray]]]


def small_config() -> ml_collections.ConfigDict:
    """The smoke variant, made smaller still."""
    config = config_module.get_config("smoke")
    config.num_steps = 6
    config.evaluate_every = 1
    config.save_every = 6
    config.prompts_per_step = 8
    config.seeds = (0, 1)
    return config


@pytest.fixture(scope="session")
def ablation_run(tmp_path_factory) -> Run:
    """All six arms with two seeds, masters exported."""
    workdir = tmp_path_factory.mktemp("ablation") / "run"
    config = small_config()
    config.export_masters = True
    finals = []

    def measure_arm(anchor, params):
        params = list(params)
        names = anchor.model.config
        finals.append([dict(hf.to_hf(tree, names)) for tree in params])
        return geometry.measure_arm(anchor, params)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(optimizer_ablation, "measure_arm", measure_arm)
        record = optimizer_ablation.run(config, workdir)
    arms = dict(zip(record["arms"], finals, strict=True))
    return Run(config, workdir, record, arms)


class Smoke:
    """Smoke runs of the reproduction's studies, each made once a session.

    They lie in one folder, which is that of a whole reproduction; xdist's workers share
    it, and who comes first runs a study while the others wait.
    """

    def __init__(self, folder: Path):
        self.folder = folder

    def run(self, name: str) -> tuple[Path, dict[str, Any]]:
        """Folder and results of a study's smoke run."""
        (entry,) = select([name])
        workdir = self.folder / name
        with (self.folder / f".{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not entry.finished(self.folder):
                module = importlib.import_module(f"experiments.{entry.module}")
                config = entry.config(smoke=True)
                with workdirs.locked(workdir):
                    module.run(workdirs.claim(workdir, config, resume=False), workdir)
        return workdir, json.loads((workdir / "results.json").read_text())


@pytest.fixture(scope="session")
def smoke(tmp_path_factory) -> Smoke:
    """Smoke runs shared by all tests."""
    base = tmp_path_factory.getbasetemp()
    # A worker's folder lies in that of the session.
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    folder = shared / "smoke"
    folder.mkdir(exist_ok=True)
    return Smoke(folder)
