"""A workdir belongs to one configuration and one process, and nothing is half made."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import ablation_process
import ml_collections
import pytest

from experiments.common.workdir import (
    CONFIG_FILE,
    LOCK_FILE,
    WorkdirError,
    claim,
    claim_inputs,
    locked,
    refuse_address,
    resolved,
)


def _config(**fields):
    return ml_collections.ConfigDict(
        {
            "num_steps": 10,
            "seeds": (0, 1),
            "adamw": {"b1": 0.9, "eps": 1e-8},
            "options": {},
            "student": "",
        }
        | fields
    )


def _snapshot(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
    }


def _claim(workdir, config, *, resume=False):
    with locked(workdir):
        return claim(workdir, config, resume=resume)


def test_a_new_folder_is_claimed_with_its_configuration(tmp_path):
    workdir = tmp_path / "runs" / "new"
    claimed = _claim(workdir, _config())
    assert claimed.to_dict() == resolved(_config())
    assert json.loads((workdir / CONFIG_FILE).read_text()) == resolved(_config())
    assert sorted(_snapshot(workdir)) == [LOCK_FILE, CONFIG_FILE]


def test_an_empty_folder_is_as_good_as_a_new_one(tmp_path):
    assert _claim(tmp_path, _config()).num_steps == 10


def test_the_same_configuration_continues(tmp_path):
    _claim(tmp_path, _config())
    before = _snapshot(tmp_path)
    # Tuples and lists are the same thing on disk.
    assert _claim(tmp_path, _config(seeds=[0, 1])).seeds == [0, 1]
    assert _snapshot(tmp_path) == before


def test_another_configuration_is_refused_with_the_fields_that_differ(tmp_path):
    _claim(tmp_path, _config())
    before = _snapshot(tmp_path)
    other = _config(adamw={"b1": 0.8, "eps": 1e-8}, seeds=(0,), extra=True)
    with pytest.raises(WorkdirError, match="another configuration") as error:
        _claim(tmp_path, other)
    message = str(error.value)
    assert "  adamw.b1: 0.9 there, 0.8 asked for\n" in message
    assert "  seeds: [0, 1] there, [0] asked for\n" in message
    assert "  extra: None there, True asked for\n" in message
    assert "eps" not in message
    assert "num_steps" not in message
    assert "--resume" in message
    assert str(tmp_path) in message
    assert _snapshot(tmp_path) == before


def test_resume_takes_the_configuration_that_is_there(tmp_path):
    _claim(tmp_path, _config())
    before = _snapshot(tmp_path)
    claimed = _claim(tmp_path, _config(num_steps=99), resume=True)
    assert claimed.num_steps == 10
    assert claimed.to_dict() == resolved(_config())
    assert _snapshot(tmp_path) == before


def test_resume_of_nothing_is_refused_and_makes_nothing(tmp_path):
    workdir = tmp_path / "absent"
    with pytest.raises(WorkdirError, match="holds no run"):
        _claim(workdir, _config(), resume=True)
    assert not workdir.exists()


@pytest.mark.parametrize("resume", [False, True])
def test_a_folder_with_other_files_is_refused_and_left_alone(tmp_path, resume):
    (tmp_path / "thesis.tex").write_text("years of work")
    (tmp_path / "figures").mkdir()
    before = _snapshot(tmp_path)
    with pytest.raises(WorkdirError, match=r"no run"):
        _claim(tmp_path, _config(), resume=resume)
    assert _snapshot(tmp_path) == before


@pytest.mark.parametrize(
    "content",
    [b"", b'{"num_steps": 1', b"\xff\xfe\x00", b"[1, 2]", b"null"],
    ids=["empty", "cut off", "not text", "a list", "null"],
)
@pytest.mark.parametrize("resume", [False, True])
def test_a_damaged_configuration_is_named_and_left_alone(tmp_path, content, resume):
    _claim(tmp_path, _config())
    (tmp_path / CONFIG_FILE).write_bytes(content)
    with pytest.raises(WorkdirError, match=r"config\.json is damaged"):
        _claim(tmp_path, _config(), resume=resume)
    assert (tmp_path / CONFIG_FILE).read_bytes() == content


@pytest.mark.parametrize("left", [[LOCK_FILE], [LOCK_FILE, f".{CONFIG_FILE}.tmp"]])
def test_what_a_process_killed_while_claiming_left_is_no_obstacle(tmp_path, left):
    for name in left:
        (tmp_path / name).write_text("")
    assert _claim(tmp_path, _config()).num_steps == 10
    assert sorted(_snapshot(tmp_path)) == [LOCK_FILE, CONFIG_FILE]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("existed", [False, True])
def test_a_run_that_fails_at_once_leaves_the_folder_as_it_was(tmp_path, error, existed):
    workdir = tmp_path / "failed"
    if existed:
        workdir.mkdir()

    def fail():
        with locked(workdir):
            claim(workdir, _config(), resume=False)
            raise error

    with pytest.raises(error):
        fail()
    assert workdir.exists() == existed
    assert _claim(workdir, _config(num_steps=3)).num_steps == 3


def test_a_run_that_fails_later_keeps_what_it_wrote(tmp_path):
    workdir = tmp_path / "failed"

    def fail():
        with locked(workdir):
            claim(workdir, _config(), resume=False)
            (workdir / "arms").mkdir()
            raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        fail()
    assert sorted(_snapshot(workdir)) == [LOCK_FILE, "arms", CONFIG_FILE]


def test_a_later_process_that_fails_does_not_undo_an_earlier_claim(tmp_path):
    _claim(tmp_path, _config())
    before = _snapshot(tmp_path)

    def fail():
        with locked(tmp_path):
            claim(tmp_path, _config(), resume=False)
            raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        fail()
    assert _snapshot(tmp_path) == before


HOLDER = """
import sys, time
from pathlib import Path
from experiments.common.workdir import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


