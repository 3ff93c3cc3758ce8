"""Geometry of the updates of one arm, as stored and as trained."""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from geomjax.analysis import DEFAULT, Row, measure, summarize
from geomjax.checkpoints import DictSource
from geomjax.models import hf
from geomjax.models.load import Loaded
from geomjax.typing import Params
from geomjax.update import Delta

METRICS = tuple(
    metric
    for metric in DEFAULT
    if metric.name
    in (
        "norms",
        "unchanged",
        "bf16_unchanged",
        "update_density",
        "delta_spectrum",
        "mask_coverage",
    )
)
"""What the report shows. Compiling takes most of a short run, and `update_geometry`
gives every other metric of the exported checkpoints."""


class ArmGeometry(NamedTuple):
    """Aggregates and tables of one arm's updates, by `stored` and `master`.

    Attributes:
      summaries: `summarize`, each number averaged over the seeds.
      rows: `measure` of the first seed.
    """

    summaries: dict[Delta, dict[str, Any]]
    rows: dict[Delta, list[Row]]


def measure_arm(anchor: Loaded, finals: Iterable[Params]) -> ArmGeometry:
    """Measures the updates from the anchor to each final model.

    `stored` compares what an exported bfloat16 checkpoint holds, subtracted in bfloat16
    as P1 does; `master` the float32 parameters as trained.

    Args:
      anchor: The student before training.
      finals: Final parameters, one a seed, taken one at a time.

    Returns:
      Aggregates and tables.
    """
    config = anchor.model.config
    source = {
        kind: DictSource(dict(hf.to_hf(anchor.params, config, convert)))
        for kind, convert in CONVERT.items()
    }
    rows: dict[Delta, list[list[Row]]] = {"stored": [], "master": []}
    for params in finals:
        for kind, convert in CONVERT.items():
            tuned = DictSource(dict(hf.to_hf(params, config, convert)))
            rows[kind].append(measure(source[kind], tuned, delta=kind, metrics=METRICS))
    return ArmGeometry(
        summaries={
            kind: mean_of([summarize(table, METRICS) for table in tables])
            for kind, tables in rows.items()
        },
        rows={kind: tables[0] for kind, tables in rows.items()},
    )


CONVERT: dict[Delta, Callable[[np.ndarray], np.ndarray]] = {
    "stored": lambda array: array.astype(ml_dtypes.bfloat16),
    "master": lambda array: array,
}


def mean_of(trees: list[Any]) -> Any:
    """Mean of every number in a list of nested dicts of one shape; nulls are left out.

    A number that is null for every seed stays null.
    """
    first = trees[0]
    if isinstance(first, dict):
        return {key: mean_of([tree[key] for tree in trees]) for key in first}
    if isinstance(first, (list, str)):
        return first
    values = [value for value in trees if value is not None]
    return float(np.mean(values)) if values else None
