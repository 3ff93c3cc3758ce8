"""A run's folder alone suffices to redo it, to the bit."""

import json
import shutil
import subprocess
import sys

import ml_collections
import pytest

from configs import optimizer_ablation as config_module
from experiments import evaluate, optimizer_ablation, redo
from experiments.common import provenance
from experiments.common import workdir as workdirs
from experiments.common.workdir import WorkdirError
from experiments.common.world import TINY_WORLD

STUB = """
LOGGED = []
def init(**given):
    pass
def log(values, step):
    LOGGED.append(values)
def finish():
    pass
"""


def tiny_config():
    """One arm, two steps."""
    config = config_module.get_config("smoke")
    config.num_steps, config.evaluate_every, config.save_every = 2, 2, 2
    config.prompts_per_step = 8
    config.arms = {"adamw": {"optimizer": "adamw", "mask": "none"}}
    config.export_masters = True
    return config


def started(workdir, config):
    """As the command line starts the ablation."""
    with workdirs.locked(workdir):
        claimed = workdirs.claim(workdir, config, resume=False)
        return optimizer_ablation.run(claimed, workdir)


def test_a_training_run_is_redone_with_the_same_bits(tmp_path, monkeypatch, capsys):
    """The first run is tracked, so that its tracker is tested in the loop too."""
    (tmp_path / "trackio.py").write_text(STUB)
    monkeypatch.syspath_prepend(str(tmp_path))
    first, again = tmp_path / "first", tmp_path / "again"
    config = tiny_config()
    config.tracker = "trackio"
    started(first, config)
    rows = (first / "arms/adamw/lr_0.0001/seed_0/metrics.jsonl").read_text()
    assert len(sys.modules["trackio"].LOGGED) == len(rows.splitlines()) > 4
    sys.modules.pop("trackio")
    # Nothing of the folder but its records is needed.
    kept = tmp_path / "kept"
    kept.mkdir()
    for name in ("config.json", "inputs.json", "provenance.json"):
        shutil.copyfile(first / name, kept / name)
    recorded = json.loads((kept / "config.json").read_text())
    (kept / "config.json").write_text(json.dumps(recorded | {"tracker": ""}))
    redo.redo(kept, again)
    compared = [
        "arms/adamw/masters/model.safetensors",
        "arms/adamw/checkpoint/model.safetensors",
        "metrics.jsonl",
        "inputs.json",
    ]
    for name in compared:
        assert (again / name).read_bytes() == (first / name).read_bytes(), name
    record = json.loads((first / "provenance.json").read_text())
    assert record["experiment"] == "optimizer_ablation"
    (start,) = record["starts"]
    assert start["command"].startswith("python ")
    assert start["environment"]["jax"]
    said = [line for line in capsys.readouterr().out.splitlines() if " then, " in line]
    # The code may be edited meanwhile; nothing else differs.
    assert not [line for line in said if not line.startswith("code: ")]


@pytest.fixture
def evaluation(tmp_path):
    """A finished evaluation of a copy of the anchor."""
    checkpoint, folder = tmp_path / "anchor", tmp_path / "first"
    shutil.copytree(TINY_WORLD / "anchor", checkpoint)
    config = ml_collections.ConfigDict(
        {
            "checkpoint": str(checkpoint),
            "compare": "",
            "suite": "tiny-world",
            "samples": 2,
            "temperature": 1.0,
            "top_p": 0.9,
            "max_new_tokens": 6,
            "seed": 3,
            "chat": "auto",
            "system": "",
            "thinking": "default",
            "limit": 8,
            "rows": 8,
            "compute_dtype": "float32",
            "mesh": "",
            "reward": "",
            "reward_timeout_s": 60.0,
            "reward_workers": 1,
            "resamples": 100,
            "bootstrap_seed": 0,
            "confidence": 0.95,
        }
    )
    with workdirs.locked(folder):
        evaluate.run(workdirs.claim(folder, config, resume=False), folder)
    return folder, checkpoint


def test_an_evaluation_is_redone_unless_its_inputs_changed(evaluation, tmp_path):
    folder, checkpoint = evaluation
    redo.redo(folder, tmp_path / "again")
    for name in ("checkpoint/tiny-world.jsonl", "results.json", "report.html"):
        assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes()
    settings = checkpoint / "generation_config.json"
    settings.write_text(settings.read_text() + "\n")
    with pytest.raises(WorkdirError, match="changed since: checkpoint.generation"):
        redo.redo(folder, tmp_path / "third")
    assert not (tmp_path / "third").exists()


def test_what_differs_from_the_first_run_is_said():
    record = {
        "starts": [
            {
                "environment": provenance.environment() | {"jax": "0.1.0"},
                "git": {"commit": "abc", "changed": False},
            }
        ]
    }
    versions, code = redo.differences(record)
    assert versions.startswith("jax: 0.1.0 then, ")
    assert code.startswith("code: {'commit': 'abc'")


def test_every_start_is_recorded(tmp_path):
    for _ in range(2):
        provenance.record_start(tmp_path, "evaluate")
    assert len(provenance.read(tmp_path)["starts"]) == 2
    with pytest.raises(WorkdirError, match="is a run of evaluate, not of tiny_world"):
        provenance.record_start(tmp_path, "tiny_world")


@pytest.mark.parametrize(
    "name", ["os", "../evil", "no_such", "common.cli", "mask_overlap"]
)
def test_no_module_but_an_experiment_is_imported(name):
    with pytest.raises(WorkdirError, match="no experiment that can be redone"):
        redo.load_experiment(name)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"experiment": 3, "starts": []}'])
def test_a_damaged_record_is_refused(tmp_path, text):
    (tmp_path / "provenance.json").write_text(text)
    with pytest.raises(WorkdirError, match="provenance.json is damaged"):
        provenance.read(tmp_path)
    with pytest.raises(WorkdirError, match="holds no provenance.json"):
        provenance.read(tmp_path / "other")


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_the_commit_of_the_code_is_known(tmp_path, monkeypatch):
    package = tmp_path / "geomjax"
    package.mkdir()
    source = package / "__init__.py"
    source.write_text("")
    monkeypatch.setattr(provenance.geomjax, "__file__", str(source))

    def git(*arguments):
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run(
            ["git", *identity, *arguments],
            cwd=tmp_path,
            check=True,
            capture_output=True,
        )

    git("init")
    assert provenance.git_commit() is None  # In a repository, but not of it.
    git("add", ".")
    git("commit", "-m", "one")
    found = provenance.git_commit()
    assert len(found["commit"]) == 40
    assert not found["changed"]
    source.write_text("x = 1\n")
    assert provenance.git_commit() == found | {"changed": True}
