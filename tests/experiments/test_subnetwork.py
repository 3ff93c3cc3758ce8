"""The study of subnetworks: its masks and figures, and a run at its smallest."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from configs import p1_opd
from configs.subnetwork import get_config
from experiments import subnetwork
from experiments.common.outcome import Outcome
from experiments.common.workdir import WorkdirError
from experiments.common.world import TINY_WORLD
from experiments.studies.begin import begin
from experiments.studies.masks import (
    MOVED,
    RULES,
    Masks,
    agreement,
    compare_masks,
    compare_supports,
)
from experiments.studies.settings import check_settings
from experiments.studies.subnetwork_claims import claims
from experiments.studies.subnetwork_report import Found
from geomjax.checkpoints import CheckpointError, DictSource, SafetensorsSource
from geomjax.models import hf
from geomjax.optim.mask_file import load_mask, read_provenance, save_mask


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    config = get_config("smoke")
    workdir = tmp_path_factory.mktemp("subnetwork") / "begun"
    with begin(config, workdir, subnetwork.NAME) as started:
        yield started


@pytest.fixture(scope="module")
def masks(begun):
    """Ends at known distances: each adds noise of its own to the anchor."""
    study, origins = begun

    def end(seed):
        generator = np.random.default_rng(seed)
        return jax.tree.map(
            lambda x: (
                np.asarray(x) + generator.standard_normal(x.shape).astype(np.float32)
            ),
            origins["anchor"],
        )

    ends = {rule: end(i) for i, rule in enumerate(MOVED)}
    return Masks(study, origins["anchor"], ends, seed=3)


def share(mask):
    leaves = jax.tree.leaves(mask)
    return sum(leaf.sum() for leaf in leaves) / sum(leaf.size for leaf in leaves)


@pytest.mark.parametrize("rule", RULES)
def test_masks_have_their_density_and_are_nested(masks, rule):
    sparse, dense = masks.make(rule, 0.05), masks.make(rule, 0.2)
    # Tensors round up: 22 tensors, a coordinate each at most.
    assert share(sparse) == pytest.approx(0.05, abs=1e-3)
    assert share(dense) == pytest.approx(0.2, abs=1e-3)
    within = jax.tree.map(lambda a, b: bool((b | ~a).all()), sparse, dense)
    assert all(jax.tree.leaves(within))
    again = masks.make(rule, 0.05)
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, sparse, again)))


def test_an_update_mask_holds_the_largest_moves(masks):
    mask = masks.make("rlvr", 0.1)
    moved = jax.tree.map(
        lambda a, b: np.abs(np.asarray(a) - np.asarray(b)),
        masks.ends["rlvr"],
        masks.origin,
    )
    pairs = list(zip(jax.tree.leaves(moved), jax.tree.leaves(mask), strict=True))
    smallest = min(m[k].min() for m, k in pairs if k.any())
    assert smallest >= max(m[~k].max() for m, k in pairs)


def test_masks_that_cannot_be_made_are_refused(masks):
    with pytest.raises(ValueError, match="known: own, rlvr"):
        masks.make("biggest", 0.1)
    with pytest.raises(ValueError, match="expected above 0 and at most 1"):
        masks.make("own", 0.0)
    still = masks._replace(ends={"own": masks.origin})
    with pytest.raises(ValueError, match="mask own: fewer than 0.1"):
        still.make("own", 0.1)


def test_overlap_of_masks_and_its_chance_levels(masks):
    study = masks.study
    own, other = masks.make("own", 0.2), masks.make("other_seed", 0.2)
    found = compare_masks(study, own, other)
    # Independent noise: the expected overlap is the density.
    assert found["covered_by_b"] == pytest.approx(0.2, abs=0.01)
    assert found["covered_by_b_chance"] == pytest.approx(0.2, abs=1e-4)
    assert found["lift"] == pytest.approx(1.0, abs=0.05)
    same = compare_masks(study, own, own)
    assert same["covered_by_b"] == same["jaccard"] == 1.0
    # All of the mask in one tensor: chance within tensors is that tensor's share.
    empty = jax.tree.map(lambda m: np.zeros(m.shape, bool), own)
    first = empty | {"norm": {"weight": np.ones_like(empty["norm"]["weight"])}}
    half = np.arange(first["norm"]["weight"].size) % 2 == 0
    second = empty | {"norm": {"weight": half}}
    found = compare_masks(study, first, second)
    assert found["covered_by_b_chance_per_tensor"] == pytest.approx(0.5)
    assert found["covered_by_b_chance"] < 1e-3


def test_supports_that_share_tensors_alone_are_at_chance_within_them():
    """Each moves half of the first tensor and nothing of the second."""
    still = np.zeros((2, 4, 2), np.float32)

    def moved(*places):
        first = still[0].copy()
        first.flat[list(places)] = 1.0
        return DictSource({"a.weight": first, "b.weight": still[1]})

    source = moved()
    found = compare_supports(source, moved(0, 1, 2, 3), moved(2, 3, 4, 5))
    assert found["lift"] == 2.0
    assert found["covered_by_b"] == 0.5
    assert found["covered_by_b_chance"] == 0.25
    assert found["covered_by_b_chance_per_tensor"] == 0.5
    assert compare_supports(source, source, source)["lift"] is None


def supports_of(*covered):
    pair = {"covered_by_b_chance_per_tensor": 0.5, "lift": 2.0}
    return [pair | {"covered_by_b": c} for c in covered]


def test_overlap_is_claimed_beyond_the_chance_within_tensors():
    supports = {
        "RLVR, by OPD": supports_of(0.61, 0.6, 0.62),
        "OPD, by OPD of another teacher": supports_of(0.4, 0.41, 0.39),
        "OPD, by OPD of another seed": supports_of(0.9, 0.91, 0.92),
    }
    rlvr, teacher, seed = claims(0.1, Found({}, supports, {}, {}))
    assert rlvr.samples == pytest.approx((0.11, 0.1, 0.12))
    assert rlvr.holds is True
    assert teacher.holds is False
    # Of three seeds there are no two pairs without a run in common.
    assert seed.samples == pytest.approx((0.4,))
    assert seed.holds is None
    supports = {"OPD, by OPD of another seed": supports_of(0.9, 0.8, 0.91, 0.8)}
    (seed,) = claims(0.1, Found({}, supports, {}, {}))
    assert seed.samples == pytest.approx((0.4, 0.41))
    assert seed.holds is True


def test_agreement_counts_bits_and_tolerances():
    origin = {"w": jnp.zeros((2, 2), jnp.float32)}
    full = {"w": np.array([[1.0, 2.0], [0.0, 1e-5]], np.float32)}
    other = {"w": np.array([[1.0 + 1e-4, 2.0], [0.0, 4e-5]], np.float32)}
    found = agreement(origin, full, other)
    assert found["master_equal"] == 0.5
    # 1 + 1e-4 is 1 in bfloat16; 1e-5 and 4e-5 differ there, by about 3e-5.
    assert found["stored_equal"] == 0.75
    assert found["stored_within_1e-05"] == 0.75
    assert found["stored_within_0.0001"] == 1.0
    gap = np.linalg.norm(other["w"].astype(np.float64) - full["w"])
    assert found["distance"] == pytest.approx(gap / np.sqrt(5.0), rel=1e-6)
    assert agreement(origin, full, full)["distance"] == 0.0
    assert agreement(origin, full, origin)["distance"] == 1.0


def test_a_mask_of_another_model_is_refused(begun, tmp_path):
    path = tmp_path / "mask.safetensors"
    save_mask(path, {"model.norm.weight": np.ones(7, bool)})
    config = get_config("smoke")
    config.masks = ("own", str(path))
    with pytest.raises(CheckpointError, match="the mask lacks it"):
        subnetwork.run(config, tmp_path / "run")
    assert not (tmp_path / "run" / "arms").exists()


def test_a_mask_that_changed_behind_its_path_is_refused(tmp_path):
    path = tmp_path / "mine.safetensors"
    save_mask(path, {"w": np.ones(2, bool)})
    config = get_config("tiny")
    config.masks = ("own", str(path))
    config.other_teacher = str(TINY_WORLD / "teacher")

    def start():
        found = subnetwork.further_paths(config), subnetwork.recipes(config)
        with begin(config, tmp_path / "run", subnetwork.NAME, *found):
            pass

    start()
    recorded = json.loads((tmp_path / "run" / "inputs.json").read_text())
    assert "model.safetensors" in recorded["other_teacher"]
    start()
    save_mask(path, {"w": np.zeros(2, bool)})
    with pytest.raises(WorkdirError, match=r"changed since: mask .*mine\.safetensors"):
        start()


def test_another_recipe_of_the_other_teacher_is_another_input():
    config = get_config("tiny")
    first = subnetwork.recipes(config)
    assert set(first) == {"other_teacher"}
    config.other_recipe = {"seed": 2}
    assert subnetwork.recipes(config) != first
    vision = get_config("vision")
    first = subnetwork.recipes(vision)
    assert set(first) == {"world"}
    vision.vision_recipe = {"num_problems": 64}
    assert subnetwork.recipes(vision) != first


def test_the_other_teacher_sees_nothing_that_the_study_holds_out(
    begun, tmp_path, monkeypatch
):
    given = []

    def build(recipe, folder, held_out):
        given.append(held_out)
        raise InterruptedError

    monkeypatch.setattr(subnetwork, "build_world", build)
    with pytest.raises(InterruptedError):
        subnetwork.other_teacher(get_config("smoke"), begun.study)
    prompts = begun.study.world.prompts
    (held_out,) = given
    parts = prompts.validation, prompts.test
    assert held_out == {e.prompt for part in parts for e in part.examples}
    assert not held_out & {e.prompt for e in prompts.train.examples}
    assert min(len(part.examples) for part in parts) > 0


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("density", 0.0, "density 0.0: expected above 0 and at most 1"),
        ("density", 1.5, "density 1.5"),
        ("curve_densities", (-0.1,), "density -0.1"),
        ("curve_densities", (0.1, 0.1), "expected each once"),
        ("masks", ("own", "biggest"), "mask 'biggest'; known: own"),
        ("masks", ("own", "own"), "own_0.175 occurs more than once"),
        ("curve_masks", ("matched_random",), "matched_random is no kind among masks"),
        ("masks", ("other_seed",), "other_seed: expected at least two seeds"),
        ("masks", ("rlvr",), "mask rlvr: there is no arm rlvr to make it of"),
    ],
)
def test_settings_out_of_range_are_refused(field, value, message, tmp_path):
    config = get_config("smoke")
    config.seeds = (0,)
    config[field] = value
    with pytest.raises(ValueError, match=message):
        subnetwork.run(config, tmp_path / "run")


@pytest.mark.parametrize(
    "variant",
    ["tiny", "smoke", "vision", "vision_smoke", "midsize", "midsize_smoke", "paper"],
)
def test_every_variant_builds(variant):
    config = get_config(variant)
    check_settings(config)
    subnetwork.check(config)
    arms = [m.arm for m in subnetwork.plan(config)]
    assert len(set(arms)) == len(arms)
    if variant in ("tiny", "vision"):
        assert len(config.seeds) >= 3
    if variant == "tiny":
        assert len(arms) + len(subnetwork.FULL) == 22
        assert {m.density for m in subnetwork.plan(config) if m.rule == "random"} == {
            0.01,
            0.05,
            0.175,
            0.5,
        }
    if variant == "vision":
        # P1's Figure 7: GRPO's mask and its random twin at GRPO's density too.
        assert {"rlvr_0.093", "random_0.093", "rlvr_0.333", "random_0.333"} < set(arms)


def test_the_papers_settings_are_those_of_the_recipe():
    config, recipe = get_config("paper"), p1_opd.get_config("deepscaler")
    for field in ("student", "teacher", "prompts", "prompts_per_step", "num_steps"):
        assert config[field] == recipe[field]
    assert config.density == recipe.mask_density
    assert config.other_teacher == p1_opd.get_config("justrl").teacher


def test_unknown_variants_are_refused():
    with pytest.raises(ValueError, match="known: tiny, smoke, vision, vision_smoke"):
        get_config("large")


def found_with(**late_accuracies):
    """Three seeds that start at 0.3; the rest of what claims look at is fixed."""

    def outcome(seed, late):
        rows = [
            {"kind": "eval", "step": i, "test_accuracy": x, "validation_reverse_kl": 1}
            for i, x in enumerate((0.3, late))
        ]
        return Outcome(seed, 1e-4, None, 1.0, None, 1.0, 0.0, rows)

    outcomes = {
        arm: [outcome(i, late + 0.001 * i) for i in range(3)]
        for arm, late in late_accuracies.items()
    }
    return Found(outcomes, {}, {}, {})


def test_claims_hold_where_the_runs_say_so():
    found = found_with(
        opd=0.5, rlvr=0.5, **{"own_0.1": 0.49, "random_0.1": 0.4, "rlvr_0.1": 0.4}
    )
    verdicts = {claim.claim: claim.holds for claim in claims(0.1, found)}
    assert verdicts == {
        "OPD's own subnetwork nearly matches full OPD": True,
        "RLVR's subnetwork nearly matches full OPD": False,
        "The mask own ends above the mask random": True,
        "The mask rlvr ends above the mask random": None,
    }


def test_the_sparser_mask_of_the_vision_world_has_claims_of_its_own():
    found = found_with(
        opd=0.5, **{"own_0.333": 0.49, "rlvr_0.093": 0.45, "random_0.093": 0.46}
    )
    verdicts = {claim.claim: claim.holds for claim in claims(0.333, found, "vision")}
    assert verdicts == {
        "OPD's own subnetwork nearly matches full OPD": True,
        "GRPO's mask ends above the mask random of its density": False,
        "GRPO's sparser mask ends below OPD's own": True,
    }


def test_a_full_run_without_a_gain_is_matched_by_no_mask():
    found = found_with(opd=0.2985, **{"own_0.1": 0.35})
    (near,) = claims(0.1, found)
    # Seeds gain -0.0015, -0.0005 and 0.0005.
    assert near.samples[:2] == (None, None)
    assert near.samples[2] == pytest.approx(0.052 - 0.8 * 0.0005)
    assert near.holds is None


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The smoke run with what it leaves out: RLVR, another teacher, their masks."""
    config, whole = get_config("smoke"), get_config("tiny")
    config.arms = whole.arms
    config.other_recipe = {
        "seed": 1,
        "base_steps": 1,
        "anchor_accuracy": 0.0,
        "teacher_steps": 30,
        "num_problems": 1000,
        "num_test": 64,
        "num_validation": 64,
    }
    config.masks = ("own", "rlvr", "other_seed", "random")
    workdir = tmp_path_factory.mktemp("subnetwork") / "finished"
    return workdir, subnetwork.run(config, workdir), config


