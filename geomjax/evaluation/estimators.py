"""Accuracy of a problem from n judged samples: mean@n, pass@k, majority@n.

All of them are numbers of one problem; the accuracy on a suite is their mean over its
problems, and `bootstrap.interval` says how well it is known.
"""

import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int64


def mean_at_n(scores: Sequence[float]) -> float:
    """Mean score of the samples; NaN without any.

    With scores of 0 and 1 this is the unbiased estimate of pass@1.
    """
    return math.fsum(scores) / len(scores) if scores else math.nan


def pass_at_k(n: int, correct: int, k: int) -> float:
    """Chance that at least one of k samples is right, estimated from n.

    The unbiased estimator `1 - C(n - c, k) / C(n, k)` (Chen et al. 2021, arXiv
    2107.03374, eq. (1)), exact in rational arithmetic before the one division.

    Args:
      n: Samples drawn.
      correct: c, how many of them are right.
      k: Samples of which one must be right.

    Returns:
      The estimate in [0, 1]; NaN where fewer than k samples were drawn, for which no
      unbiased estimate exists.

    Raises:
      ValueError: k is below 1, or `correct` not in [0, n].

    Examples:
      >>> pass_at_k(4, 1, 1), pass_at_k(4, 1, 2), pass_at_k(4, 1, 4)
      (0.25, 0.5, 1.0)
    """
    if k < 1 or not 0 <= correct <= n:
        raise ValueError(
            f"pass@{k} of {correct} right samples among {n}; expected k of 1 or more, "
            "and no more right ones than samples"
        )
    if n < k:
        return math.nan
    every = math.comb(n, k)
    return (every - math.comb(n - correct, k)) / every


def pass_ks(n: int) -> tuple[int, ...]:
    """The k that are reported for n samples: powers of 2 up to n, and n."""
    return tuple(sorted({2**i for i in range(n.bit_length())} | {n}))


def majority_at_n(answers: Sequence[str | None], scores: Sequence[float]) -> float:
    """Score of the most frequent answer among the samples (self-consistency).

    Samples without an answer do not vote. Of answers that tie for the most votes each
    is taken with the same chance, so the result is their mean score, and no order of
    the samples changes it. Samples with one answer score alike, but for a reward that
    ran out of time; the answer's score is their mean.

    Args:
      answers: What each sample answers, None where nothing can be read.
      scores: Its score.

    Returns:
      The score; 0 where no sample has an answer, NaN without samples.
    """
    if len(answers) != len(scores):
        raise ValueError(f"{len(answers)} answers with {len(scores)} scores")
    if not scores:
        return math.nan
    groups: dict[str, list[float]] = {}
    for answer, score in zip(answers, scores, strict=True):
        if answer is not None:
            groups.setdefault(answer, []).append(score)
    if not groups:
        return 0.0
    most = max(map(len, groups.values()))
    return mean_at_n([mean_at_n(g) for g in groups.values() if len(g) == most])


def length_bins(lengths: Sequence[int], count: int) -> Int64[np.ndarray, "_"]:
    """Puts completion lengths into bins of about equally many.

    Args:
      lengths: In tokens.
      count: Bins at most; equal lengths stay together, so there may be fewer.

    Returns:
      The bin of each length, from 0 for the shortest; no bin is empty.
    """
    ordered = np.sort(np.asarray(lengths, np.int64))
    starts = np.unique(ordered[np.arange(count) * len(ordered) // count])
    return np.searchsorted(starts, lengths, side="right").astype(np.int64) - 1
