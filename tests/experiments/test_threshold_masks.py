"""P1's masks by threshold: of the own run and of the teacher, by one rule."""

import dataclasses

import jax
import ml_dtypes
import numpy as np
import pytest

from configs.optimizer_ablation import get_config
from experiments.ablation.arms import Arm, read_arms
from experiments.ablation.runner import Runner
from experiments.common.outcome import finish, read_outcome
from experiments.common.world import load_world
from geomjax.models import hf
from geomjax.optim.mask_file import save_mask
from geomjax.rewards.judge import Judge

TEACHER = Arm("adamw_teacher_mask", "adamw", (1e-3,), "teacher")
OWN = Arm("adamw_opd_mask", "adamw", (1e-3,), "own")
RANDOM = Arm("adamw_random_mask", "adamw", (1e-3,), "random")


@pytest.fixture(scope="module")
def world():
    return load_world(get_config())


def runner_of(world, folder, **changes):
    config = get_config()
    config.update(changes)
    return Runner(config, world, folder, Judge("exact"))


def flat(tree):
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


def stored(tree):
    return flat(tree).astype(ml_dtypes.bfloat16)


def ended_at(world, folder, params):
    """A finished run of the arm `adamw` that ended there."""
    finish(
        folder,
        jax.device_get(params),
        world.student.model.config,
        trained=1.0,
        mask_threshold=None,
        seconds=0.0,
        input_wait_s=0.0,
    )
    return read_outcome(folder, 1e-3, 0)


def test_the_own_and_the_teachers_mask_share_the_threshold(world, tmp_path):
    """Where |d| is above it, with no regard to the density."""
    runner = runner_of(world, tmp_path, mask_threshold=0.01)
    own = ended_at(world, tmp_path / "own", world.teacher.params)
    update = stored(world.teacher.params) - stored(world.student.params)
    expected = np.abs(update) > ml_dtypes.bfloat16(0.01)
    assert 0 < expected.mean() < 1
    assert abs(expected.mean() - 0.175) > 0.01
    for mask in (runner._mask(TEACHER, 0, None), runner._mask(OWN, 0, own)):
        assert mask.threshold == 0.01
        np.testing.assert_array_equal(flat(mask.tree), expected)


def neighbours(world, steps):
    """The student, every weight moved by so many bfloat16 numbers, away from zero.

    Args:
      world: Its student's weights are bfloat16 numbers.
      steps: Of a flat index.
    """
    place = 0

    def move(leaf):
        nonlocal place
        leaf = np.asarray(leaf)
        count = steps(np.arange(place, place + leaf.size)).reshape(leaf.shape)
        place += leaf.size
        up = (leaf.view(np.uint32) + np.uint32(1 << 16)).view(np.float32)
        return leaf + np.float32(count) * (up - leaf)

    return jax.tree.map(move, jax.device_get(world.student.params))


def test_masters_between_two_stored_values_have_not_moved(world, tmp_path):
    """0.3 of the gap to the next bfloat16 number is stored as no move, 1.3 as one."""
    params = neighbours(world, lambda i: np.where(i % 5 == 0, 1.3, 0.3))
    masters = np.abs(flat(params) - flat(world.student.params))
    before = stored(world.student.params)
    gaps = (before.view(np.uint16) + 1).view(ml_dtypes.bfloat16) - before
    expected = np.abs(gaps.astype(np.float32)) > 1.002e-5
    expected[np.arange(expected.size) % 5 != 0] = False
    assert 0.1 < expected.mean() < 0.2
    assert (masters > 1e-5).mean() > 0.5

    teacher = dataclasses.replace(world.teacher, params=params)
    taught = world._replace(teacher=teacher)
    runner = runner_of(taught, tmp_path, mask_threshold=1e-5)
    own = ended_at(world, tmp_path / "own", params)
    for mask in (runner._mask(TEACHER, 0, None), runner._mask(OWN, 0, own)):
        np.testing.assert_array_equal(flat(mask.tree), expected)
    drawn = flat(runner._mask(RANDOM, 0, own).tree)
    assert drawn.sum() == expected.sum()
    assert 0.5 < (drawn & expected).sum() / drawn.sum() / expected.mean() < 2

    hidden = neighbours(world, lambda i: np.full(i.shape, 0.3))
    same = world._replace(teacher=dataclasses.replace(teacher, params=hidden))
    reason = runner_of(same, tmp_path, mask_threshold=1e-5).skip_reason(TEACHER)
    assert reason.endswith("nowhere by more than the mask_threshold 1e-05")


def test_by_threshold_a_random_mask_needs_the_own_one():
    config = get_config()
    config.arms = {"adamw_random_mask": {"optimizer": "adamw", "mask": "random"}}
    assert [arm.name for arm in read_arms(config)] == ["adamw_random_mask"]
    config.mask_threshold = 1e-5
    with pytest.raises(ValueError, match="adamw_random_mask.*there must be such an"):
        read_arms(config)


def test_a_threshold_asks_for_no_density(world, tmp_path):
    same = world._replace(teacher=world.student)
    assert "fewer than" in runner_of(same, tmp_path).skip_reason(TEACHER)
    assert runner_of(world, tmp_path, mask_threshold=1e-5).skip_reason(TEACHER) is None
    assert runner_of(world, tmp_path).skip_reason(TEACHER) is None


def test_without_a_threshold_the_density_decides(world, tmp_path):
    mask = runner_of(world, tmp_path)._mask(TEACHER, 0, None)
    selected = flat(mask.tree)
    assert selected.sum() == -(-175 * selected.size // 1000)
    assert mask.threshold > 0


def test_a_mask_that_selects_nothing_is_told(world, tmp_path):
    """The teacher's before the first arm, others before their own."""
    same = world._replace(teacher=world.student)
    reason = runner_of(same, tmp_path, mask_threshold=1e-5).skip_reason(TEACHER)
    assert reason.endswith("nowhere by more than the mask_threshold 1e-05")
    own = ended_at(world, tmp_path / "own", world.student.params)
    runner = runner_of(world, tmp_path, mask_threshold=1e-5)
    for arm in (OWN, OWN._replace(mask="matched_random")):
        with pytest.raises(ValueError, match="mask_threshold 1e-05 selects no coord"):
            runner._mask(arm, 0, own)

    config = world.student.model.config
    empty = {
        name: np.zeros(array.shape, bool)
        for name, array in hf.to_hf(world.student.params, config)
    }
    save_mask(tmp_path / "m.safetensors", empty, provenance={})
    arm = OWN._replace(mask=str(tmp_path / "m.safetensors"))
    with pytest.raises(ValueError, match="m.safetensors selects no coordinate"):
        runner.check([arm])
