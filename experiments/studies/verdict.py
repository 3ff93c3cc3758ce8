"""A claim of a paper, with a statistic and a threshold that were fixed beforehand."""

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

from geomjax.analysis.report import Claim, Estimate

Side = Literal["above", "below"]
SEEDS_THAT_AGREE = 3
"""From how many seeds on they can be said to agree; two do so too easily."""


class Verdict(NamedTuple):
    """One claim and what the seeds say of it.

    It holds if the 95 % Student interval of the statistic's mean over seeds lies on
    the side of the threshold that the claim says, and does not hold if it lies on the
    other. An interval that contains the threshold decides nothing, nor does one seed,
    which has none.

    Attributes:
      claim: The paper's sentence, in our words.
      source: Where the paper says it.
      statistic: What was computed of each seed, with its unit.
      side: On which side of the threshold the claim puts it.
      threshold: The number.
      samples: The statistic of each seed; None where it is undefined.
    """

    claim: str
    source: str
    statistic: str
    side: Side
    threshold: float
    samples: tuple[float | None, ...]

    @property
    def estimate(self) -> Estimate:
        """Mean and interval over the seeds."""
        known = [s for s in self.samples if s is not None and math.isfinite(s)]
        return Estimate.from_samples(known)

    @property
    def holds(self) -> bool | None:
        """The verdict; None where nothing is decided, as where a seed is undefined."""
        mean, half = self.estimate
        undefined = any(s is None or not math.isfinite(s) for s in self.samples)
        if half is None or undefined or abs(mean - self.threshold) <= half:
            return None
        return (mean > self.threshold) == (self.side == "above")

    def shown(self) -> Claim:
        """As reports show it."""
        mean, half = self.estimate
        interval = "no interval with one seed" if half is None else f"± {half:.3g}"
        listed = ", ".join(
            "undefined" if s is None or not math.isfinite(s) else f"{s:.3g}"
            for s in self.samples
        )
        evidence = (
            f"{self.statistic}: {mean:.3g} ({interval}; seeds: {listed}); threshold: "
            f"the interval {self.side} {self.threshold:g}"
        )
        if half is not None and abs(mean - self.threshold) <= half:
            evidence += ", which contains it: not decided"
        return Claim(f"{self.claim} ({self.source})", self.holds, evidence)

    def record(self) -> dict[str, Any]:
        """Its entry in results.json."""
        mean, half = self.estimate
        return {
            **self._asdict(),
            "samples": [
                s if s is not None and math.isfinite(s) else None for s in self.samples
            ],
            "mean": mean if math.isfinite(mean) else None,
            "half_width": half,
            "holds": self.holds,
        }


class Spread(NamedTuple):
    """A claim that the seeds agree, which no interval of a mean can test.

    It holds if the largest sample less the smallest is below the threshold, and does
    not otherwise. Fewer than three seeds, or an undefined one, decide nothing.

    Attributes:
      claim: As of a `Verdict`, and so are the others.
      source: Where the paper says it.
      statistic: What was computed of each seed, with its unit.
      threshold: What the seeds' range must be below.
      samples: The statistic of each seed; None where it is undefined.
    """

    claim: str
    source: str
    statistic: str
    threshold: float
    samples: tuple[float | None, ...]

    @property
    def range(self) -> float | None:
        """Largest less smallest; None where a seed is undefined or there is but one."""
        known = [s for s in self.samples if s is not None and math.isfinite(s)]
        if len(known) < max(2, len(self.samples)):
            return None
        return max(known) - min(known)

    @property
    def holds(self) -> bool | None:
        """The verdict; None where nothing is decided."""
        apart = self.range
        if apart is None or len(self.samples) < SEEDS_THAT_AGREE:
            return None
        return apart < self.threshold

    def shown(self) -> Claim:
        """As reports show it."""
        apart = self.range
        found = "undefined" if apart is None else f"{apart:.3g}"
        listed = ", ".join(
            "undefined" if s is None else f"{s:.3g}" for s in self.samples
        )
        evidence = (
            f"{self.statistic}, largest less smallest: {found} (seeds: {listed}); "
            f"threshold: below {self.threshold:g}, of at least {SEEDS_THAT_AGREE} seeds"
        )
        return Claim(f"{self.claim} ({self.source})", self.holds, evidence)

    def record(self) -> dict[str, Any]:
        """Its entry in results.json."""
        known = [
            s if s is not None and math.isfinite(s) else None for s in self.samples
        ]
        return {
            **self._asdict(),
            "samples": known,
            "range": self.range,
            **self.shown()._asdict(),
        }


def differences(
    first: Sequence[float | None], second: Sequence[float | None]
) -> tuple[float | None, ...]:
    """`first - second`, seed by seed; None where either is undefined."""
    return tuple(
        None if a is None or b is None else a - b
        for a, b in zip(first, second, strict=True)
    )
