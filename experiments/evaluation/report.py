"""The report of an evaluation: figures with intervals, and every generation."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from experiments.evaluation.generations import Generation
from experiments.evaluation.suites import Suite
from geomjax.analysis.report import (
    Browser,
    Code,
    Column,
    Entry,
    Facts,
    Report,
    ReportFiles,
    Table,
    write_report,
)
from geomjax.evaluation.bootstrap import Bootstrap, Interval
from geomjax.evaluation.summary import RIGHT, Summary

SHOWN_CHARACTERS = 6_000
"""Of a longer text the page shows the beginning and the end; the files hold it all."""

SHOWN_GENERATIONS = 2_000
"""Most generations of one suite and model in the page."""


class Result(NamedTuple):
    """One suite and model.

    Attributes:
      suite: The suite.
      model: What the model is called.
      summary: The figures.
      generations: What they are computed from.
    """

    suite: Suite
    model: str
    summary: Summary
    generations: Sequence[Generation]


def write(
    workdir: Path,
    results: Sequence[Result],
    differences: Mapping[str, Interval],
    bootstrap: Bootstrap,
    facts: Mapping[str, Any],
    command: str,
) -> ReportFiles:
    """Writes `report.html` and `report.md`.

    Args:
      workdir: The run's folder.
      results: Every suite and model.
      differences: By suite, the second model's mean score less the first's.
      bootstrap: How intervals were made.
      facts: The configuration and what else the result depends on.
      command: The command line.

    Returns:
      The files.
    """
    first = results[0]
    report = Report(
        "Evaluation",
        f"{first.suite.name}: mean@{first.summary.samples} of {first.model} is "
        f"{shown(first.summary.mean)} over {first.summary.mean.problems} problems.",
    )
    intervals = (
        f"In brackets: {bootstrap.confidence:.0%} bootstrap intervals over problems "
        f"(expanded percentile, {bootstrap.resamples:,} resamples, seed "
        f"{bootstrap.seed}); none where all problems score alike, as they "
        "show no spread."
    )
    section = report.section("Accuracy", intervals)
    section.add(_accuracy(results), _passes(results))
    if differences:
        section.add(_differences(differences))
    report.section("By length of the completion", _lengths(results))
    report.section("Completions and judgements", *_rates(results))
    browsed = report.section("Generations")
    for result in results:
        browsed.add(_browser(result))
    report.section("Setup", Code(command), *(Facts(n, f) for n, f in facts.items()))
    return write_report(report, workdir)


def shown(interval: Interval | None) -> str:
    """A share with its interval, such as `35.2% [30.1, 40.3]`."""
    if interval is None or interval.problems == 0:
        return "–"
    if interval.low != interval.low:
        return f"{interval.mean:.1%}"
    low, high = 100 * interval.low, 100 * interval.high
    return f"{interval.mean:.1%} [{low:.1f}, {high:.1f}]"


_NAMES = [Column("suite", "left"), Column("model", "left")]


def _table(titles: Sequence[str], rows: Sequence[Sequence[Any]], caption: str) -> Table:
    return Table([*_NAMES, *map(Column, titles)], rows, caption)


def _accuracy(results: Sequence[Result]) -> Table:
    rows = [
        [
            result.suite.name,
            result.model,
            result.summary.mean.problems,
            result.summary.samples,
            shown(result.summary.mean),
            shown(result.summary.ended),
            shown(result.summary.majority),
        ]
        for result in results
    ]
    return _table(
        ["problems", "n", "mean@n", "mean@n, cut off: 0", "majority@n"],
        rows,
        "Mean score of the samples, cut off or not; the same where a sample that ended "
        "at the limit of tokens scores 0, as the accuracy along training counts it; "
        "score of the most frequent answer (ties count as the mean of the tied).",
    )


def _passes(results: Sequence[Result]) -> Table:
    ks = sorted({k for result in results for k in result.summary.passes})
    rows = [
        [
            result.suite.name,
            result.model,
            *(shown(result.summary.passes.get(k)) for k in ks),
        ]
        for result in results
    ]
    return _table(
        [f"pass@{k}" for k in ks],
        rows,
        "Chance that one of k samples is right: 1 - C(n - c, k) / C(n, k).",
    )


def _differences(differences: Mapping[str, Interval]) -> Table:
    def points(difference: Interval) -> str:
        if difference.low != difference.low:
            return "–" if not difference.problems else f"{100 * difference.mean:+.1f}"
        ends = 100 * difference.low, 100 * difference.high
        return f"{100 * difference.mean:+.1f} [{ends[0]:+.1f}, {ends[1]:+.1f}]"

    return Table(
        [Column("suite", "left"), Column("problems"), Column("difference (points)")],
        [[name, d.problems, points(d)] for name, d in differences.items()],
        "Mean score of --compare less that of --checkpoint, paired by problem.",
    )


def _lengths(results: Sequence[Result]) -> Table:
    rows = [
        [
            result.suite.name,
            result.model,
            f"{bin.low}-{bin.high}",
            bin.samples,
            shown(bin.score),
        ]
        for result in results
        for bin in result.summary.by_length
    ]
    return _table(
        ["tokens", "samples", "mean score"],
        rows,
        "Samples in bins of about equal size by their length.",
    )


def _rates(results: Sequence[Result]) -> list[Table]:
    statuses = sorted({s for r in results for s in r.summary.statuses})
    shares = [
        [r.suite.name, r.model, shown(r.summary.truncated), shown(r.summary.unparsed)]
        for r in results
    ]
    counts = [
        [r.suite.name, r.model, *(r.summary.statuses.get(s, 0) for s in statuses)]
        for r in results
    ]
    return [
        _table(
            ["truncated", "no answer read"],
            shares,
            "Share of samples that ended at the limit of tokens, and of those whose "
            "form hides their answer from the reward.",
        ),
        _table(
            statuses,
            counts,
            "Samples by status. `failed` (the reward raised or its process ended) and "
            "`unparsed reference` are left out of every figure; `timed out` is wrong.",
        ),
    ]


def _browser(result: Result) -> Browser:
    name = f"{result.suite.name}, {result.model}"
    chosen = result.generations[:SHOWN_GENERATIONS]
    return Browser(
        [_entry(result.suite, generation) for generation in chosen],
        f"{name}: {len(chosen)} of {len(result.generations)} generations, without the "
        f"middle of texts above {SHOWN_CHARACTERS} characters. The JSONL files of this "
        "folder hold everything.",
    )


def _entry(suite: Suite, generation: Generation) -> Entry:
    judgement = generation.judged.judgement
    right = "correct" if judgement.score >= RIGHT else "incorrect"
    labels = (
        right,
        judgement.status,
        *(() if generation.judged.stopped else ("truncated",)),
    )
    example = suite.examples[generation.problem]
    prompt = example.prompt
    if not isinstance(prompt, str):
        prompt = "\n\n".join(f"{m.role}: {m.content}" for m in prompt)
    return Entry(
        f"problem {generation.problem}, sample {generation.sample}: {right} "
        f"({generation.judged.tokens} tokens)",
        labels,
        {
            "prompt": _cut(prompt),
            "completion": _cut(generation.text),
            "judgement": f"{judgement.score:g}, {judgement.status}: {judgement.reason}",
            "expected": _cut(example.answer or ""),
        },
    )


def _cut(text: str) -> str:
    if len(text) <= SHOWN_CHARACTERS:
        return text
    half = SHOWN_CHARACTERS // 2
    left_out = len(text) - 2 * half
    return f"{text[:half]}\n[... {left_out} characters ...]\n{text[-half:]}"