@pytest.mark.slow
def test_frozen_coordinates_are_the_sources_bits(finished, begun):
    workdir, *_ = finished
    source = dict(
        hf.to_hf(begun.origins["anchor"], begun.study.world.student.model.config)
    )
    for arm in ("own_0.01", "random_0.175", "rlvr_own_0.175"):
        folder = workdir / "arms" / arm / "seed_1"
        mask = load_mask(folder / "mask.safetensors")
        final = load_file(folder / "final" / "model.safetensors")
        moved = 0
        for name, tensor in final.items():
            same = tensor.view(np.uint32) == source[name].view(np.uint32)
            assert same[~mask[name]].all()
            moved += int((~same).sum())
        assert moved > 0
    notes = read_provenance(workdir / "arms/own_0.01/seed_1/mask.safetensors")
    assert notes == {"rule": "own", "of": "opd", "seed": "1"}


@pytest.mark.slow
def test_the_other_teacher_is_another_and_is_learnt_from(finished):
    workdir, *_ = finished
    ours, others = (
        SafetensorsSource(folder)
        for folder in (TINY_WORLD / "teacher", workdir / "other_teacher" / "teacher")
    )
    name = "model.layers.0.mlp.up_proj.weight"
    assert (ours.read(name) != others.read(name)).mean() > 0.9
    first = load_file(workdir / "arms/opd/seed_0/final/model.safetensors")
    second = load_file(
        workdir / "arms/opd_other_teacher/seed_0/final/model.safetensors"
    )
    assert (first[name] != second[name]).any()


