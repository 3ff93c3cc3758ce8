"""What a run of `update_geometry` leaves beside its tables: curves, record, report."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from experiments.common.record import Watch, read_record, write_record
from experiments.geometry_report import build
from experiments.geometry_report.read import CURVES_FILE, read_results
from experiments.geometry_report.settings import Settings
from geomjax.analysis import RunResult
from geomjax.analysis.curves import measure_curves
from geomjax.analysis.journal import write_atomically
from geomjax.analysis.report import ReportFiles
from geomjax.checkpoints import CheckpointSource


def finish(
    source: CheckpointSource,
    tuned: CheckpointSource,
    settings: Settings,
    result: RunResult,
    watch: Watch,
) -> ReportFiles:
    """Adds curves.json, run.json, the report and its figures to a run's tables.

    Curves that an earlier process has measured in the same way are kept: the journal of
    the folder has made sure that they are of the same checkpoints.

    Args:
        source: the checkpoint before training.
        tuned: the checkpoint after it.
        settings: how the run measured, and where.
        result: what it found, and has written to the folder.
        watch: the time and memory of this process.

    Returns:
        Paths of the report.
    """
    workdir = Path(settings.workdir)
    path = workdir / CURVES_FILE
    before = read_record(workdir)
    if not path.is_file() or before is None or not _same(before["settings"], settings):
        curves = measure_curves(
            source,
            tuned,
            result.matching.matched,
            {k: v for k, v in result.spectra.items() if k not in result.not_finite},
            delta=settings.delta,
            subtract=settings.subtract,
            seed=0 if settings.null_seeds else None,
        )
        write_atomically(path, json.dumps(curves, allow_nan=False) + "\n")
    write_record(workdir, settings._asdict(), watch, before=before)
    return build.write({"update": read_results(workdir)}, workdir)


def _same(before: Mapping[str, Any], settings: Settings) -> bool:
    """Whether two runs measure the same curves."""
    names = ("delta", "subtract", "angle_rank", "null_seeds")
    return all(before[name] == getattr(settings, name) for name in names)
