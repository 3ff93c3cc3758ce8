"""The ablation on a mesh of 8 devices, from checkpoints to exported parameters."""

import numpy as np
import pytest
from conftest import small_config

from experiments import optimizer_ablation
from experiments.common.world import TINY_WORLD
from geomjax.checkpoints.safetensors import SafetensorsSource
from geomjax.optim.mask_file import load_mask

MASK = "mask.safetensors"


def tensors(folder):
    source = SafetensorsSource(folder)
    return {name: source.read(name) for name in source.keys()}


@pytest.mark.slow
def test_the_ablation_on_a_mesh_ends_where_one_device_does(ablation_run, tmp_path):
    config = small_config()
    config.seeds, config.export_masters = (0,), True
    config.mesh = "data=2,fsdp=2,tensor=2"
    arms = ("adamw", "adamw_random_mask")
    for name in set(config.arms) - set(arms):
        del config.arms[name]
    record = optimizer_ablation.run(config, tmp_path / "run")
    anchor = tensors(TINY_WORLD / "anchor")
    for arm in arms:
        masters = tensors(tmp_path / "run" / "arms" / arm / "masters")
        expected = ablation_run.finals[arm][0]
        start = {name: w.astype(np.float32) for name, w in anchor.items()}
        moved = {name: expected[name] - start[name] for name in start}
        assert all(np.linalg.norm(d) > 0 for d in moved.values())
        for name, weight in masters.items():
            differs = np.linalg.norm(weight - expected[name])
            assert differs < 1e-2 * np.linalg.norm(moved[name]), (arm, name)
        if "mask" in arm:
            shapes = {name: weight.shape for name, weight in masters.items()}
            mask = load_mask(tmp_path / "run" / "arms" / arm / MASK, shapes)
            for name, weight in masters.items():
                kept = ~np.asarray(mask[name])
                assert kept.any()
                np.testing.assert_array_equal(weight[kept], start[name][kept])
    assert set(record["arms"]) == set(arms)


@pytest.mark.parametrize(
    ("mesh", "message"),
    [
        ("data=2,fsdp=2", "4 places for 8 devices"),
        ("tensor=8", "kv_heads: 2 kv_heads over tensor=8, where 1 or 2 divides"),
        ("fsdp=8,rows=1", "a different one of"),
    ],
)
def test_a_mesh_that_does_not_fit_is_refused_at_the_start(tmp_path, mesh, message):
    config = small_config()
    config.mesh = mesh
    with pytest.raises(ValueError, match=message):
        optimizer_ablation.run(config, tmp_path / "run")
