"""Seeds of one arm in one program by `jax.vmap`, against the same program in turn.

    python -m experiments.bench_seeds [--json=FILE]

Takes the ablation's step of full AdamW in the tiny world (a rollout, the teacher's
scores, two updates) for all its seeds, which share shapes. Both ways see the same
prompts and keys; how far their parameters are apart after one step is printed. Times
are wall seconds and seconds of processor time, medians of turns taken alternately.

The ablation and the studies run seeds in turn, through one compiled step: this is the
measurement behind that.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
from absl import flags

from configs import optimizer_ablation
from experiments.ablation.runner import make_objective
from experiments.common import benchmarks, cli
from experiments.common.environment import environment
from experiments.common.world import load_world
from geomjax.models import hf
from geomjax.optim.build import OptimizerSpec, build
from geomjax.train.step import TrainState, init_state, make_distill_step

TURNS, CALLS = 5, 4


def main() -> None:
    """Measures, prints a table and writes what `--json` names."""
    figures = measure(optimizer_ablation.get_config(), turns=TURNS, calls=CALLS)
    print(f"{figures['seeds']} seeds, a step of each")
    for name, label in (("in_turn", "in turn"), ("vmap", "one program, vmap")):
        wall, processor = figures["wall_s"][name], figures["processor_s"][name]
        print(f"  {label:18} {1e3 * wall:8.1f} ms, {1e3 * processor:8.1f} ms of cores")
    print(
        f"  vmap takes {figures['ratio']:.2f} of the wall time and "
        f"{figures['processor_ratio']:.2f} of the processor time; parameters differ "
        f"by {figures['difference']:.1e} of how far they moved"
    )
    benchmarks.write_json({**figures, "environment": environment()})


def measure(
    config: ml_collections.ConfigDict, *, turns: int, calls: int
) -> dict[str, Any]:
    """Times both ways.

    Args:
      config: Of the ablation; its arm `adamw` is what runs.
      turns: Of each way, alternately.
      calls: Steps of all seeds in a turn.

    Returns:
      `seeds`, medians of `wall_s` and `processor_s` of a step of all seeds by way, the
      ratios of vmap to in turn, and the relative `difference` after one step.
    """
    world = load_world(config)
    optimizer = config.optimizers.adamw
    spec = OptimizerSpec(
        name=optimizer.transform,
        learning_rate=optimizer.learning_rates[0],
        clip_norm=optimizer.clip_norm,
        kwargs=optimizer.options.to_dict(),
    )
    tx = build(spec, hf.roles(world.student.model.config))
    step = make_distill_step(
        world.student.model,
        make_objective(config, world),
        tx,
        world.sampling,
        mini_batches=config.mini_batches,
    )
    together = jax.jit(jax.vmap(step, in_axes=(0, None, 0, 0)), donate_argnums=0)
    anchor, teacher = world.student.params, world.teacher.params
    batches, keys = [], []
    for seed in config.seeds:
        batch_at, lies = world.train_batches(config.prompts_per_step, seed)
        batches.append(lies.put(batch_at(0)))
        keys.append(jax.random.key(seed))
    stacked_batch, stacked_keys = _stack(batches), jnp.stack(keys)

    def begin() -> list[TrainState]:
        return [init_state(anchor, tx) for _ in config.seeds]

    states, stacked = begin(), _stack(begin())

    def in_turn() -> None:
        for i, (batch, key) in enumerate(zip(batches, keys, strict=True)):
            states[i], _ = step(states[i], teacher, batch, key)
        jax.block_until_ready(states)

    def by_vmap() -> None:
        nonlocal stacked
        stacked, _ = together(stacked, teacher, stacked_batch, stacked_keys)
        jax.block_until_ready(stacked)

    in_turn()
    by_vmap()
    moved = jax.tree.map(
        lambda new, old: new - old[None], _stack(states).params, anchor
    )
    apart = jax.tree.map(jnp.subtract, stacked.params, _stack(states).params)
    ways: dict[str, Callable[[], None]] = {"in_turn": in_turn, "vmap": by_vmap}
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for _ in range(turns):
        for name, way in ways.items():
            begun = time.perf_counter(), time.process_time()
            for _ in range(calls):
                way()
            ended = time.perf_counter(), time.process_time()
            times[name].append(
                ((ended[0] - begun[0]) / calls, (ended[1] - begun[1]) / calls)
            )
    wall, processor = (
        {name: statistics.median(t[i] for t in found) for name, found in times.items()}
        for i in (0, 1)
    )
    return {
        "seeds": len(config.seeds),
        "wall_s": wall,
        "processor_s": processor,
        "ratio": wall["vmap"] / wall["in_turn"],
        "processor_ratio": processor["vmap"] / processor["in_turn"],
        "difference": _norm(apart) / _norm(moved),
    }


def _stack(trees: list[Any]) -> Any:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def _norm(tree: Any) -> float:
    squares = [jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(tree)]
    return float(jnp.sqrt(jnp.stack(squares).sum()))


if __name__ == "__main__":
    flags.DEFINE_string("json", "", "File to write the figures to.")
    cli.main(main, cache=False)
