"""A reward by its name, as a function that judges batches and counts what it met."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

from geomjax.data.prompts import Example
from geomjax.rewards.contract import Judgement, Status
from geomjax.rewards.exact import exact
from geomjax.rewards.pool import RewardPool

REWARDS = {
    "choice": "geomjax.rewards.choice:multiple_choice",
    "code": "geomjax.rewards.code:code",
    "layout": "geomjax.rewards.layout:layout",
    "math": "geomjax.rewards.mathematics:mathematics",
}
"""Rewards by name; `exact` is one too, and any other is `package.module:function`."""


class Judge:
    """Judges the completions of a batch with one reward, each in its own time.

    What a reward raises, or exceeds its time with, costs the one sample, and is counted
    here with the first reason of each kind. Rewards run in a `RewardPool`; `exact`,
    which can neither hang nor raise, runs where it is called.

    Use as a context manager, or call `close`.

    Attributes:
      counts: Judgements so far by status.
      reasons: The first reason of each status but `judged`.

    Args:
      reward: `exact`, a name in `REWARDS`, or `package.module:function`.
      workers: Processes.
      timeout_s: Seconds that one judgement may take.
      settings: Keyword arguments of the reward, as JSON can hold them.

    Raises:
      ValueError: There is no such reward.
    """

    def __init__(
        self,
        reward: str,
        *,
        workers: int = 2,
        timeout_s: float = 10.0,
        settings: Mapping[str, Any] | None = None,
    ):
        if reward != "exact" and reward not in REWARDS and ":" not in reward:
            raise ValueError(
                f"reward {reward!r}; known: {', '.join(sorted(('exact', *REWARDS)))}, "
                "or the import path of a function, package.module:function"
            )
        self.counts: Counter[Status] = Counter()
        self.reasons: dict[Status, str] = {}
        self._resources = ExitStack()
        self._judge: Callable[[Sequence[Example], Sequence[str]], list[Judgement]]
        if reward == "exact":
            self._judge = lambda examples, texts: list(map(exact, examples, texts))
        else:
            pool = RewardPool(
                REWARDS.get(reward, reward),
                workers=workers,
                timeout_s=timeout_s,
                settings=settings,
            )
            self._judge = self._resources.enter_context(pool).judge

    def __call__(
        self, examples: Sequence[Example], completions: Sequence[str]
    ) -> list[Judgement]:
        """Judges completions, each with its example.

        Returns:
          One judgement for each, in their order; those whose status is in
          `contract.SILENT` say nothing about the completion.
        """
        if len(examples) != len(completions):
            raise ValueError(
                f"judge: got {len(examples)} examples and {len(completions)} "
                "completions; expected one example for each completion"
            )
        found = self._judge(examples, completions)
        for judgement in found:
            self.counts[judgement.status] += 1
            if judgement.status != "judged":
                self.reasons.setdefault(judgement.status, judgement.reason)
        return found

    def unusable(self, examples: Sequence[Example]) -> list[tuple[Example, str]]:
        """The examples whose own answers cannot be read, each with the reason.

        To be asked once over a data set: no completion of theirs could be right. They
        are found by judging an empty completion, and do not count.
        """
        found = self._judge(examples, [""] * len(examples))
        return [
            (example, judgement.reason)
            for example, judgement in zip(examples, found, strict=True)
            if judgement.status == "unparsed reference"
        ]

    def notes(self) -> list[str]:
        """What a person should know of the judgements so far, a line for each kind."""
        return [
            f"reward: {count} judgements {status}; the first: {self.reasons[status]}"
            for status, count in sorted(self.counts.items())
            if status not in ("judged", "unparsed completion")
        ]

    def close(self) -> None:
        """Ends the processes."""
        self._resources.close()

    def __enter__(self) -> "Judge":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
