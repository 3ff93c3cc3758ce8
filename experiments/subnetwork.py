"""Which coordinates does training need, and do trainings agree on them?

Trains OPD in full, RLVR, and OPD by another teacher, compares the coordinates that they
move (P1, arXiv 2606.13657, Table 4), and then trains OPD again on a share of the
coordinates alone (P1, Figures 3 and 7): those that its own full run moved most, those
of RLVR, of the other teacher, of another seed, random ones, random ones with the own
mask's share of every tensor, and those predicted before any training from the source's
weights. Accuracy and divergence from the teacher against density, and how many
parameters end equal to full training's (arXiv 2505.11711), for which RLVR's own
subnetwork is trained too.

    python -m experiments.subnetwork --workdir=runs/subnetwork

Differs from P1 in that masks are compared at one density rather than one threshold, so
that it is their choice of coordinates that differs. P1's threshold on stored weights is
what its Table 4 is redone with. An interrupted run continues when it is started again.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_collections

from configs import tiny_world as recipe
from experiments.common.kept import recipe_digest
from experiments.common.outcome import Outcome
from experiments.studies import subnetwork_report as shown
from experiments.studies import worlds
from experiments.studies.arms import run_bar
from experiments.studies.begin import begin
from experiments.studies.beside import PAPERS, VISION_PAPERS, beside_table
from experiments.studies.launch import launch
from experiments.studies.masks import (
    RULES,
    Masks,
    agreement,
    compare_masks,
    compare_supports,
    keep_mask,
    kept_mask,
    mask_of_file,
    mask_path,
    stored_source,
)
from experiments.studies.measured import measure_runs
from experiments.studies.report import write_results
from experiments.studies.run import Run
from experiments.studies.study import Start, Study
from experiments.studies.subnetwork_claims import claims
from experiments.studies.subnetwork_plan import FULL, NEEDS, Masked, check, plan
from experiments.tiny_world import build_world
from experiments.vision_world import PROMPTS, changed_recipe, world_folder
from geomjax import hosts
from geomjax.data.same_tokenizer import require_same_tokenizer
from geomjax.data.tokenizers import load_tokenizer
from geomjax.models.load import checkpoint_directory, load
from geomjax.typing import Params

NAME = "subnetwork"
SHOWN = ("own", "rlvr", "random")
"""The masks of P1, whose runs have their geometry measured and curves drawn."""

VISION = "vision"
"""The `world` of `experiments.vision_world`, beside those of `configs.tiny_world`."""


def run(config: ml_collections.ConfigDict, workdir: Path) -> dict[str, Any]:
    """Runs all masks, measures them, and writes results and report."""
    check(config)
    extra = further_paths(config), recipes(config)
    with begin(located(config), workdir, NAME, *extra) as (study, origins):
        study.config = config  # As it was given, for the record: without paths.
        return _run(config, study, origins["anchor"])


def located(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """The configuration with the places of the vision-language world, where it asks."""
    if config.world != VISION:
        return config
    changes = config.vision_recipe.to_dict()
    folder = worlds.shared_folder(lambda: world_folder(changes))
    found = config.copy_and_resolve_references()
    places = {
        "student": folder / "anchor",
        "base": folder / "anchor",  # No run starts from it.
        "teacher": folder / "teacher",
        "prompts": folder / PROMPTS,
    }
    for name, place in places.items():
        found[name] = config[name] or str(place)
    return found


def further_paths(config: ml_collections.ConfigDict) -> dict[str, Path]:
    """Files and folders that the study reads beside those of its world."""
    found = {f"mask {rule}": Path(rule) for rule in config.masks if rule not in RULES}
    if "opd_other_teacher" in config.arms and config.other_teacher:
        found["other_teacher"] = checkpoint_directory(config.other_teacher)
    return found


def recipes(config: ml_collections.ConfigDict) -> dict[str, str]:
    """What the study's world and its other teacher are built by, where they are."""
    found = {}
    if config.world != VISION:
        found = worlds.recipes(config)
    elif not all(config[field] for field in worlds.PLACES):
        changed = changed_recipe(config.vision_recipe.to_dict())
        found["world"] = recipe_digest(changed)
    if "opd_other_teacher" in config.arms and not config.other_teacher:
        # The problems that it never sees are those held out: see "prompts".
        found["other_teacher"] = recipe_digest(_other_recipe(config))
    return found


