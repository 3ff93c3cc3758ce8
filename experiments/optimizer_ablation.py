"""On-policy distillation with AdamW, SGD and subnetwork masks: which weights matter?

Distils a teacher into a student six ways from one anchor, with the same prompts and
seeds: with AdamW, with SGD, and with AdamW on 17.5 % of the coordinates, chosen by what
the AdamW run itself moved, by where the teacher differs most, or at random. Measures
accuracy and the geometry of each update, and tests the claims of P1 (arXiv 2606.13657).

    python -m experiments.optimizer_ablation --workdir=runs/ablation

The same on other Qwen3 checkpoints, with prompts as JSON lines {"prompt", "answer"}:

    python -m experiments.optimizer_ablation --workdir=runs/mine \
        --config.student=DIR --config.teacher=DIR --config.prompts=FILE.jsonl \
        --config.max_prompt_tokens=1024 --config.max_new_tokens=2048

Deviations from P1: the tiny world's size; float32 instead of bfloat16 compute; masks by
density rather than by the threshold 1e-5; everything in configs/optimizer_ablation.py
that is marked as ours. A run that was interrupted continues when it is started again.
"""

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_collections
import numpy as np
from absl import flags
from ml_collections import config_flags
from tqdm import tqdm

from experiments.ablation import claims as claims_module
from experiments.ablation.arms import (
    Arm,
    Outcome,
    Runner,
    check_settings,
    density,
    read_arms,
)
from experiments.ablation.geometry import ArmGeometry, measure_arm
from experiments.ablation.report import ArmResult, print_table, write
from experiments.common import cli
from experiments.common import workdir as workdirs
from experiments.common.environment import command, environment
from experiments.common.world import World, load_world
from geomjax.models.load import export

CONFIG = Path(__file__).parent.parent / "configs" / "optimizer_ablation.py"


def define_flags() -> None:
    """Defines the flags; not at import, so that experiments can be imported together.

    Defining `--config` reads the configuration file.
    """
    config_flags.DEFINE_config_file(
        "config", str(CONFIG), "Configuration; FILE:smoke and FILE:sweep are variants."
    )
    flags.DEFINE_string(
        "workdir", "runs/optimizer_ablation", "Folder of results, checkpoints, report."
    )
    flags.DEFINE_bool(
        "resume", False, "Continue the run in --workdir with the configuration it has."
    )


def main() -> None:
    """Runs the experiment that the flags describe."""
    workdir = Path(flags.FLAGS.workdir)
    with workdirs.locked(workdir):
        config = workdirs.claim(workdir, flags.FLAGS.config, resume=flags.FLAGS.resume)
        run(config, workdir)


def run(config: ml_collections.ConfigDict, workdir: Path) -> dict[str, Any]:
    """Runs all arms, measures them, and writes results and report.

    Args:
      config: As `configs/optimizer_ablation.py` makes it.
      workdir: Folder of this configuration.

    Returns:
      What `results.json` holds.
    """
    started = time.monotonic()
    check_settings(config)
    arms = read_arms(config)
    world = load_world(config)
    runner = Runner(config, world, workdir)
    runner.check(arms)
    skipped = {arm.name: why for arm in arms if (why := runner.skip_reason(arm))}
    arms = [arm for arm in arms if arm.name not in skipped]
    outcomes = _run_arms(config, runner, arms)
    geometry = _measure(runner, outcomes)
    for name, runs in outcomes.items():
        _export(config, world, workdir / "arms" / name, runs[0])
    results = {
        name: ArmResult(runs, geometry[name], density(runs[0].mask))
        for name, runs in outcomes.items()
    }
    claims = claims_module.compute(
        {
            name: claims_module.ArmAccuracy(*result.accuracy_start_and_late())
            for name, result in results.items()
            if config.accuracy
        }
    )
    record = {
        "arms": {name: result.record() for name, result in results.items()},
        "skipped": skipped,
        "claims": [claim._asdict() for claim in claims],
        "wall_s": _wall_time(workdir, time.monotonic() - started),
        "config": workdirs.resolved(config),
        "environment": environment(),
    }
    _write_json(workdir / "results.json", record)
    _join_metrics(workdir / "metrics.jsonl", outcomes)
    teacher_accuracy = runner.teacher_accuracy() if config.accuracy else None
    files = write(workdir, results, record, claims, command(), teacher_accuracy)
    print_table(results, claims)
    for name, why in skipped.items():
        print(f"skipped {name}: {why}")
    print(f"\nreport: {files.page}")
    return record


