"""A trace of a few steps, to be looked at in TensorBoard."""

import re
from pathlib import Path
from typing import NamedTuple

import jax

_STEPS = re.compile(r"([0-9]+):([0-9]+)")


class ProfileSteps(NamedTuple):
    """The steps of which a trace is made.

    Attributes:
      first: Steps done when it begins.
      last: Steps done when it ends.
    """

    first: int
    last: int


def parse_steps(text: str) -> ProfileSteps | None:
    """Reads steps such as `10:15`; nothing is traced for an empty text.

    Raises:
      ValueError: It cannot be read, or ends before it begins.
    """
    if not text:
        return None
    found = _STEPS.fullmatch(text)
    if found is None or int(found[1]) >= int(found[2]):
        raise ValueError(
            f"profile_steps {text!r}: expected first:last, such as '10:15' for the "
            "five steps after the tenth"
        )
    return ProfileSteps(int(found[1]), int(found[2]))


class Profiler:
    """Starts and ends JAX's profiler between steps; every process traces its host.

    A program that is compiled within the steps is part of the trace, so the first step
    of a process is best left out.
    """

    def __init__(self, directory: Path, steps: ProfileSteps | None):
        """Sets what to trace.

        Args:
          directory: TensorBoard's folder of the run.
          steps: What to trace, if anything.
        """
        self._directory, self._steps = directory, steps
        self._running = False

    def between(self, done: int, state: object) -> None:
        """To be called before each step with the steps done and the state after them.

        A run that was resumed within the steps traces the rest of them.
        """
        if self._steps is None:
            return
        inside = self._steps.first <= done < self._steps.last
        if inside and not self._running:
            jax.profiler.start_trace(str(self._directory))
            self._running = True
        elif self._running and not inside:
            jax.block_until_ready(state)
            self.close()

    def close(self) -> None:
        """Ends a trace that is running, and writes it."""
        if self._running:
            self._running = False
            jax.profiler.stop_trace()
