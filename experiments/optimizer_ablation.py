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

Deviations from P1: the tiny world's size; masks by density rather than by the threshold
1e-5 on weights as stored; everything in configs/optimizer_ablation.py that is marked as
ours, such as the float32 compute, of which P1 says nothing. A run that was interrupted
continues when it is started again.

On several hosts the same command runs on each, with `--config.mesh` over all devices
and a workdir and inputs that all of them see. All train, sample and evaluate; process 0
judges completions, writes, and measures the updates while the others wait.
"""

import dataclasses
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import ml_collections
import numpy as np
from absl import flags
from ml_collections import config_flags
from tqdm import tqdm

from experiments.ablation import claims as claims_module
from experiments.ablation import rates
from experiments.ablation.arms import Arm, check_settings, read_arms
from experiments.ablation.report import ArmResult, print_table, write
from experiments.ablation.runner import FREE, Runner
from experiments.common import cli
from experiments.common import workdir as workdirs
from experiments.common.arm_geometry import ArmGeometry, measure_arm
from experiments.common.environment import command, environment
from experiments.common.outcome import FINISHED, Outcome
from experiments.common.prompts import open_judge, write_unusable
from experiments.common.provenance import record_start
from experiments.common.tracking import load_tracker
from experiments.common.world import World, load_world, locate
from geomjax import hosts
from geomjax.analysis.journal import write_atomically
from geomjax.data.chat import describe_first
from geomjax.models.load import export
from geomjax.rewards.judge import Judge
from geomjax.train.errors import NonFiniteError

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
    values, workdir = flags.FLAGS, Path(flags.FLAGS.workdir)
    with workdirs.locked(workdir):
        config = workdirs.claim(workdir, values.config, resume=values.resume, free=FREE)
        run(config, workdir)


def run(config: ml_collections.ConfigDict, workdir: Path) -> dict[str, Any]:
    """Runs all arms, measures them, and writes results and report.

    Args:
      config: As `configs/optimizer_ablation.py` makes it.
      workdir: Folder of this configuration.

    Returns:
      What `results.json` holds.
    """
    check_settings(config)
    load_tracker(config.tracker)
    arms = read_arms(config)
    with open_judge(config) as judge:
        return _run(config, workdir, arms, judge)


def _run(
    config: ml_collections.ConfigDict, workdir: Path, arms: list[Arm], judge: Judge
) -> dict[str, Any]:
    started = time.monotonic()
    world = load_world(config, judge)
    runner = Runner(config, world, workdir, judge)
    runner.check(arms)
    workdir.mkdir(parents=True, exist_ok=True)
    student, teacher, _ = locate(config)
    workdirs.claim_inputs(
        workdir,
        {"student": student, "teacher": teacher},
        {"prompts": world.prompts.fingerprint},
    )
    record_start(workdir, "optimizer_ablation")
    write_unusable(workdir, world.prompts)
    teacher_accuracy = _prepare(config, world, runner)
    skipped = {arm.name: why for arm in arms if (why := runner.skip_reason(arm))}
    arms = [arm for arm in arms if arm.name not in skipped]
    before = hosts.on_main(lambda: _recorded_seconds(workdir))
    outcomes, sweep = _run_arms(config, runner, arms)
    anchor = hosts.fetch(world.student.params)
    world = world._replace(student=dataclasses.replace(world.student, params=anchor))
    found = _Found(
        outcomes,
        sweep,
        skipped,
        teacher_accuracy,
        judge.notes(),
        runner.compilations(),
    )
    return hosts.on_main(
        lambda: _conclude(config, world, workdir, found, before, started)
    )


class _Found(NamedTuple):
    """What training has given: reported runs by arm, and what to say of the rest."""

    outcomes: dict[str, list[Outcome]]
    sweep: dict[str, list[dict[str, Any]]]
    skipped: dict[str, str]
    teacher_accuracy: float | None
    notes: list[str]
    compilations: dict[str, int]


def _conclude(
    config: ml_collections.ConfigDict,
    world: World,
    workdir: Path,
    found: _Found,
    before: float,
    started: float,
) -> dict[str, Any]:
    """Measures and exports the runs, and writes all results; in process 0 alone."""
    outcomes = found.outcomes
    geometry = _measure(world, outcomes)
    for name, runs in outcomes.items():
        _export(config, world, workdir / "arms" / name, runs[0])
    results = {name: ArmResult(runs, geometry[name]) for name, runs in outcomes.items()}
    claims = claims_module.compute(
        {
            name: claims_module.ArmAccuracy(*result.accuracy_start_and_late())
            for name, result in results.items()
            if config.accuracy
        }
    )
    record = {
        "arms": {name: result.record() for name, result in results.items()},
        "skipped": found.skipped,
        "claims": [claim._asdict() for claim in claims],
        "sweep": found.sweep,
        "compilations": found.compilations,
        "wall_s": _wall_time(workdir, before + time.monotonic() - started),
        "config": workdirs.resolved(config),
        "environment": environment(),
    }
    text = json.dumps(record, indent=2) + "\n"
    write_atomically(workdir / "results.json", text)
    _join_metrics(workdir / "metrics.jsonl", outcomes)
    files = write(workdir, results, record, claims, command(), found.teacher_accuracy)
    print_table(results, claims)
    for note in found.notes:
        print(note)
    for name, why in found.skipped.items():
        print(f"skipped {name}: {why}")
    print(f"\nreport: {files.page}")
    return record


def _prepare(
    config: ml_collections.ConfigDict, world: World, runner: Runner
) -> float | None:
    """Says what a person should know before hours are spent; the teacher's accuracy."""
    print("\n".join(world.prompts.notes), end="\n" if world.prompts.notes else "")
    print(describe_first(world.train, world.tokenizer))
    if not config.accuracy:
        return None
    accuracy = runner.teacher_accuracy()
    if accuracy == 0:
        print(
            "warning: the teacher scores 0 on all test prompts by the reward "
            f"{config.reward.name!r} (`exact` is whole-string equality with `answer`); "
            "--config.reward.name takes another, and --config.accuracy=False compares "
            "divergences alone"
        )
    return accuracy