@pytest.mark.slow
def test_the_record_holds_every_run_and_nothing_is_compiled_twice(finished):
    workdir, record, config = finished
    assert json.loads((workdir / "results.json").read_text()) == record
    arms = {m.arm for m in subnetwork.plan(config)}
    assert set(record["runs"]) == arms | set(subnetwork.FULL)
    assert set(record["arms"]) == set(record["runs"]) - {"own_0.01", "other_seed_0.175"}
    assert record["runs"]["own_0.01"]["trained"] == pytest.approx([0.01] * 2, abs=1e-4)
    assert set(record["compilations"].values()) == {1}
    assert {"learn distill, masked", "learn reward, masked"} <= set(
        record["compilations"]
    )
    assert set(record["supports"]) == {
        "RLVR, by OPD",
        "OPD, by OPD of another teacher",
        "OPD, by OPD of another seed",
    }
    # Two seeds make one pair: no interval, and no verdict.
    assert [len(seeds) for seeds in record["supports"].values()] == [2, 2, 1]
    assert len(record["masks"]["other_seed_0.175"]) == 1
    untouched = record["agreement"]["source, untouched"]
    assert [seed["distance"] for seed in untouched] == [1.0, 1.0]
    for seed in record["agreement"]["own_0.175"]:
        assert 0 < seed["distance"]
        assert seed["stored_equal"] <= seed["stored_within_1e-05"] < 1
    # Of all runs, those too whose geometry is not shown.
    seconds = [
        json.loads(path.read_text())["seconds"]
        for path in (workdir / "arms").glob("*/*/finished.json")
    ]
    assert len(seconds) == sum(len(run["trained"]) for run in record["runs"].values())
    assert record["train_s"] == pytest.approx(sum(seconds), abs=0.06)
    assert len(record["claims"]) == 14
    text = (workdir / "report.md").read_text()
    for part in (
        "P1's Table 4",
        "P1 RLVR (DeepScaleR)",
        r"own\_0.01",
        "random mask 32.9",
    ):
        assert part in text
    assert any(path.stem == "density" for path in (workdir / "figures").iterdir())