def _other_recipe(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    changed = recipe.get_config()
    changed.update(config.other_recipe)
    return changed


def _run(
    config: ml_collections.ConfigDict, study: Study, anchor: Params
) -> dict[str, Any]:
    masked = plan(config)
    for m in masked:
        if m.density is None:
            mask_of_file(study, m.rule)  # Refused before any work is done.
    fulls = [name for name in FULL if name in config.arms]
    other = other_teacher(config, study) if "opd_other_teacher" in fulls else None
    outcomes: dict[str, list[Outcome]] = {}
    total = (len(fulls) + len(masked)) * len(config.seeds)
    with run_bar(total) as bar:

        def train(run: Run, start: Start) -> None:
            bar.set_description(f"{run.arm} seed {run.seed}")
            outcomes.setdefault(run.arm, []).append(study.train(run, start))
            bar.update()

        for name in fulls:
            teacher = other if name == "opd_other_teacher" else None
            for seed in config.seeds:
                train(_spec(config, name, name, seed), Start(anchor, teacher=teacher))
        del other
        hosts.on_main(lambda: _make_masks(config, study, anchor, masked, outcomes))
        for m in masked:
            for seed in config.seeds:
                spec = _spec(config, m.arm, m.full, seed)
                train(spec, Start(anchor, mask=kept_mask(study, spec)))
    return hosts.on_main(lambda: _conclude(config, study, anchor, masked, outcomes))


def _spec(config: ml_collections.ConfigDict, name: str, full: str, seed: int) -> Run:
    """A run by the settings of a full one."""
    arm = config.arms[full]
    return Run(name, arm.kind, arm.learning_rate, seed)


def _make_masks(
    config: ml_collections.ConfigDict,
    study: Study,
    anchor: Params,
    masked: list[Masked],
    outcomes: dict[str, list[Outcome]],
) -> None:
    """Writes the masks of all masked runs that have none yet.

    In process 0, for all: another machine's rounding may rank coordinates otherwise.
    """
    ends = {name: _ends(study, runs) for name, runs in outcomes.items()}
    sources = _masks_of(study, anchor, ends)
    for seed, of_seed in zip(config.seeds, sources, strict=True):
        for m in masked:
            spec = _spec(config, m.arm, m.full, seed)
            if mask_path(study, spec).exists():
                continue
            mask = (
                mask_of_file(study, m.rule)
                if m.density is None
                else of_seed[m.full].make(m.rule, m.density)
            )
            notes = {"rule": m.rule, "of": m.full, "seed": str(seed)}
            keep_mask(study, spec, mask, notes)


def _conclude(
    config: ml_collections.ConfigDict,
    study: Study,
    anchor: Params,
    masked: list[Masked],
    outcomes: dict[str, list[Outcome]],
) -> dict[str, Any]:
    """Measures the runs and writes all results; in process 0 alone."""
    ends = {n: _ends(study, outcomes[n]) for n in FULL if n in config.arms}
    found = shown.Found(
        outcomes,
        supports(study, anchor, ends),
        _overlaps(study, config, masked),
        _agreements(study, anchor, ends, masked, outcomes),
    )
    return _write(config, study, anchor, masked, found)


def _write(
    config: ml_collections.ConfigDict,
    study: Study,
    anchor: Params,
    masked: list[Masked],
    found: shown.Found,
) -> dict[str, Any]:
    world = VISION if config.world == VISION else ""
    compared = [
        m.arm for m in masked if m.rule in SHOWN and m.density == config.density
    ]
    arms = {
        name: measure_runs(study, anchor, found.outcomes[name])
        for name in (*(n for n in FULL if n in config.arms), *compared)
    }
    curves = {
        rule: {
            m.density: m.arm
            for m in masked
            if m.rule == rule and m.full == "opd" and m.density is not None
        }
        for rule in config.curve_masks
    }
    return write_results(
        study,
        arms,
        claims(config.density, found, world),
        "Subnetworks",
        "Which coordinates does on-policy distillation need? Training on a share of "
        "them, after arXiv 2606.13657, with controls and with masks that are known "
        "before any training.",
        {
            "Density": [
                *([shown.density_plot(found, curves)] if curves else []),
                shown.runs_table(found, world),
            ],
            "Do trainings move the same coordinates?": [
                shown.supports_table(found, world),
                shown.masks_table(found, config.density),
            ],
            "How near to full training": [shown.agreement_table(found)],
            "Geometry, with the papers' numbers": [
                beside_table(
                    {name: arms[name] for name in config.arms},
                    VISION_PAPERS if world else PAPERS,
                )
            ],
        },
        {
            "supports": found.supports,
            "masks": found.masks,
            "agreement": found.agreement,
            "runs": found.record(),
        },
    )


def other_teacher(config: ml_collections.ConfigDict, study: Study) -> Params:
    """Parameters of the other teacher, trained in the workdir where none is given.

    Trained there, by process 0, it sees none of the prompts that the study holds out.

    Raises:
      ValueError: Its tokenizer is not the student's, or its configuration is not the
        teacher's.
    """
    folder = config.other_teacher
    if not folder:
        built = study.workdir / "other_teacher"
        prompts = study.world.prompts
        held_out = (*prompts.validation.examples, *prompts.test.examples)

        def build() -> Path:
            if not (built / "recipe.json").exists():  # Written last.
                texts = {str(example.prompt) for example in held_out}
                build_world(_other_recipe(config), built, texts)
            return built

        worlds.shared_folder(build)
        folder = str(built / "teacher")
    expected = study.world.teacher.model
    directory = checkpoint_directory(folder)
    require_same_tokenizer(study.world.tokenizer, load_tokenizer(directory))
    found = load(
        directory,
        vocab_size=expected.vocab_size,
        dtype=expected.dtype,
        placement=expected.placement,
    )
    if found.model.config != expected.config:
        raise ValueError(
            f"the other teacher {folder} has another configuration than the teacher; "
            "expected one of the same shapes"
        )
    return found.params


def _ends(study: Study, runs: list[Outcome]) -> list[Params]:
    config = study.world.student.model.config
    return [run.params(config) for run in runs]


def _masks_of(
    study: Study, anchor: Params, ends: dict[str, list[Params]]
) -> Iterator[dict[str, Masks]]:
    """Of each seed, what masks are made of, for OPD and for RLVR."""
    opd = ends["opd"]
    for i, seed in enumerate(study.config.seeds):
        after = {"own": opd[i], "other_seed": opd[(i + 1) % len(opd)]}
        after |= {mask: ends[arm][i] for mask, arm in NEEDS.items() if arm in ends}
        of_opd = Masks(study, anchor, after, seed)
        of_rlvr = of_opd._replace(ends={"own": after.get("rlvr", anchor)})
        yield {"opd": of_opd, "rlvr": of_rlvr}


def supports(
    study: Study, anchor: Params, ends: dict[str, list[Params]]
) -> dict[str, list[dict[str, Any]]]:
    """P1's Table 4: overlaps of what full runs moved by more than 1e-5, as stored."""
    source = stored_source(study, anchor)
    after = {
        name: [stored_source(study, params) for params in runs]
        for name, runs in ends.items()
    }
    if len(ends["opd"]) > 1:
        after["opd_other_seed"] = [*after["opd"][1:], after["opd"][0]]
    return {
        pair: [
            compare_supports(source, first, second)
            for first, second in _distinct(
                b, list(zip(after[a], after[b], strict=True))
            )
        ]
        for pair, (a, b) in shown.PAIRS.items()
        if {a, b} <= after.keys()
    }


def _distinct(name: str, pairs: list[Any]) -> list[Any]:
    """Pairs with the next seed, of which two seeds make but one."""
    return pairs[:1] if "other_seed" in name and len(pairs) == 2 else pairs


def _overlaps(
    study: Study, config: ml_collections.ConfigDict, masked: list[Masked]
) -> dict[str, list[dict[str, Any]]]:
    """Overlap of the own mask with every other of its density."""
    own = f"own_{config.density:g}"
    others = [
        m.arm
        for m in masked
        if m.full == "opd" and m.density in (None, config.density) and m.arm != own
    ]
    if own not in (m.arm for m in masked):
        return {}

    def compared(arm: str, seed: int) -> dict[str, Any]:
        masks = (kept_mask(study, _spec(config, a, "opd", seed)) for a in (own, arm))
        return compare_masks(study, *masks)

    return {
        arm: [compared(arm, seed) for seed in _distinct(arm, list(config.seeds))]
        for arm in others
    }


def _agreements(
    study: Study,
    anchor: Params,
    ends: dict[str, list[Params]],
    masked: list[Masked],
    outcomes: dict[str, list[Outcome]],
) -> dict[str, list[dict[str, float]]]:
    """How near every masked run ends to its full one, beside two references."""
    opd = ends["opd"]
    found = {"source, untouched": [agreement(anchor, full, anchor) for full in opd]}
    if len(opd) > 1:
        found["opd, another seed"] = [
            agreement(anchor, full, opd[(i + 1) % len(opd)])
            for i, full in enumerate(opd)
        ]
    for m in masked:
        found[m.arm] = [
            agreement(anchor, full, end)
            for full, end in zip(
                ends[m.full], _ends(study, outcomes[m.arm]), strict=True
            )
        ]
    return found


if __name__ == "__main__":
    launch(NAME, run)
