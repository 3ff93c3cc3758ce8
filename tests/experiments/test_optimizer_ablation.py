import json
import math

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

from configs.optimizer_ablation import get_config
from experiments.ablation.arms import read_arms
from experiments.common.world import TINY_WORLD
from geomjax.data.batches import make_batches
from geomjax.models import hf
from geomjax.models.load import load
from geomjax.optim.build import OptimizerSpec, build
from geomjax.optim.mask_file import load_mask, read_provenance
from geomjax.train.log import read_rows

ARMS = (
    "adamw",
    "sgd",
    "adamw_opd_mask",
    "adamw_teacher_mask",
    "adamw_random_mask",
    "adamw_matched_random_mask",
)
MASKED = ARMS[2:]
FIELDS = {
    "accuracy_start",
    "accuracy_peak",
    "accuracy_final",
    "accuracy_late",
    "loss_first",
    "loss_final",
    "learning_rate",
    "mask_density",
    "mask_threshold",
    "seeds",
    "geometry",
}
POOLED = (
    "relative_frobenius",
    "exact_zero_fraction",
    *(f"unchanged_atol_1e-{n:02}" for n in range(4, 9)),
    "top_energy_1",
    "top_energy_8",
    "top_energy_16",
    "principal_coverage_0.10",
    "low_magnitude_coverage_0.10",
)
SPECTRAL = ("stable_rank", "top_energy_1", "top_energy_8", "top_energy_16")


@pytest.fixture(scope="module")
def anchor():
    return load_file(TINY_WORLD / "anchor" / "model.safetensors")


def exported(run, arm, kind="checkpoint"):
    return load_file(run.workdir / "arms" / arm / kind / "model.safetensors")


def run_folder(run, arm, seed):
    rate = run.record["arms"][arm]["learning_rate"]
    return run.workdir / "arms" / arm / f"lr_{rate:g}" / f"seed_{seed}"


def masks_of(run, arm):
    return load_mask(run.workdir / "arms" / arm / "mask.safetensors")


# --- results.json -------------------------------------------------------------------


def test_results_file_is_the_record(ablation_run):
    text = (ablation_run.workdir / "results.json").read_text()
    assert json.loads(text) == ablation_run.record
    assert "NaN" not in text
    assert "Infinity" not in text


def test_results_have_the_documented_schema(ablation_run):
    record = ablation_run.record
    assert set(record) >= {"arms", "claims", "wall_s", "config", "environment"}
    assert set(record["arms"]) == set(ARMS)
    assert record["skipped"] == {}
    assert record["wall_s"] > 0
    assert record["config"]["mask_density"] == 0.175
    assert record["environment"]["jax"] == jax.__version__
    for arm in record["arms"].values():
        assert set(arm) == FIELDS
        assert set(arm["geometry"]) == {"stored", "master"}
        assert [seed["seed"] for seed in arm["seeds"]] == [0, 1]
        for seed in arm["seeds"]:
            assert set(seed) == {"seed"} | {
                name for name in FIELDS if name.startswith(("accuracy", "loss"))
            }


def test_arms_share_programs_and_nothing_is_compiled_twice(ablation_run):
    assert ablation_run.record["compilations"] == {
        "step adamw": 1,
        "step sgd": 1,
        "step adamw, masked": 1,
    }


def test_claims_are_recorded_with_their_evidence(ablation_run):
    claims = ablation_run.record["claims"]
    assert len(claims) == 4
    for claim in claims:
        assert set(claim) == {"claim", "holds", "evidence"}
        assert claim["holds"] in (True, False, None)
        assert "points" in claim["evidence"]


@pytest.mark.parametrize("arm", ARMS)
def test_figures_of_an_arm_follow_from_its_metrics(ablation_run, arm):
    entry = ablation_run.record["arms"][arm]
    for seed in entry["seeds"]:
        rows = read_rows(run_folder(ablation_run, arm, seed["seed"]))
        rows = [row for row in rows if row["kind"] == "eval"]
        accuracy = [row["test_accuracy"] for row in rows]
        assert [row["step"] for row in rows] == list(range(7))
        assert seed["accuracy_start"] == accuracy[0]
        assert seed["accuracy_peak"] == max(accuracy)
        assert seed["accuracy_final"] == accuracy[-1]
        assert seed["accuracy_late"] == pytest.approx(sum(accuracy[2:]) / 5)
        assert seed["loss_first"] == rows[0]["validation_reverse_kl"]
        assert seed["loss_final"] == rows[-1]["validation_reverse_kl"]
    for name in FIELDS:
        if name.startswith(("accuracy", "loss")):
            mean = np.mean([seed[name] for seed in entry["seeds"]])
            assert entry[name] == pytest.approx(float(mean)), name


