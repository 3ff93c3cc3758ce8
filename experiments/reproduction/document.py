"""REPRODUCTION.md: the papers' tables and figures, ours beside theirs, and claims."""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from experiments.published.tables import PublishedColumn
from experiments.reproduction.items import Item, load_items
from experiments.reproduction.plan import MIDSIZE, Entry, sizes
from experiments.reproduction.results import Results, measured
from geomjax.analysis.report import Cell, Claims, Code, Column, Table
from geomjax.analysis.report.markdown import escape_markdown, render_block

NAME = "REPRODUCTION.md"
FIGURES = "figures"
PAPERS = {
    "P1": "Dense Supervision, Sparse Updates (P1, arXiv 2606.13657)",
    "P2": "On the Geometry of On-Policy Distillation (P2, arXiv 2606.07082)",
    "ours": "Beyond the papers",
}
LEAD = (
    "Every table and figure of the two papers, with what this project's small worlds "
    "give beside what they print. The papers' models have 1 to 14 billion parameters "
    "and are not at hand; the bundled world has a width of 128 and a task of its own, "
    "and the others (136 tokens; width 256; drawn shapes) are hardly larger, so "
    "numbers cannot agree, and what is compared is orders and signs. Studies differ in "
    "their number of updates: see their commands. A claim has a statistic and a "
    "threshold, mostly written down before a run; some were added or made stricter "
    "after first results, and none was made easier. It holds if the 95 % interval over "
    "seeds lies beyond the threshold, and does not if it lies on the other side, which "
    "is a finding; an interval that contains the threshold decides nothing. Each is "
    "tested by itself: of twenty that lie exactly on their thresholds about one would "
    "be decided by chance."
)
LARGE = (
    "Studies named midsize, where there are any, are of one seed and 104 million "
    "parameters; their claims are not counted."
)
UNIT_NOTE = (
    "Papers' rows are their single runs; ours are means over seeds. Stored: "
    "updates as bfloat16 checkpoints hold them. Master: of the float32 parameters."
)


class Status(NamedTuple):
    """What became of a study.

    Attributes:
      entry: The study.
      state: `finished`, `not run`, or what went wrong.
      wall_s: Seconds that it took over all starts; None where not known.
      cpu_s: Seconds of processor time, likewise.
    """

    entry: Entry
    state: str
    wall_s: float | None
    cpu_s: float | None


def write_document(
    workdir: Path,
    statuses: Sequence[Status],
    found: Mapping[str, Results],
    command: str,
    *,
    total: tuple[float | None, float | None],
    smoke: bool,
) -> Path:
    """Writes the document and the figures that it shows.

    Args:
      workdir: Folder of the lot; gets `REPRODUCTION.md` and `figures`.
      statuses: What became of each study.
      found: Finished studies, by name.
      command: The command that makes it again.
      total: Seconds that the lot took, and its processor time; None where not known.
      smoke: Whether the studies were run at their smallest.

    Returns:
      Path of the document.
    """
    parts = ["# Reproduction", escape_markdown(LEAD if smoke else f"{LEAD} {LARGE}")]
    if smoke:
        parts.append(
            "**A smoke run: every study at its smallest, those named midsize in the "
            "bundled world and their claims not counted. Its numbers mean nothing.**"
        )
    parts += ["## How it was made", render_block(Code(command))]
    parts += [_statuses(statuses, found, total, smoke=smoke), _environment(found)]
    parts += ["## Claims", *_claims(statuses, found)]
    items = load_items()
    for paper, title in PAPERS.items():
        parts += [f"## {title}", UNIT_NOTE if paper != "ours" else ""]
        for item in items:
            if item.paper == paper:
                parts += _item(item, workdir, found)
    path = workdir / NAME
    temporary = path.with_suffix(".tmp")
    temporary.write_text("\n\n".join(filter(None, parts)) + "\n", encoding="utf-8")
    temporary.replace(path)
    return path


