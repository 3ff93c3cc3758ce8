"""Measures two checkpoints in memory, without files."""

import jax

from geomjax.analysis.large import MAX_FACTOR_DIM, is_large, measure_large
from geomjax.analysis.measure import Row, StackPlan, load, measure_stack, to_rows
from geomjax.analysis.metric import Metric
from geomjax.analysis.metrics import DEFAULT, with_norms
from geomjax.analysis.stacks import plan_stacks
from geomjax.checkpoints import CheckpointSource, match
from geomjax.update import Delta, Subtract, delta_dtype


def measure(
    source: CheckpointSource,
    tuned: CheckpointSource,
    *,
    delta: Delta = "stored",
    subtract: Subtract = "bfloat16",
    metrics: tuple[Metric, ...] = DEFAULT,
    memory_budget: int = 1 << 30,
    max_factor_dim: int = MAX_FACTOR_DIM,
) -> list[Row]:
    """Measures two checkpoints that fit into memory, in one process and without files.

    `geomjax.analysis.run` does the same for checkpoints of any size. Programs are
    compiled for each short side, and found again by later calls.

    Args:
        source: the checkpoint before training.
        tuned: the checkpoint after it.
        delta: `stored` bfloat16 values, or `master` values as they are.
        subtract: rounding of a stored difference, see `geomjax.update.form`.
        metrics: the table of metrics.
        memory_budget: bytes for a stack of tensors.
        max_factor_dim: see `geomjax.analysis.run`.

    Returns:
        One row for each matched tensor, in the source's order.
    """
    plan = StackPlan(delta, subtract, with_norms(metrics))
    delta_dtype(delta, subtract)
    matched = match(source, tuned).matched
    stacks = plan_stacks(
        source,
        tuned,
        matched,
        memory_budget=memory_budget,
        devices=1,
        max_factor_dim=max_factor_dim,
    )
    rows: dict[str, Row] = {}
    with jax.enable_x64(True):
        for stack in stacks:
            loaded = load(source, tuned, stack, plan)
            if is_large(stack, max_factor_dim):
                found = [measure_large(stack, loaded, plan)]
            else:
                found = to_rows(stack, plan, measure_stack(stack, loaded, plan))
            rows |= {row["name"]: row for row in found}
    return [rows[item.name] for item in matched]