@pytest.mark.parametrize("kind", ["stored", "master"])
@pytest.mark.parametrize("arm", ARMS)
def test_geometry_has_the_reference_columns(ablation_run, arm, kind):
    summary = ablation_run.record["arms"][arm]["geometry"][kind]
    assert set(summary) == {"global", "groups"}
    assert set(summary["groups"]) == {
        "embedding",
        "attention",
        "ffn",
        "norm",
        "lm_head",
    }
    matrices = {n: p for n, p in summary["groups"].items() if n != "norm"}
    for name, part in (matrices | {"global": summary["global"]}).items():
        for column in POOLED:
            assert math.isfinite(part[column]), (name, column)
        for column in SPECTRAL:
            assert math.isfinite(part["median"][column]), (name, column)
    for column in POOLED[:7]:
        assert math.isfinite(summary["groups"]["norm"][column])


# --- the arms -----------------------------------------------------------------------


def test_every_arm_starts_from_the_anchor(ablation_run):
    arms = ablation_run.record["arms"]
    assert len({arm["accuracy_start"] for arm in arms.values()}) == 1
    assert len({arm["loss_first"] for arm in arms.values()}) == 1
    assert 0 < arms["adamw"]["accuracy_start"] < 1


def test_every_arm_sees_the_same_first_rollout(ablation_run):
    for seed in ablation_run.config.seeds:
        first = [
            next(
                (row["reverse_kl"], row["completion_tokens"])
                for row in read_rows(run_folder(ablation_run, arm, seed))
                if row["kind"] == "train"
            )
            for arm in ARMS
        ]
        # The same parameters and draws, in programs that are compiled apart.
        np.testing.assert_allclose(first, [first[0]] * len(ARMS), rtol=1e-5)


def test_prompts_depend_on_seed_and_step_alone():
    ids = [np.array([i], np.int32) for i in range(50)]

    def prompts(seed, step):
        batch_at = make_batches(ids, batch_size=8, seed=seed, pad_id=0, length=1)
        return np.asarray(batch_at(step).tokens).tolist()

    assert prompts(0, 3) == prompts(0, 3)
    assert prompts(0, 3) != prompts(1, 3)
    assert prompts(0, 3) != prompts(0, 4)


def test_arms_are_trained(ablation_run, anchor):
    for arm in ARMS:
        masters = exported(ablation_run, arm, "masters")
        for name, tensor in anchor.items():
            assert np.any(masters[name] != tensor.astype(np.float32)), (arm, name)


def test_adamw_state_figures_are_logged(ablation_run):
    for arm in ARMS:
        rows = [
            row
            for row in read_rows(run_folder(ablation_run, arm, 0))
            if row["kind"] == "train"
        ]
        assert [row["update"] for row in rows] == list(range(1, 13))
        if arm == "sgd":
            assert all("momentum_gradient_cosine" not in row for row in rows)
            continue
        cosine = np.array([row["momentum_gradient_cosine"] for row in rows])
        assert (np.abs(cosine) <= 1 + 1e-6).all()
        # There is no momentum before the first update.
        assert cosine[0] == 0
        assert (0 < np.abs(cosine[1:])).all()
        assert all(row["root_second_moment_variation"] > 0 for row in rows)


# --- masks --------------------------------------------------------------------------


