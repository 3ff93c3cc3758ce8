"""What `experiments.bench_seeds` measures, at its smallest."""

from configs import optimizer_ablation
from experiments import bench_seeds


def test_seeds_in_one_program_take_the_steps_that_they_take_in_turn():
    config = optimizer_ablation.get_config("smoke")
    config.seeds = (0, 1)
    config.prompts_per_step = 4
    figures = bench_seeds.measure(config, turns=1, calls=1)
    assert figures["seeds"] == 2
    for name in ("wall_s", "processor_s"):
        assert set(figures[name]) == {"in_turn", "vmap"}
        assert min(figures[name].values()) > 0
    wall = figures["wall_s"]
    assert figures["ratio"] == wall["vmap"] / wall["in_turn"]
    # The same draws and updates, summed in another order.
    assert figures["difference"] < 1e-3
