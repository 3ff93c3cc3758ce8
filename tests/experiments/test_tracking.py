"""Trackers: sent what the metrics file holds, once, and asked for by name."""

import json
import sys
from contextlib import closing

import pytest

from experiments.common import tracking
from experiments.common.tracking import TRACKERS, load_tracker, tracked
from geomjax.train.log import MetricsLog, read_rows, read_rows_from

STUB = """
import json
CALLS = []
def init(**given):
    CALLS.append(["init", given])
def log(values, step):
    CALLS.append(["log", values, step])
def finish():
    CALLS.append(["finish"])
"""
PLACE = {"project": "ablation", "run": "adamw-seed_0", "config": {"seeds": [0]}}


@pytest.fixture(params=TRACKERS)
def stub(request, tmp_path, monkeypatch):
    """A package of the tracker's name that records what it is told."""
    folder = tmp_path / "site"
    folder.mkdir()
    (folder / f"{request.param}.py").write_text(STUB)
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.delitem(sys.modules, request.param, raising=False)
    yield request.param
    sys.modules.pop(request.param, None)


def calls(name):
    return sys.modules[name].CALLS


def train(folder, name, steps, resume_step=None, stop_after=None):
    """Writes rows as the loop does: an evaluation, then two updates a step."""
    with (
        closing(MetricsLog(folder, resume_step=resume_step)) as log,
        tracked(name, folder, **PLACE) as wrap,
    ):
        on_step = wrap(lambda step, values: None)
        if resume_step is None:
            log.write("eval", 0, {"accuracy": 0.25})
        for step in range(1 + (resume_step or 0), steps + 1):
            for update in (2 * step - 1, 2 * step):
                log.write("train", step, {"update": update, "loss": 1.0 / update})
            if step == stop_after:
                raise KeyboardInterrupt
            on_step(step, {})
        log.write("eval", steps, {"accuracy": 0.5})


def sent(name):
    return [call[1:] for call in calls(name) if call[0] == "log"]


EXPECTED = [
    [{"eval/step": 0, "eval/accuracy": 0.25}, 0],
    [{"train/step": 1, "train/loss": 1.0}, 1],
    [{"train/step": 1, "train/loss": 0.5}, 2],
    [{"train/step": 2, "train/loss": 1 / 3}, 3],
    [{"train/step": 2, "train/loss": 0.25}, 4],
    [{"eval/step": 2, "eval/accuracy": 0.5}, 4],
]


def test_every_row_is_sent_at_its_update(stub, tmp_path):
    train(tmp_path / "run", stub, 2)
    assert sent(stub) == EXPECTED
    (_, given), *_, last = calls(stub)
    assert given["project"] == "ablation"
    assert given["config"] == {"seeds": [0]}
    assert given["name"].startswith("adamw-seed_0-")
    assert given["resume"] == "allow"
    assert given.get("id") == (given["name"] if stub == "wandb" else None)
    assert last == ["finish"]


def test_a_run_that_was_killed_goes_on_and_repeats_nothing(stub, tmp_path):
    """Killed in step 2 after a save at step 0: both steps are made again."""
    folder = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        train(folder, stub, 2, stop_after=2)
    assert calls(stub)[-1] == ["finish"]
    before = len(calls(stub))
    train(folder, stub, 2, resume_step=0)
    assert sent(stub) == EXPECTED
    names = [call[1]["name"] for call in calls(stub) if call[0] == "init"]
    assert len(names) == 2
    assert len(set(names)) == 1
    assert len(calls(stub)) > before


def test_rows_that_were_sent_are_not_sent_again(stub, tmp_path):
    """Killed in step 3, then in step 2, both times before anything was saved."""
    folder = tmp_path / "run"
    for stop in (3, 2):
        with pytest.raises(KeyboardInterrupt):
            train(
                folder, stub, 3, resume_step=0 if stop == 2 else None, stop_after=stop
            )
        assert sent(stub) == EXPECTED[:5]
    train(folder, stub, 3, resume_step=0)
    assert sent(stub)[:5] == EXPECTED[:5]
    assert [step for _, step in sent(stub)] == [0, 1, 2, 3, 4, 5, 6, 6]


def test_a_row_is_read_once(stub, tmp_path, monkeypatch):
    read = []

    def recorded(*given):
        rows, offset = read_rows_from(*given)
        read.extend(rows)
        return rows, offset

    monkeypatch.setattr(tracking, "read_rows_from", recorded)
    train(tmp_path / "run", stub, 5)
    assert read == read_rows(tmp_path / "run")
    assert len(sent(stub)) == len(read) == 12


def test_none_is_asked_for_and_none_is_imported(tmp_path):
    train(tmp_path / "run", "", 1)
    assert not (tmp_path / "run" / "tracker.json").exists()
    assert load_tracker("") is None
    for name in TRACKERS:
        assert name not in sys.modules


def test_a_tracker_that_is_missing_or_unknown(monkeypatch):
    monkeypatch.setitem(sys.modules, "trackio", None)  # As if not installed.
    with pytest.raises(ValueError, match="'trackio' is not installed .*pip install"):
        load_tracker("trackio")
    with pytest.raises(ValueError, match="tracker 'mlflow'; known: wandb, trackio"):
        load_tracker("mlflow")


def test_the_state_is_json(stub, tmp_path):
    train(tmp_path / "run", stub, 2)
    state = json.loads((tmp_path / "run" / "tracker.json").read_text())
    assert state["tracker"] == stub
    assert state["rows"] == 6