@pytest.mark.parametrize("arm", MASKED)
def test_masks_have_exactly_their_density(ablation_run, arm, anchor):
    masks = masks_of(ablation_run, arm)
    assert {n: m.shape for n, m in masks.items()} == {
        name: tensor.shape for name, tensor in anchor.items()
    }
    count = sum(tensor.size for tensor in anchor.values())
    selected = -(-175 * count // 1000)
    assert sum(int(mask.sum()) for mask in masks.values()) == selected
    assert ablation_run.record["arms"][arm]["mask_density"] == selected / count
    path = ablation_run.workdir / "arms" / arm / "mask.safetensors"
    provenance = read_provenance(path)
    threshold = provenance.pop("threshold", None)
    assert provenance == {"arm": arm, "seed": "0"}
    by_size = arm in ("adamw_opd_mask", "adamw_teacher_mask")
    assert (threshold is not None) == by_size
    if by_size:
        recorded = ablation_run.record["arms"][arm]["mask_threshold"]
        assert float(threshold) == recorded > 0


@pytest.mark.parametrize("arm", ["adamw", "sgd"])
def test_arms_without_mask_train_everything(ablation_run, arm):
    assert ablation_run.record["arms"][arm]["mask_density"] == 1
    assert not (ablation_run.workdir / "arms" / arm / "mask.safetensors").exists()


def check_largest(masks, tuned, anchor):
    """Every selected coordinate moved at least as far as every other one."""
    delta = {n: np.abs(tuned[n] - anchor[n].astype(np.float32)) for n in anchor}
    inside = min(delta[n][masks[n]].min(initial=np.inf) for n in anchor)
    outside = max(delta[n][~masks[n]].max(initial=0) for n in anchor)
    assert inside >= outside
    assert inside > 0


def test_own_mask_is_where_the_full_run_moved_most(ablation_run, anchor):
    masks = masks_of(ablation_run, "adamw_opd_mask")
    check_largest(masks, exported(ablation_run, "adamw", "masters"), anchor)


def test_teacher_mask_is_where_the_teacher_differs_most(ablation_run, anchor):
    teacher = load_file(TINY_WORLD / "teacher" / "model.safetensors")
    teacher = {name: tensor.astype(np.float32) for name, tensor in teacher.items()}
    check_largest(masks_of(ablation_run, "adamw_teacher_mask"), teacher, anchor)


def test_matched_mask_has_the_own_mask_s_count_in_every_tensor(ablation_run):
    own = masks_of(ablation_run, "adamw_opd_mask")
    matched = masks_of(ablation_run, "adamw_matched_random_mask")
    assert {n: m.sum() for n, m in own.items()} == {
        name: mask.sum() for name, mask in matched.items()
    }
    name = "model.layers.0.mlp.up_proj.weight"
    assert not np.array_equal(own[name], matched[name])


def test_random_mask_is_spread_evenly(ablation_run):
    masks = masks_of(ablation_run, "adamw_random_mask")
    for name, mask in masks.items():
        # Five standard deviations of a binomial of its size.
        allowed = 5 * math.sqrt(0.175 * 0.825 / mask.size)
        assert abs(mask.mean() - 0.175) < allowed, name


def test_each_seed_has_its_own_masks(ablation_run):
    for arm in ("adamw_opd_mask", "adamw_random_mask", "adamw_matched_random_mask"):
        first, second = (
            load_mask(run_folder(ablation_run, arm, seed) / "mask.safetensors")
            for seed in (0, 1)
        )
        assert any(not np.array_equal(first[n], second[n]) for n in first), arm


@pytest.mark.parametrize("arm", MASKED)
def test_coordinates_off_the_mask_keep_every_bit(ablation_run, arm, anchor):
    masters = exported(ablation_run, arm, "masters")
    moved = total = 0
    for name, mask in masks_of(ablation_run, arm).items():
        start = anchor[name].astype(np.float32)
        np.testing.assert_array_equal(
            masters[name][~mask].view(np.uint32), start[~mask].view(np.uint32), name
        )
        moved += int((masters[name][mask] != start[mask]).sum())
        total += int(mask.sum())
    assert moved > 0.5 * total


# --- what is exported ---------------------------------------------------------------


@pytest.mark.parametrize("arm", ARMS)
def test_exported_checkpoint_is_the_rounded_master(ablation_run, arm, anchor):
    stored = exported(ablation_run, arm)
    masters = exported(ablation_run, arm, "masters")
    assert stored.keys() == masters.keys() == anchor.keys()
    for name, tensor in stored.items():
        assert tensor.dtype == ml_dtypes.bfloat16
        assert masters[name].dtype == np.float32
        rounded = masters[name].astype(ml_dtypes.bfloat16)
        np.testing.assert_array_equal(
            tensor.view(np.uint16), rounded.view(np.uint16), name
        )
    folder = ablation_run.workdir / "arms" / arm
    for kind, dtype in (("checkpoint", "bfloat16"), ("masters", "float32")):
        assert json.loads((folder / kind / "config.json").read_text())["dtype"] == dtype
        assert (folder / kind / "tokenizer.json").is_file()


def numpy_geometry(source, tuned, kind):
    """Columns of `global` for one seed, in float64: pooled by count and by energy."""
    zero = close = numel = delta_energy = source_energy = top = matrix_energy = 0
    ranks = []
    for name, w in source.items():
        if kind == "stored":
            # P1 subtracts in bfloat16, and rounds the tolerance to it as well.
            d = (tuned[name].astype(np.float32) - w.astype(np.float32)).astype(
                ml_dtypes.bfloat16
            )
            atol = float(ml_dtypes.bfloat16(1e-5))
        else:
            d, atol = tuned[name] - w.astype(np.float32), 1e-5
        w, d = w.astype(np.float64), d.astype(np.float64)
        zero += int((d == 0).sum())
        close += int((np.abs(d) <= atol).sum())
        numel += d.size
        delta_energy += (d**2).sum()
        source_energy += (w**2).sum()
        if d.ndim == 2 and d.any():
            values = np.linalg.svd(d, compute_uv=False)
            top += values[0] ** 2
            matrix_energy += (values**2).sum()
            ranks.append((values**2).sum() / values[0] ** 2)
    return {
        "relative_frobenius": math.sqrt(delta_energy / source_energy),
        "exact_zero_fraction": zero / numel,
        "unchanged_atol_1e-05": close / numel,
        "top_energy_1": top / matrix_energy,
        "median stable_rank": float(np.median(ranks)),
    }


@pytest.mark.parametrize("kind", ["stored", "master"])
@pytest.mark.parametrize("arm", ["adamw", "adamw_opd_mask"])
def test_geometry_agrees_with_numpy(ablation_run, arm, kind, anchor):
    convert = {"stored": ml_dtypes.bfloat16, "master": np.float32}[kind]
    seeds = [
        numpy_geometry(anchor, {n: t.astype(convert) for n, t in tuned.items()}, kind)
        for tuned in ablation_run.finals[arm]
    ]
    assert len(seeds) == 2
    summary = ablation_run.record["arms"][arm]["geometry"][kind]["global"]
    for name in seeds[0]:
        median, _, column = name.rpartition(" ")
        found = summary[median][column] if median else summary[column]
        expected = np.mean([seed[name] for seed in seeds])
        assert found == pytest.approx(expected, rel=1e-6), name


def test_exported_masters_are_the_first_seed_s_last_parameters(ablation_run):
    for arm in ARMS:
        masters = exported(ablation_run, arm, "masters")
        for name, tensor in ablation_run.finals[arm][0].items():
            np.testing.assert_array_equal(masters[name], tensor, name)


# --- configuration ------------------------------------------------------------------


def test_arms_follow_the_arm_that_their_masks_are_made_of():
    names = [arm.name for arm in read_arms(get_config())]
    assert set(names) == set(ARMS)
    for follower in ("adamw_opd_mask", "adamw_matched_random_mask"):
        assert names.index("adamw") < names.index(follower)


def test_variants():
    default, smoke, sweep = (get_config(v) for v in ("default", "smoke", "sweep"))
    assert len(default.seeds) >= 3
    assert smoke.num_steps < default.num_steps
    assert all(len(arm.learning_rates) >= 3 for arm in read_arms(sweep))
    assert len(sweep.seeds) >= 3
    for variant in (smoke, sweep):
        assert set(variant.arms) == set(default.arms)
        assert variant.mask_density == default.mask_density == 0.175
    with pytest.raises(ValueError, match="known: default, smoke, sweep"):
        get_config("swep")


@pytest.mark.parametrize("name", get_config("optimizers").optimizers)
def test_every_optimizer_of_the_comparison_takes_a_step(name):
    """Each builds with the roles of the model and moves every leaf by a finite step."""
    anchor = load(TINY_WORLD / "anchor")
    params = anchor.params
    optimizer = get_config("optimizers").optimizers[name]
    tx = build(
        OptimizerSpec(
            name=optimizer.transform,
            learning_rate=optimizer.learning_rates[0],
            clip_norm=optimizer.clip_norm or None,
            kwargs=optimizer.options.to_dict(),
        ),
        hf.roles(anchor.model.config),
    )
    gradients = jax.tree.map(lambda w: 0.1 * w + 0.01, params)
    update = jax.jit(tx.update)
    _, state = update(gradients, tx.init(params), params)
    updates, _ = update(gradients, state, params)  # ADOPT's first update is zero.
    for update, weight in zip(*map(jax.tree.leaves, (updates, params)), strict=True):
        assert np.isfinite(update).all()
        assert 0 < np.abs(update).max() < np.abs(weight).max()


def test_the_comparison_gives_every_optimizer_as_many_rates():
    arms = read_arms(get_config("optimizers"))
    assert {len(arm.learning_rates) for arm in arms} == {4}
    assert {"sgd_momentum", "rmsprop", "adagrad", "lamb", "lion", "muon"} <= {
        arm.name for arm in arms
    }
    assert {arm.mask for arm in arms} == {"none"}
