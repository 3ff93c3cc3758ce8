"""Does OPD's update stay what it is with other teachers, students, tasks and seeds?

Distils on-policy with the same settings in several worlds, and sets sparsity and
geometry side by side: a larger teacher, a larger student, another task (P2, arXiv
2606.07082, Tables 1 and 7), and the spread over seeds, of which P2 prints no numbers.

    python -m experiments.opd_variants --workdir=runs/variants

Every world has a folder of its own in the workdir, as its models share no compiled
program with the others'. An interrupted run continues when it is started again.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import ml_collections

from configs import tiny_world
from experiments.common import workdir as workdirs
from experiments.common.kept import recipe_digest
from experiments.common.provenance import record_start
from experiments.common.tracking import load_tracker
from experiments.common.world import TINY_WORLD, locate
from experiments.studies.arms import arm_runs, train_arms
from experiments.studies.begin import begin
from experiments.studies.launch import launch
from experiments.studies.measured import Measured, measure_runs
from experiments.studies.report import write_results
from experiments.studies.settings import base_folder, check_settings
from experiments.studies.study import Start
from experiments.studies.verdict import Side, Spread, Verdict, differences
from experiments.studies.worlds import in_world, shared_folder
from experiments.tiny_world import world_folder
from geomjax import hosts
from geomjax.analysis.report import Cell, Column, Estimate, Table

NAME = "opd_variants"
REFERENCE = "opd"
UNCHANGED = "bf16_unchanged_fraction"
FIELDS = ("world", "base", "student", "teacher", "prompts")
TEACHER_POINTS, TASK_POINTS, SEED_POINTS = 0.05, 0.1, 0.02
"""Shares of weights by which arms may differ and still count as alike. P2's teachers of
8B to 32B span 1.4 points, its code run lies 5.5 from mathematics."""
PAPER = {
    "opd": 0.503,  # 4B from 8B
    "large_teacher": 0.517,  # 4B from 32B
    "large_student": 0.566,  # 14B from 32B
    "other_task": 0.571,  # 8B from 32B on code, 0.516 on mathematics
    "moe_teacher": 0.486,  # 8B from 30B-A3B
}
"""P2, Table 1: share of weights unchanged in bfloat16."""


class Sizes(NamedTuple):
    """Parameters of an arm's models."""

    student: int
    teacher: int


class Finished(NamedTuple):
    """What the report says of how it was run.

    Attributes:
      config: Of all arms.
      workdir: Their folder.
      counts: Of compilations, by arm and program.
      trained: How long each arm's runs trained, in seconds.
    """

    config: ml_collections.ConfigDict
    workdir: Path
    counts: dict[str, int]
    trained: list[float]

    def compilations(self) -> dict[str, int]:
        """How often each program was compiled."""
        return self.counts

    def seconds(self) -> float:
        """How long all runs trained."""
        return sum(self.trained)


def run(config: ml_collections.ConfigDict, workdir: Path) -> dict[str, Any]:
    """Runs all arms, measures them, and writes results and report."""
    check_settings(config)
    load_tracker(config.tracker)
    parts = {name: of_arm(config, name) for name in config.arms}
    workdir.mkdir(parents=True, exist_ok=True)
    workdirs.claim_inputs(workdir, _folders(parts), recipes(config))
    record_start(workdir, NAME)
    return _run(config, parts, workdir)


def of_arm(config: ml_collections.ConfigDict, name: str) -> ml_collections.ConfigDict:
    """The configuration of one arm: of its own world, with its own teacher."""
    arm = config.arms[name]
    found = config.copy_and_resolve_references()
    found.arms = {name: arm.to_dict()}
    for field in FIELDS:
        found[field] = arm[field]
    if arm.teacher_world != arm.world and not arm.teacher:
        world = TINY_WORLD
        if arm.teacher_world:
            world = shared_folder(lambda: world_folder(arm.teacher_world))
        found.teacher = str(world / "teacher")
    return found


def recipes(config: ml_collections.ConfigDict) -> dict[str, str]:
    """What the worlds are built by that some arm names, as inputs of the study."""
    arms = config.arms.values()
    named = {world for arm in arms for world in (arm.world, arm.teacher_world)}
    return {
        f"world {world}": recipe_digest(tiny_world.get_config(world))
        for world in sorted(named - {""})
    }


def _folders(parts: dict[str, ml_collections.ConfigDict]) -> dict[str, Path]:
    """What all arms read, by arm and role."""
    found = {}
    for name, part in parts.items():
        placed = in_world(part)
        student, teacher, _ = locate(placed)
        found[f"{name}: student"], found[f"{name}: teacher"] = student, teacher
        found[f"{name}: base"] = base_folder(placed)
    return found


def _run(
    config: ml_collections.ConfigDict,
    parts: dict[str, ml_collections.ConfigDict],
    workdir: Path,
) -> dict[str, Any]:
    done = {name: _run_arm(part, name, workdir) for name, part in parts.items()}
    return hosts.on_main(lambda: _conclude(config, workdir, done))


class Done(NamedTuple):
    """An arm whose runs have ended.

    Attributes:
      measured: Its runs, measured in process 0; no entry in the others.
      sizes: Parameters of its models.
      counts: Of compilations, by program.
      seconds: How long its runs trained.
    """

    measured: list[Measured]
    sizes: Sizes
    counts: dict[str, int]
    seconds: float


