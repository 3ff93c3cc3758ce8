"""What the judged samples of a suite say."""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from geomjax.evaluation.bootstrap import (
    Bootstrap,
    Interval,
    interval,
    paired_interval,
    ratio_interval,
)
from geomjax.evaluation.estimators import (
    length_bins,
    majority_at_n,
    mean_at_n,
    pass_at_k,
    pass_ks,
)
from geomjax.rewards.contract import SILENT, Judgement

RIGHT = 1.0
"""The score from which a sample counts as right."""


class Sample(NamedTuple):
    """A judged completion.

    Attributes:
      judgement: What the reward says of it.
      tokens: Its length, the stop token included.
      stopped: Whether it ended by itself rather than at the limit.
    """

    judgement: Judgement
    tokens: int
    stopped: bool


Problems = Sequence[Sequence[Sample]]
"""The samples of each problem."""


class LengthBin(NamedTuple):
    """Mean score of the samples whose length is in a range.

    Attributes:
      low: Least length, in tokens.
      high: Greatest length.
      samples: How many there are.
      score: Their mean score; the interval is over problems.
    """

    low: int
    high: int
    samples: int
    score: Interval


class Summary(NamedTuple):
    """The figures of one suite, each a mean over problems with its interval.

    Samples whose judgement says nothing about them (`geomjax.rewards.contract.SILENT`)
    are left out, and so is a problem that has no other; `statuses` counts them.

    Attributes:
      samples: Most samples of a problem, n.
      mean: Mean score, mean@n.
      majority: Score of the most frequent answer; None if no answer was ever read, as
        with rewards that read none.
      passes: pass@k by k; over the problems with at least k samples.
      ended: Mean score where a sample that ended at the limit scores 0 unseen, as the
        accuracy along training counts it (`geomjax.train.evaluate`); `mean` takes the
        reward's word for it, as published evaluations do.
      truncated: Share of samples that ended at the limit.
      unparsed: Share of samples that hold no answer that could be read.
      by_length: Mean score by length of the completion.
      statuses: Number of samples by status of the judgement.
    """

    samples: int
    mean: Interval
    majority: Interval | None
    passes: dict[int, Interval]
    ended: Interval
    truncated: Interval
    unparsed: Interval
    by_length: list[LengthBin]
    statuses: dict[str, int]


def summarize(
    problems: Problems, bootstrap: Bootstrap, *, length_bin_count: int = 5
) -> Summary:
    """Computes the figures of a suite.

    Args:
      problems: The samples of each problem.
      bootstrap: How intervals are made.
      length_bin_count: Most bins of lengths.

    Returns:
      The figures.
    """
    telling = [_telling(samples) for samples in problems]
    n = max(map(len, telling), default=0)
    answered = any(s.judgement.answer is not None for p in telling for s in p)

    def over(value: Callable[[Sequence[Sample]], float]) -> Interval:
        return interval(np.array([value(samples) for samples in telling]), bootstrap)

    return Summary(
        samples=n,
        mean=over(mean_score),
        majority=over(majority_score) if answered else None,
        passes={k: over(_passes(k)) for k in pass_ks(n)} if n else {},
        ended=over(
            lambda p: mean_at_n([s.judgement.score if s.stopped else 0.0 for s in p])
        ),
        truncated=over(lambda p: mean_at_n([float(not s.stopped) for s in p])),
        unparsed=over(
            lambda p: mean_at_n(
                [float(s.judgement.status == "unparsed completion") for s in p]
            )
        ),
        by_length=_by_length(telling, length_bin_count, bootstrap),
        statuses=dict(Counter(s.judgement.status for p in problems for s in p)),
    )


def difference(first: Problems, second: Problems, bootstrap: Bootstrap) -> Interval:
    """Mean score of the second less that of the first, paired by problem.

    Args:
      first: The samples of each problem.
      second: Another model's samples of the same problems, in the same order.
      bootstrap: How the interval is made.

    Returns:
      The difference over the problems that both have samples of.
    """
    before, after = (
        np.array([mean_score(_telling(samples)) for samples in side])
        for side in (first, second)
    )
    return paired_interval(before, after, bootstrap)


def mean_score(samples: Sequence[Sample]) -> float:
    """Mean score of a problem's samples."""
    return mean_at_n([sample.judgement.score for sample in samples])


def majority_score(samples: Sequence[Sample]) -> float:
    """Score of a problem's most frequent answer."""
    judgements = [sample.judgement for sample in samples]
    return majority_at_n([j.answer for j in judgements], [j.score for j in judgements])


def _telling(samples: Sequence[Sample]) -> list[Sample]:
    return [sample for sample in samples if sample.judgement.status not in SILENT]


def _passes(k: int) -> Callable[[Sequence[Sample]], float]:
    def passes(samples: Sequence[Sample]) -> float:
        right = sum(sample.judgement.score >= RIGHT for sample in samples)
        return pass_at_k(len(samples), right, k)

    return passes


def _by_length(telling: Problems, count: int, bootstrap: Bootstrap) -> list[LengthBin]:
    samples = [
        (problem, sample.tokens, sample.judgement.score)
        for problem, group in enumerate(telling)
        for sample in group
    ]
    if not samples:
        return []
    problem, length, score = (np.array(column) for column in zip(*samples, strict=True))
    place = length_bins(length.tolist(), count)
    bins = []
    for i in range(place.max() + 1):
        inside = place == i
        sums, counts = (
            np.bincount(problem[inside], weights, minlength=len(telling))
            for weights in (score[inside], np.ones(inside.sum()))
        )
        lengths = length[inside]
        bins.append(
            LengthBin(
                int(lengths.min()),
                int(lengths.max()),
                int(inside.sum()),
                ratio_interval(sums, counts, bootstrap),
            )
        )
    return bins
