"""The optimizer ablation as a process of its own, made small, to be killed."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import configs

ROOT = Path(configs.__file__).parent.parent
MODULE = "experiments.optimizer_ablation"

CONFIG = """
from configs import optimizer_ablation

def get_config():
    config = optimizer_ablation.get_config("smoke")
    config.arms = {
        name: config.arms[name] for name in ("adamw", "adamw_opd_mask")
    }
    config.num_steps = 8
    config.evaluate_every = 3
    config.save_every = 2
    config.prompts_per_step = 8
    config.samples_per_prompt = 2
    config.evaluation_batch = 32
    config.validation_fraction = 0.004
    config.test_fraction = 0.004
    config.export_masters = True
    return config
"""


def start(
    workdir: Path,
    *arguments: str,
    cache: Path | None = None,
) -> subprocess.Popen:
    """Starts the experiment; its output goes to `WORKDIR.log`."""
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    if cache is not None:
        environment |= {
            "JAX_ENABLE_COMPILATION_CACHE": "true",
            "JAX_COMPILATION_CACHE_DIR": str(cache),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        }
    with workdir.with_suffix(".log").open("a") as log:
        return subprocess.Popen(
            [sys.executable, "-m", MODULE, f"--workdir={workdir}", *arguments],
            cwd=ROOT,
            env=environment,
            stdout=log,
            stderr=log,
        )


def run(workdir: Path, *arguments: str, **options: Any) -> tuple[int, str]:
    """Runs the experiment to its end; its status and all that it wrote."""
    process = start(workdir, *arguments, **options)
    try:
        status = process.wait(timeout=1200)
    finally:
        process.kill()
    return status, workdir.with_suffix(".log").read_text()