def _run_arm(part: ml_collections.ConfigDict, name: str, workdir: Path) -> Done:
    with begin(part, workdir / name, NAME) as (study, origins):
        origin = origins[part.arms[name].start]
        outcomes = train_arms(study, arm_runs(part), {name: Start(origin)})
        measured: list[Measured] = []
        # Before the next arm's models are loaded.
        hosts.on_main(
            lambda: measured.append(measure_runs(study, origin, outcomes[name]))
        )
        models = (study.world.student, study.world.teacher)
        sizes = Sizes(*(_count(model.params) for model in models))
        return Done(measured, sizes, study.compilations(), study.seconds())


def _conclude(
    config: ml_collections.ConfigDict, workdir: Path, done: dict[str, Done]
) -> dict[str, Any]:
    """Writes all results; in process 0 alone."""
    arms = {name: arm.measured[0] for name, arm in done.items()}
    sizes = {name: arm.sizes for name, arm in done.items()}
    counts = {f"{n}: {k}": c for n, arm in done.items() for k, c in arm.counts.items()}
    trained = [arm.seconds for arm in done.values()]
    return write_results(
        Finished(config, workdir, counts, trained),
        arms,
        claims(arms),
        "Variants of on-policy distillation",
        "One objective and one rate, with a larger teacher, a larger student and "
        "another task: how much of the update's shape is OPD's, and how much is the "
        "pair's?",
        {"Beside the paper": [variants_table(arms, sizes)]},
        {"sizes": {name: found._asdict() for name, found in sizes.items()}},
    )


def _count(params: Any) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def variants_table(arms: dict[str, Measured], sizes: dict[str, Sizes]) -> Table:
    """Sparsity and geometry of each arm, with P2's sparsity."""
    columns = [
        Column("arm", align="left"),
        Column("student (M)", spec=".2f"),
        Column("teacher (M)", spec=".2f"),
        Column("unchanged in bfloat16", spec=".1%"),
        Column("P2's", spec=".1%"),
        Column("relative norm", spec=".2e"),
        Column("stable rank", spec=".1f"),
        Column("top-16 energy", spec=".1%"),
        Column("gain in accuracy", spec=".1%"),
    ]
    rows: list[list[Cell]] = []
    for name, arm in arms.items():
        samples: tuple[Sequence[float | None], ...] = (
            arm.value("relative_frobenius", "master"),
            arm.median("stable_rank", "master"),
            arm.median("top_energy_16", "master"),
            arm.gain(),
        )
        rows.append(
            [
                name,
                *(count / 1e6 for count in sizes[name]),
                Estimate.from_samples(arm.value(UNCHANGED)),
                PAPER.get(name),
                *map(Estimate.from_samples, samples),
            ]
        )
    return Table(
        columns,
        rows,
        "Means over seeds ± 95 % Student half widths; spectra are medians over "
        "matrices, of the masters' update. P2's column is its Table 1: a 4B student of "
        "8B and 32B teachers, a 14B student, and code instead of mathematics, at 1e-6. "
        "Of the tiny worlds' teachers the larger is the worse one: it solves 61 % of "
        "its test problems, the bundled one 98.6 %, so that they differ in skill too.",
    )


def claims(arms: dict[str, Measured]) -> list[Verdict | Spread]:
    """What P2's tables say of teachers, students and tasks; how far seeds differ."""
    found: list[Verdict] = []

    def test(
        claim: str, source: str, statistic: str, side: Side, bound: float, samples: Any
    ) -> None:
        found.append(Verdict(claim, source, statistic, side, bound, tuple(samples)))

    def apart(first: str, second: str) -> list[float | None]:
        pairs = differences(arms[first].value(UNCHANGED), arms[second].value(UNCHANGED))
        return [None if d is None else abs(d) for d in pairs]

    shown = "share unchanged in bfloat16"
    source = "P2, Tables 1 and 7"
    if "large_teacher" in arms:
        test(
            "The teacher's size hardly changes the sparsity of OPD's update",
            source,
            f"{shown}, distance of the two teachers, which differ in skill too",
            "below",
            TEACHER_POINTS,
            apart("large_teacher", REFERENCE),
        )
    if {"large_teacher", "large_student"} <= arms.keys():
        test(
            "Of one teacher, the larger student's update is sparser",
            source,
            f"{shown}, large student less small one",
            "above",
            0.0,
            differences(
                arms["large_student"].value(UNCHANGED),
                arms["large_teacher"].value(UNCHANGED),
            ),
        )
    if "other_task" in arms:
        test(
            "On another task OPD's update is about as sparse",
            source,
            f"{shown}, distance of the two tasks",
            "below",
            TASK_POINTS,
            apart("other_task", REFERENCE),
        )
    agreement = Spread(
        "Seeds agree on the sparsity of OPD's update",
        "P2, Table 7, without numbers",
        shown,
        SEED_POINTS,
        tuple(arms[REFERENCE].value(UNCHANGED)),
    )
    return [*found, agreement]


if __name__ == "__main__":
    launch(NAME, run)