def _run_arms(
    config: ml_collections.ConfigDict, runner: Runner, arms: list[Arm]
) -> dict[str, list[Outcome]]:
    """The reported runs of each arm, one a seed, at its best learning rate."""
    total = sum(len(arm.learning_rates) for arm in arms) * len(config.seeds)
    reported: dict[str, list[Outcome]] = {}
    with tqdm(total=total * config.num_steps, unit="step", smoothing=0.05) as bar:
        for arm in arms:
            own = {outcome.seed: outcome for outcome in reported.get("adamw", [])}
            by_rate = []
            for rate in arm.learning_rates:
                runs = []
                for seed in config.seeds:
                    bar.set_description(f"{arm.name} lr {rate:g} seed {seed}")
                    on_step = _progress(bar)
                    runs.append(runner.run(arm, rate, seed, own.get(seed), on_step))
                    on_step(config.num_steps, {})
                by_rate.append(runs)
            reported[arm.name] = _best(by_rate, config.accuracy)
    return reported


def _progress(bar: tqdm) -> Callable[[int, dict[str, float]], None]:
    """Moves the bar along one run, which may start at any step."""
    base = bar.n

    def on_step(step: int, values: dict[str, float]) -> None:
        if values:
            bar.set_postfix(loss=f"{values['loss']:.3f}", refresh=False)
        bar.update(base + step - bar.n)

    return on_step


def _best(by_rate: list[list[Outcome]], accuracy: bool) -> list[Outcome]:
    """The runs at the learning rate that is best on the validation split.

    By the mean final accuracy over seeds, or the divergence where there are no answers.
    """

    def quality(runs: list[Outcome]) -> float:
        if accuracy:
            return float(
                np.mean([run.curve("validation_accuracy")[-1] for run in runs])
            )
        return -float(np.mean([run.curve("validation_reverse_kl")[-1] for run in runs]))

    return max(by_rate, key=quality)


def _measure(
    runner: Runner, outcomes: dict[str, list[Outcome]]
) -> dict[str, ArmGeometry]:
    world = runner.world
    progress = tqdm(outcomes.items(), desc="geometry", unit="arm")
    return {
        name: measure_arm(world.student, [run.params for run in runs])
        for name, runs in progress
    }


def _export(
    config: ml_collections.ConfigDict, world: World, folder: Path, outcome: Outcome
) -> None:
    """Exports the first seed's student, and its masters on request."""
    model, like = world.student.model, world.student_dir
    export(folder / "checkpoint", outcome.params, model, like=like)
    if config.export_masters:
        masters = folder / "masters"
        export(masters, outcome.params, model, like=like, dtype=np.float32)
    if outcome.mask is not None:
        saved = outcome.directory / "mask.safetensors"
        shutil.copyfile(saved, folder / "mask.safetensors")


def _wall_time(workdir: Path, seconds: float) -> float:
    """Wall time of this process, or that recorded by the one that finished the run."""
    path = workdir / "results.json"
    if path.exists():
        return json.loads(path.read_text())["wall_s"]
    return round(seconds, 1)


def _write_json(path: Path, record: dict[str, Any]) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(record, indent=2) + "\n")
    temporary.replace(path)


def _join_metrics(path: Path, outcomes: dict[str, list[Outcome]]) -> None:
    """All rows of the reported runs in one file, each with its arm and seed."""
    temporary = path.with_suffix(".tmp")
    with temporary.open("w") as file:
        for name, runs in outcomes.items():
            for outcome in runs:
                place = {
                    "arm": name,
                    "learning_rate": outcome.learning_rate,
                    "seed": outcome.seed,
                }
                for row in outcome.rows:
                    file.write(json.dumps(place | row) + "\n")
    temporary.replace(path)


if __name__ == "__main__":
    cli.main(main, define_flags)