def test_two_processes_at_once_are_refused_until_the_first_ends(tmp_path):
    workdir = tmp_path / "shared"
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(workdir)],
        cwd=ablation_process.ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert holder.stdout.readline() == "held\n"
        before = _snapshot(workdir)
        with pytest.raises(WorkdirError, match="in use by another process"):
            _claim(workdir, _config())
        assert _snapshot(workdir) == before
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        holder.stdout.close()
    # The lock went with the process.
    assert _claim(workdir, _config()).num_steps == 10


def test_an_address_is_refused_and_makes_no_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def fail():
        with locked(Path("gs://bucket/run")):
            pass

    with pytest.raises(WorkdirError, match="gs:/bucket/run is an address"):
        fail()
    with pytest.raises(WorkdirError, match="mount the bucket"):
        refuse_address("gs://bucket/run")
    assert _snapshot(tmp_path) == {}
    refuse_address("a: b/c")
    refuse_address(tmp_path / "a:" / "b")


def test_a_lock_that_is_held_by_this_process_is_not_taken_twice(tmp_path):
    with (
        locked(tmp_path),
        pytest.raises(WorkdirError, match="in use"),
        locked(tmp_path),
    ):
        raise AssertionError("the lock was taken twice")


def _file(tmp_path, text):
    path = tmp_path / "prompts.jsonl"
    path.write_text(text)
    return path


@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config.num_stepz=3"], "num_stepz"),
        (["--no_such_flag"], "no_such_flag"),
        (["--resume"], "error: --resume: "),
        (["--config.prompts={prompts}"], "prompts.jsonl"),
        (["--config.objective=reverse"], "objective 'reverse'; known: sampled_token"),
    ],
    ids=["key", "flag", "resume", "prompts", "value"],
)
def test_bad_flags_are_one_message_and_leave_no_workdir(tmp_path, arguments, message):
    prompts = _file(tmp_path, '{"prompt": "1+1=", "answer": "2"}\nnot json\n')
    workdir = tmp_path / "workdir"
    arguments = [argument.format(prompts=prompts) for argument in arguments]
    status, output = ablation_process.run(workdir, *arguments)
    assert status not in (0, None)
    assert message in output
    assert "Traceback" not in output
    assert not workdir.exists()


def test_free_fields_may_change_between_starts(tmp_path):
    free = frozenset({"num_steps"})
    _claim(tmp_path, _config())
    with locked(tmp_path):
        again = claim(tmp_path, _config(num_steps=99), resume=False, free=free)
    assert again.num_steps == 99
    with locked(tmp_path):
        resumed = claim(
            tmp_path, _config(num_steps=98, student="x"), resume=True, free=free
        )
    assert resumed.num_steps == 98
    assert resumed.student == ""


def test_resume_says_what_it_leaves_aside(tmp_path, capsys):
    _claim(tmp_path, _config())
    _claim(tmp_path, _config(num_steps=99), resume=True)
    assert "num_steps: 10 there, 99 asked for" in capsys.readouterr().out


def test_resume_fills_in_a_field_that_came_later(tmp_path):
    _claim(tmp_path, _config())
    assert _claim(tmp_path, _config(new=3), resume=True).new == 3


@pytest.fixture
def inputs(tmp_path):
    folder = tmp_path / "student"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(bytes(1000))
    (tmp_path / "prompts.jsonl").write_text("1\n")
    return {"student": folder, "prompts": tmp_path / "prompts.jsonl"}, {"data": "1"}


def test_inputs_that_changed_behind_their_path_are_refused(tmp_path, inputs):
    workdir = tmp_path / "run"
    workdir.mkdir()
    claim_inputs(workdir, *inputs)
    claim_inputs(workdir, *inputs)
    (inputs[0]["student"] / "model.safetensors").write_bytes(bytes(999) + b"1")
    inputs[0]["prompts"].write_text("2\n")
    with pytest.raises(WorkdirError, match="other inputs") as caught:
        claim_inputs(workdir, *inputs)
    assert "prompts.prompts.jsonl, student.model.safetensors" in str(caught.value)
    with pytest.raises(WorkdirError, match="changed since: data, "):
        claim_inputs(workdir, inputs[0], {"data": "2"})


def test_a_large_file_is_compared_by_size_and_samples(tmp_path, inputs):
    workdir, large = tmp_path / "run", inputs[0]["student"] / "model.safetensors"
    workdir.mkdir()
    large.write_bytes(bytes(30 << 20))
    claim_inputs(workdir, *inputs)
    with large.open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"1")
    with pytest.raises(WorkdirError, match=r"student\.model\.safetensors"):
        claim_inputs(workdir, *inputs)
