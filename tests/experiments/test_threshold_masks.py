"""P1's masks by threshold: of the own run and of the teacher, by one rule."""

import jax
import numpy as np
import pytest

from configs.optimizer_ablation import get_config
from experiments.ablation.arms import Arm
from experiments.ablation.runner import Runner
from experiments.common.outcome import finish, read_outcome
from experiments.common.world import load_world
from geomjax.models import hf
from geomjax.optim.mask_file import save_mask
from geomjax.rewards.judge import Judge

TEACHER = Arm("adamw_teacher_mask", "adamw", (1e-3,), "teacher")
OWN = Arm("adamw_opd_mask", "adamw", (1e-3,), "own")


@pytest.fixture(scope="module")
def world():
    return load_world(get_config())


def runner_of(world, folder, **changes):
    config = get_config()
    config.update(changes)
    return Runner(config, world, folder, Judge("exact"))


def flat(tree):
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


def test_the_own_and_the_teachers_mask_share_the_threshold(world, tmp_path):
    """Where |d| is above it, with no regard to the density."""
    runner = runner_of(world, tmp_path, mask_threshold=0.01)
    params = jax.device_get(world.teacher.params)
    finish(
        tmp_path / "own",
        params,
        world.student.model.config,
        trained=1.0,
        mask_threshold=None,
        seconds=0.0,
        input_wait_s=0.0,
    )
    own = read_outcome(tmp_path / "own", 1e-3, 0)
    expected = np.abs(flat(params) - flat(world.student.params)) > np.float32(0.01)
    assert 0 < expected.mean() < 1
    assert abs(expected.mean() - 0.175) > 0.01
    for mask in (runner._mask(TEACHER, 0, None), runner._mask(OWN, 0, own)):
        assert mask.threshold == 0.01
        np.testing.assert_array_equal(flat(mask.tree), expected)


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
    finish(
        tmp_path / "own",
        jax.device_get(world.student.params),
        world.student.model.config,
        trained=1.0,
        mask_threshold=None,
        seconds=0.0,
        input_wait_s=0.0,
    )
    own = read_outcome(tmp_path / "own", 1e-3, 0)
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