def _run_arms(
    config: ml_collections.ConfigDict, runner: Runner, arms: list[Arm]
) -> tuple[dict[str, list[Outcome]], dict[str, list[dict[str, Any]]]]:
    """The reported runs of each arm, one a seed, at its best rate; and all rates."""
    total = sum(len(arm.learning_rates) for arm in arms) * len(config.seeds)
    reported: dict[str, list[Outcome]] = {}
    sweep = {}
    with tqdm(
        total=total * config.num_steps,
        unit="step",
        smoothing=0.05,
        disable=not hosts.is_main(),
    ) as bar:
        for arm in arms:
            own = {outcome.seed: outcome for outcome in reported.get("adamw", [])}
            tried = [
                run_rate(config, runner, arm, r, own, bar) for r in arm.learning_rates
            ]
            chosen = rates.choose(arm.name, tried, accuracy=config.accuracy)
            sweep[arm.name] = rates.record(tried, chosen)
            if rates.at_edge(tried, chosen):
                bar.write(
                    f"{arm.name}: its best learning rate, {chosen.learning_rate:g}, is "
                    "at the edge of those tried"
                )
            for rate in tried:
                for outcome in rate.runs if rate is not chosen else ():
                    outcome.drop_params()
            reported[arm.name] = chosen.runs
    return reported, sweep


def run_rate(
    config: ml_collections.ConfigDict,
    runner: Runner,
    arm: Arm,
    learning_rate: float,
    own: dict[int, Outcome],
    bar: tqdm,
) -> rates.Rate:
    """All seeds at one rate. One that diverges ends the rate, not a sweep."""
    start, runs = bar.n, []
    for i, seed in enumerate(config.seeds):
        bar.set_description(f"{arm.name} lr {learning_rate:g} seed {seed}")
        try:
            runs.append(
                runner.run(arm, learning_rate, seed, own.get(seed), _progress(bar))
            )
        except NonFiniteError as error:
            if len(arm.learning_rates) == 1:
                raise
            bar.write(f"{arm.name} diverged at learning rate {learning_rate:g}")
            bar.update(start + len(config.seeds) * config.num_steps - bar.n)
            return rates.Rate(learning_rate, [], str(error))
        bar.update(start + (i + 1) * config.num_steps - bar.n)
    return rates.Rate(learning_rate, runs)


def _progress(bar: tqdm) -> Callable[[int, dict[str, float]], None]:
    """Moves the bar along one run, which may start at any step."""
    base = bar.n

    def on_step(step: int, values: dict[str, float]) -> None:
        if values:
            bar.set_postfix(loss=f"{values['loss']:.3f}", refresh=False)
        bar.update(base + step - bar.n)

    return on_step


def _measure(
    world: World, outcomes: dict[str, list[Outcome]]
) -> dict[str, ArmGeometry]:
    config = world.student.model.config
    progress = tqdm(outcomes.items(), desc="geometry", unit="arm")
    return {
        name: measure_arm(world.student, (run.params(config) for run in runs))
        for name, runs in progress
    }


def _export(
    config: ml_collections.ConfigDict, world: World, folder: Path, outcome: Outcome
) -> None:
    """Exports the first seed's student, and its masters on request."""
    model, like = world.student.model, world.student_dir
    params = outcome.params(model.config)
    export(folder / "checkpoint", params, model, like=like)
    if config.export_masters:
        export(folder / "masters", params, model, like=like, dtype=np.float32)
    saved = outcome.directory / "mask.safetensors"
    if saved.exists():
        shutil.copyfile(saved, folder / "mask.safetensors")


def _recorded_seconds(workdir: Path) -> float:
    """Training time of the runs that earlier processes finished."""
    paths = (workdir / "arms").glob(f"*/*/*/{FINISHED}")
    return sum(json.loads(path.read_text())["seconds"] for path in paths)


def _wall_time(workdir: Path, seconds: float) -> float:
    """Seconds over all processes, or those recorded by the one that ended the run."""
    path = workdir / "results.json"
    if path.exists():
        return json.loads(path.read_text())["wall_s"]
    return round(seconds, 1)


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
    cli.main(main, define_flags, shared=True)
