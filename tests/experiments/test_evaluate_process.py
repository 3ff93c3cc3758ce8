"""`experiments.evaluate` killed with SIGKILL in mid-suite, and started again."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from experiments.common.world import TINY_WORLD

PROBLEMS, SAMPLES, BLOCK = 96, 8, 32


def start(workdir, cache):
    command = [
        sys.executable,
        "-m",
        "experiments.evaluate",
        f"--checkpoint={TINY_WORLD / 'anchor'}",
        f"--compare={TINY_WORLD / 'teacher'}",
        "--suite=tiny-world",
        f"--limit={PROBLEMS}",
        f"--samples={SAMPLES}",
        f"--rows={BLOCK * SAMPLES // 8}",
        "--max_new_tokens=6",
        "--temperature=1",
        "--top_p=1",
        "--resamples=1000",
        "--reward_workers=1",
        f"--workdir={workdir}",
        f"--compilation_cache={cache}",
    ]
    return subprocess.Popen(
        command,
        env=os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def whole_lines(path):
    return path.read_bytes().count(b"\n") if path.exists() else 0


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run, and the cache of its programs."""
    folder = tmp_path_factory.mktemp("evaluate")
    assert start(folder / "whole", folder / "cache").wait(timeout=600) == 0
    return folder / "whole"


@pytest.mark.slow
@pytest.mark.parametrize("model", ["checkpoint", "compare"])
def test_killed_in_mid_suite_it_ends_with_the_same_tables(whole, tmp_path, model):
    killed, cache = tmp_path / "killed", whole.parent / "cache"
    process = start(killed, cache)
    written = killed / model / "tiny-world.jsonl"
    while whole_lines(written) < BLOCK * SAMPLES:
        assert process.poll() is None
        time.sleep(0.002)
    os.killpg(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert whole_lines(written) < PROBLEMS * SAMPLES
    assert not (killed / "results.json").exists()

    assert start(killed, cache).wait(timeout=600) == 0
    names = [f"{m}/tiny-world.jsonl" for m in ("checkpoint", "compare")]
    for name in names:
        assert whole_lines(whole / name) == PROBLEMS * SAMPLES
        assert (killed / name).read_bytes() == (whole / name).read_bytes()
    tables = [
        json.loads((folder / "results.json").read_text()) for folder in (whole, killed)
    ]
    for part in ("suites", "differences", "unparsed_references"):
        assert tables[0][part] == tables[1][part]
    # But for the command, the figures' tables in the report too.
    pages = [(folder / "report.md").read_text() for folder in (whole, killed)]
    rows = [[row for row in page.splitlines() if "|" in row] for page in pages]
    assert len(rows[0]) > 20
    assert rows[0] == rows[1]