def _statuses(
    statuses: Sequence[Status],
    found: Mapping[str, Results],
    total: tuple[float | None, float | None],
    *,
    smoke: bool,
) -> str:
    columns = [Column(t, align="left") for t in ("study", "command", "outcome", "code")]
    columns += [Column("wall time, s", spec=".0f"), Column("CPU time, s", spec=".0f")]
    rows: list[list[Cell]] = [
        [
            s.entry.name,
            s.entry.command(smoke=smoke),
            s.state,
            found[s.entry.name].code() if s.entry.name in found else "",
            s.wall_s,
            s.cpu_s,
        ]
        for s in statuses
    ]
    rows.append(["the lot", "", "", "", *total])
    caption = (
        "Times are of the processes that this command started, with compiling and "
        "measuring, of all its starts; a study that was finished before has none, and "
        "several that run at once share the lot's wall time. Code: the commits that a "
        "study ran at, + for changed files."
    )
    return render_block(Table(columns, rows, caption))


def _environment(found: Mapping[str, Results]) -> str:
    """Versions and machine of the studies, each that occurs once."""
    lines = dict.fromkeys(
        ", ".join(f"{name} {value}" for name, value in environment.items())
        for environment in (results.record["environment"] for results in found.values())
    )
    return escape_markdown("; ".join(lines))


def _claims(statuses: Sequence[Status], found: Mapping[str, Results]) -> list[str]:
    claims = {name: results.claims() for name, results in found.items()}
    large = {entry.name for entry in MIDSIZE}
    every = [c.holds for name in claims.keys() - large for c in claims[name]]
    parts = [
        f"Of {len(every)} claims, ours and checks among them, {every.count(True)} "
        f"hold, {every.count(False)} do not, and {every.count(None)} are undecided."
    ]
    for status in statuses:
        if listed := claims.get(status.entry.name):
            parts += [f"### {status.entry.name}", render_block(Claims(listed))]
    return parts


def _item(item: Item, workdir: Path, found: Mapping[str, Results]) -> list[str]:
    parts = [f"### {_heading(item)}"]
    if item.columns:
        parts.append(render_block(_table(item, found)))
    elif item.note:
        parts.append(escape_markdown(item.note))
    if item.missing:
        parts.append(escape_markdown(f"Not reproduced: {item.missing}"))
    for figure in item.figures:
        study, _, name = figure.partition("/")
        parts += [
            _figure(found[of], of, name, workdir)
            for of in sizes(study)
            # The midsize form of a study has fewer figures.
            if of in found and (of == study or _picture(found[of], name).exists())
        ]
    needed = {o.study for o in item.ours} | {f.split("/")[0] for f in item.figures}
    if absent := sorted(needed - found.keys()):
        parts.append(f"Not there yet: {escape_markdown(', '.join(absent))}.")
    return parts


def _heading(item: Item) -> str:
    if item.paper == "ours":
        return item.title
    return f"{item.paper}, {item.name}: {item.title}"


def _table(item: Item, found: Mapping[str, Results]) -> Table:
    columns = [Column(title, align="left") for title in ("", "of", "update")]
    columns += [Column(c.title, spec=f".{c.decimals}f") for c in item.columns]
    rows: list[list[Cell]] = [
        [label, "the paper", "", *numbers] for label, numbers in item.published.items()
    ]
    for ours in item.ours:
        for study in sizes(ours.study):
            if study not in found:
                continue
            for kind in item.kinds:
                values = found[study].values(ours.at, kind)
                if values is None:
                    continue
                numbers = [measured(column, values) for column in item.columns]
                shown = kind if _of_update(item.columns) else ""
                rows.append([ours.label, study, shown, *numbers])
    return Table(columns, rows, item.note)


def _of_update(columns: Sequence[PublishedColumn]) -> bool:
    """Whether some column is of the update, stored or as trained."""
    paths = [path for column in columns for path in column.value]
    return any(path.startswith(("global/", "groups/")) for path in paths)


def _figure(results: Results, study: str, name: str, workdir: Path) -> str:
    source = _picture(results, name)
    if not source.exists():
        return f"No figure: {escape_markdown(f'{study}/{name}')} was not drawn."
    target = workdir / FIGURES / f"{study}-{name}.png"
    target.parent.mkdir(exist_ok=True)
    shutil.copyfile(source, target)
    return f"![{escape_markdown(f'{study}: {name}')}]({FIGURES}/{target.name})"


def _picture(results: Results, name: str) -> Path:
    return results.folder / FIGURES / f"{name}.png"
