"""An experiment as a process: told to end, with a cache, and one of several."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time

import ablation_process
import host_processes
import jax
import pytest

from experiments.common import compilation_cache
from experiments.common.cli import INTERRUPTED_STATUS, PREEMPTED_STATUS

PROGRAM = textwrap.dedent(
    """
    import sys
    from experiments.common import cli
    import jax

    def run():
        print("ready", flush=True)
        sys.stdin.readline()
        print(jax.jit(lambda x: x * 2.0 + 1.0)(3.0), flush=True)
        on = jax.config.jax_enable_compilation_cache
        print(jax.config.jax_compilation_cache_dir if on else None, flush=True)

    cli.main(run)
    """
)


COMPILING = textwrap.dedent(
    """
    import signal
    # As in a terminal: what a shell runs in the background ignores it.
    signal.signal(signal.SIGINT, signal.default_int_handler)

    from experiments.common import cli
    import jax
    import jax.numpy as jnp

    def unrolled(x):
        for step in range(400):
            x = jnp.sin(x) @ x + step
        return x

    def run():
        lowered = jax.jit(unrolled).lower(jnp.ones((8, 8)))
        print("ready", flush=True)
        lowered.compile()
        print("compiled", flush=True)

    cli.main(run, cache=False)
    """
)


def _start(*arguments, program=PROGRAM, **given):
    environment = os.environ | {"XLA_FLAGS": "", "JAX_COMPILATION_CACHE_DIR": ""}
    return subprocess.Popen(
        [sys.executable, "-c", program, *arguments],
        cwd=ablation_process.ROOT,
        env=environment | given,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_run_told_to_end_has_a_status_of_its_own_and_goes_on(tmp_path):
    (tmp_path / "config.py").write_text(
        ablation_process.CONFIG.replace("num_steps = 8", "num_steps = 400")
        .replace("evaluate_every = 3", "evaluate_every = 1000")
        .replace("save_every = 2", "save_every = 1000")
    )
    workdir, config = tmp_path / "run", f"--config={tmp_path / 'config.py'}"
    process = ablation_process.start(workdir, config)
    try:
        rows = 0
        while rows < 4 and process.poll() is None:
            time.sleep(0.01)
            for path in workdir.glob("arms/adamw/*/*/metrics.jsonl"):
                rows = path.read_bytes().count(b"\n")
        process.send_signal(signal.SIGTERM)
        status = process.wait(timeout=120)
    finally:
        process.kill()
    log = workdir.with_suffix(".log").read_text()
    assert status == PREEMPTED_STATUS == 75, log
    assert "Start the same again" in log
    assert "Traceback" not in log
    (states,) = workdir.glob("arms/adamw/*/*/checkpoints/states")
    (saved,) = states.iterdir()
    assert 0 < int(saved.name) < 400
    timing = (states.parent.parent / "timing.jsonl").read_text().splitlines()
    row = json.loads(timing[-1])
    assert row["tokens_per_s"] > 0
    assert row["model_flops_per_s"] > row["tokens_per_s"]
    assert "model_flops_utilisation" not in row  # A CPU has no peak in the table.


@pytest.mark.parametrize(
    ("module", "message"),
    [
        ("training_regimes", "2 processes train over one mesh of all their devices"),
        ("optimizer_ablation", "2 processes train over one mesh of all their devices"),
        (
            "optimizer_ablation --config.mesh=data=16",
            "mesh 'data=16' has 16 places for 8 devices",
        ),
    ],
)
def test_training_that_needs_another_start_is_refused_before_anything_is_made(
    tmp_path, module, message
):
    workdir = tmp_path / "run"
    command = ["-m", *f"experiments.{module}".split(), f"--workdir={workdir}"]
    ended = host_processes.end(host_processes.start(command, 2))
    for process in ended:
        assert process.status == 1, process.output
        assert message in process.output
    assert not workdir.exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("said", "message"),
    [((2, 3), "different num_processes: [2, 3]"), ((2,), "waited 5 s at localhost")],
    ids=["unequal", "one missing"],
)
def test_training_whose_processes_do_not_find_each_other_says_so(
    tmp_path, said, message
):
    workdir = tmp_path / "run"
    command = ["-m", "experiments.optimizer_ablation", f"--workdir={workdir}"]
    if len(said) == 1:
        command.append("--start_timeout_s=5")
    ended = host_processes.end(host_processes.start(command, len(said), said=said))
    for process in ended:
        assert process.status == 1, process.output
        assert message in process.output
    assert not workdir.exists()


@pytest.mark.parametrize(
    ("module", "flags"),
    [
        ("trajectory", ["--source=a", "--checkpoints=b", "--workdir=gs://bucket/run"]),
        ("mask_overlap", ["--source=a", "--a=b", "--b=c", "--workdir=gs://bucket/run"]),
        ("tiny_world", ["--output=gs://bucket/run"]),
    ],
)
def test_an_address_is_no_folder_to_write_in(tmp_path, module, flags):
    done = subprocess.run(
        [sys.executable, "-m", f"experiments.{module}", *flags],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ablation_process.ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert "gs://bucket/run is an address" in done.stderr
    assert not list(tmp_path.iterdir())


def test_a_process_told_to_end_outside_of_training_says_so():
    process = _start()
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == PREEMPTED_STATUS, errors
    assert errors.startswith("preempted: told to end outside of training")


@pytest.mark.parametrize(
    ("number", "status", "said"),
    [
        (signal.SIGTERM, PREEMPTED_STATUS, "preempted: told to end"),
        (signal.SIGINT, INTERRUPTED_STATUS, "interrupted: start"),
    ],
)
def test_a_process_told_to_end_while_it_compiles_ends_well(number, status, said):
    process = _start(program=COMPILING)
    try:
        assert process.stdout.readline() == "ready\n"
        time.sleep(0.3)  # Compiling takes some seconds.
        process.send_signal(number)
        output, errors = process.communicate(timeout=120)
    finally:
        process.kill()
    assert output == ""
    assert process.returncode == status, errors
    assert errors.startswith(said)
    assert errors.count("\n") == 1


def test_an_interrupted_process_whose_reader_has_gone_ends_well():
    """As in a pipe: Ctrl-C ends what reads it, too."""
    with _start(program=COMPILING) as process:
        try:
            assert process.stdout.readline() == "ready\n"
            time.sleep(0.3)
            process.stderr.close()
            process.send_signal(signal.SIGINT)
            assert process.wait(timeout=120) == INTERRUPTED_STATUS
        finally:
            process.kill()


@pytest.mark.parametrize(
    ("arguments", "environment", "expected"),
    [
        (["--compilation_cache={}/mine"], {}, "{}/mine"),
        ([], {"XDG_CACHE_HOME": "{}/cache"}, "{}/cache/geomjax/"),
        ([], {"JAX_COMPILATION_CACHE_DIR": "{}/theirs"}, "{}/theirs"),
        (["--compilation_cache="], {"XDG_CACHE_HOME": "{}/cache"}, "None"),
    ],
    ids=["flag", "default", "variable", "off"],
)
def test_compiled_programs_are_kept_where_they_should(
    tmp_path, arguments, environment, expected
):
    given = {name: value.format(tmp_path) for name, value in environment.items()}
    process = _start(
        *[argument.format(tmp_path) for argument in arguments],
        JAX_ENABLE_COMPILATION_CACHE="true",
        JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0",
        **given,
    )
    output, errors = process.communicate("\n", timeout=120)
    assert process.returncode == 0, errors
    _, value, folder = output.split()
    assert float(value) == 7.0
    assert folder.startswith(expected.format(tmp_path))
    assert bool(list(tmp_path.rglob("*-cache"))) == (expected != "None")


def test_the_limit_of_what_is_kept_is_ours_unless_a_variable_has_one(
    monkeypatch, tmp_path
):
    limit, folder = compilation_cache._LIMIT, "jax_compilation_cache_dir"
    monkeypatch.setitem(jax.config.values, "jax_enable_compilation_cache", True)
    before = {name: jax.config.values[name] for name in (limit, folder)}
    try:
        jax.config.update(limit, 1.0)
        monkeypatch.setenv(compilation_cache._LIMIT_VARIABLE, "1.0")
        compilation_cache.enable(str(tmp_path))
        assert jax.config.values[limit] == 1.0
        monkeypatch.delenv(compilation_cache._LIMIT_VARIABLE)
        compilation_cache.enable(str(tmp_path))
        assert jax.config.values[limit] == compilation_cache.KEPT_S
    finally:
        for name, value in before.items():
            jax.config.update(name, value)


def test_the_default_folder_is_one_of_version_and_processor(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    ours = compilation_cache.default_folder()
    assert ours == compilation_cache.default_folder()
    monkeypatch.setattr(compilation_cache, "_processor", lambda: "other")
    assert compilation_cache.default_folder() != ours
