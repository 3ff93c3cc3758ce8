"""Measures a pair of checkpoints in a folder, as `update_geometry` does."""

import jax
from tqdm import tqdm

from experiments.geometry_report.settings import Settings
from geomjax import hosts
from geomjax.analysis import Metric, Row, RunResult, run
from geomjax.analysis.stacks import Stack
from geomjax.checkpoints import CheckpointSource


def measure(
    source: CheckpointSource,
    tuned: CheckpointSource,
    settings: Settings,
    metrics: tuple[Metric, ...],
    *,
    label: str = "measuring",
) -> RunResult:
    """Runs the analysis with a progress bar, on all devices of all processes.

    Args:
        source: the checkpoint before training.
        tuned: the checkpoint after it.
        settings: how to measure, and where.
        metrics: the table of metrics.
        label: what the progress bar says.

    Returns:
        The tables, as they are written to the folder.
    """
    devices = jax.local_devices()
    mesh = jax.make_mesh(
        (len(devices),),
        ("stack",),
        axis_types=(jax.sharding.AxisType.Auto,),
        devices=devices,
    )
    with tqdm(unit=" tensors", desc=label, disable=not hosts.is_main()) as bar:

        def progress(stack: Stack, rows: list[Row]) -> None:
            bar.set_postfix_str(rows[-1]["name"], refresh=False)
            bar.update(len(rows))

        return run(
            source,
            tuned,
            settings.workdir,
            delta=settings.delta,
            subtract=settings.subtract,
            metrics=metrics,
            null_seeds=range(settings.null_seeds),
            mesh=mesh if len(devices) > 1 else None,
            memory_budget=settings.memory_budget_bytes(),
            common_rows=settings.common_rows,
            progress=progress,
        )
