"""The files of a run: tensors.csv, parts.csv, summary.json, matching.json.

parts.csv holds every aggregate, of the update and of its nulls, over the model, its
groups, modules and layers. summary.json is for reading and for scripts: the aggregates
over the model and its groups, those of nulls over the model, and of each module and
layer the columns in `HEADLINES`.
"""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from geomjax.analysis.aggregate import Summary
from geomjax.analysis.journal import write_atomically
from geomjax.analysis.large import BOUND_SUFFIX
from geomjax.analysis.measure import IDENTITY, Row, table_columns
from geomjax.analysis.metric import Metric


def write_tables(
    workdir: Path,
    rows: Sequence[Row],
    metrics: Sequence[Metric],
    matching: Mapping[str, Any],
    summary: Summary,
) -> None:
    """Writes the files, summary.json last.

    Args:
        workdir: their folder.
        rows: the tensors.
        metrics: the table that they were measured by.
        matching: matching.json.
        summary: every aggregate.
    """
    names = [c.name for c in table_columns(metrics)]
    bounds = [name + BOUND_SUFFIX for name in names]
    bounds = [bound for bound in bounds if any(bound in row for row in rows)]
    columns = [*IDENTITY, *names, *bounds, "notes"]
    write_atomically(workdir / "tensors.csv", to_csv(rows, columns))
    write_atomically(workdir / "parts.csv", parts_csv(summary))
    documents = {"matching": matching, "summary": lean(summary)}
    for name, content in documents.items():
        text = json.dumps(content, indent=1, allow_nan=False) + "\n"
        write_atomically(workdir / f"{name}.json", text)


HEADLINES = (
    "tensors",
    "numel",
    "energy_share",
    "relative_frobenius",
    "exact_zero_fraction",
    "unchanged_atol_1e-05",
    "bf16_unchanged_fraction",
    "principal_coverage_0.10",
    "low_magnitude_coverage_0.10",
)
"""What summary.json says of each module and layer; of matrices also the medians of:"""
HEADLINE_MEDIANS = (
    "stable_rank",
    "top_energy_16",
    "left_energy_0.10",
    "right_energy_0.10",
    "subspace_rotation_0.10",
)
_KINDS = {"groups": "group", "modules": "module", "layers": "layer"}


def lean(summary: Summary) -> Summary:
    """What summary.json holds of a run's aggregates; the rest is in parts.csv."""
    out = summary | {
        "groups": {name: _without_mean(p) for name, p in summary["groups"].items()},
        "modules": {name: _headlines(p) for name, p in summary["modules"].items()},
        "layers": {name: _headlines(p) for name, p in summary["layers"].items()},
    }
    if "null" in summary:
        nulls = _nulls(summary).items()
        out["null"] = {kind: {"global": null["global"]} for kind, null in nulls}
    return out


def _nulls(summary: Summary) -> dict[str, Summary]:
    return summary["null"] if "null" in summary else {}


def _without_mean(part: Summary) -> Summary:
    return {key: value for key, value in part.items() if key != "mean"}


def _headlines(part: Summary) -> Summary:
    out = {key: part[key] for key in HEADLINES if key in part}
    median = part["median"]
    return out | {"median": {k: median[k] for k in HEADLINE_MEDIANS if k in median}}


def parts_csv(summary: Summary) -> str:
    """Every aggregate as a row: `of` (update or a null), `kind`, `part` and columns."""
    sources = {"update": summary, **_nulls(summary)}
    rows = []
    for of, whole in sources.items():
        rows.append({"of": of, "kind": "global", "part": "", **_flat(whole["global"])})
        for key, kind in _KINDS.items():
            for name, part in whole[key].items():
                rows.append({"of": of, "kind": kind, "part": name, **_flat(part)})
    columns = list(dict.fromkeys(column for row in rows for column in row))
    return to_csv(rows, columns)


def _flat(part: Summary) -> Summary:
    """Pooled columns by their names; `median_` and `mean_` before those of matrices."""
    out: Summary = {}
    for key, value in part.items():
        if isinstance(value, dict):
            out |= {f"{key}_{column}": number for column, number in value.items()}
        else:
            out[key] = value
    return out


def to_csv(rows: Sequence[Row], columns: Sequence[str]) -> str:
    """Rows as CSV: numbers as Python prints them, null and absent as an empty field."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(columns)
    for row in rows:
        writer.writerow([_field(row[c]) if c in row else "" for c in columns])
    return out.getvalue()


def _field(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, list):
        return json.dumps(value)
    return value if isinstance(value, str) else repr(value)