@pytest.mark.slow
def test_the_vision_language_world(tmp_path, monkeypatch):
    """Forward KL on the teacher's likeliest tokens, full and masked, images and all."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    config = get_config("vision_smoke")
    workdir = tmp_path / "run"
    record = subnetwork.run(config, workdir)
    assert set(record["runs"]) == {"opd", "own_0.333", "random_0.333", "random_0.093"}
    assert record["config"]["student"] == ""
    assert set(record["compilations"].values()) == {1}
    (world,) = (tmp_path / "cache" / "geomjax").glob("vision_world-*")
    before = load_file(world / "anchor" / "model.safetensors")
    folder = workdir / "arms" / "random_0.333" / "seed_0"
    mask = load_mask(folder / "mask.safetensors")
    after = load_file(folder / "final" / "model.safetensors")
    moved = {n: x != before[n].astype(np.float32) for n, x in after.items()}
    assert not any((moved[name] & ~mask[name]).any() for name in moved)
    tower = [name for name in moved if "visual" in name]
    assert all(moved[name].any() for name in tower if name.endswith("weight"))
    assert "P1, Figure 7" in {claim["source"] for claim in record["claims"]}
    text = (workdir / "report.md").read_text()
    assert "P1 GRPO (Qwen2.5-VL)" in text
    assert "P1 (Figure 7" in text
