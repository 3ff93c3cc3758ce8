"""The input pipeline: batches made ahead of the steps that take them, by grain."""

import time
from collections.abc import Callable
from typing import Any, Generic, NamedTuple, TypeVar

import grain

T = TypeVar("T")

_STEPS = 1 << 62
"""Length of the source: no run is so long."""


class Wait(NamedTuple):
    """How long steps have waited for their batches.

    Attributes:
      batches: Batches taken.
      total_s: Seconds waited, together.
      longest_s: Of the batch that was waited for longest. The first of a run, and the
        first after a jump, cannot be made ahead.
    """

    batches: int
    total_s: float
    longest_s: float


class Pipeline(Generic[T]):
    """Batches in the order of their steps, the next ones made while a step runs.

    What a step gets is a function of its number alone, so that threads change nothing,
    and a run resumes at the exact example: the state is the next step's number. Where
    several processes share a batch, each makes its own rows (`Shard`), and what all of
    them make together does not depend on how many they are.

    Use as a context manager, or call `close`, which ends the threads.

    Args:
      batch_at: From a step (0, 1, 2, ...) to its batch; called in threads.
      ahead: Batches kept ready.
      threads: Batches made at the same time. Python code alone gains nothing from more
        than one; reading files and decoding images do.
    """

    def __init__(
        self, batch_at: Callable[[int], T], *, ahead: int = 2, threads: int = 1
    ):
        if ahead < 1 or threads < 1:
            raise ValueError(
                f"pipeline: got {ahead} batches ahead and {threads} threads, expected "
                "1 or more of both"
            )
        options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=ahead)
        source = grain.MapDataset.source(_Steps(batch_at))
        self._iterator = iter(source.to_iter_dataset(options))
        self._iterator.start_prefetch()
        self._next = 0
        self.wait = Wait(0, 0.0, 0.0)

    def at(self, step: int) -> T:
        """The batch of a step; at once if the steps are taken in turn."""
        if step != self._next:
            self.set_state({"next_index": step})
        start = time.perf_counter()
        batch = next(self._iterator)
        waited_s = time.perf_counter() - start
        self._next += 1
        self.wait = Wait(
            self.wait.batches + 1,
            self.wait.total_s + waited_s,
            max(self.wait.longest_s, waited_s),
        )
        return batch

    def get_state(self) -> dict[str, Any]:
        """What `set_state` takes to go on from here; JSON can hold it."""
        state: dict[str, Any] = self._iterator.get_state()
        return state

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes to where another pipeline with the same batches was."""
        self._iterator.set_state(state)
        self._next = int(state["next_index"])

    def close(self) -> None:
        """Ends the threads; batches that were made ahead are dropped."""
        self._iterator.close()

    def __enter__(self) -> "Pipeline[T]":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Steps(Generic[T]):
    """Batches as the random-access source that grain reads."""

    def __init__(self, batch_at: Callable[[int], T]):
        self._batch_at = batch_at

    def __len__(self) -> int:
        return _STEPS

    def __getitem__(self, step: int) -> T:
        return self._batch_at(int(step))
