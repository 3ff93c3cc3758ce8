"""Being told to end: noticed between two steps, by all processes at the same one."""

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

from geomjax import hosts


class PreemptionNotice:
    """Takes SIGTERM, and the first SIGINT, as the wish to save and end.

    While it is entered, they no longer end the process; the loop asks at each step.
    What comes after the last step is raised again when it is left. A second SIGINT
    raises KeyboardInterrupt as ever. Among several processes it is enough
    that one is told: JAX's coordination service, which takes SIGTERM there, makes all
    of them stop at the same step.
    """

    def __init__(self) -> None:
        self._told: int | None = None
        self._before: dict[int, Any] = {}

    def requested(self) -> bool:
        """Whether to stop now; to be asked once a step, by every process."""
        return hosts.preempted() if hosts.count() > 1 else self._told is not None

    def __enter__(self) -> "PreemptionNotice":
        # Elsewhere Python sets no handlers, and signals do what they did.
        if threading.current_thread() is threading.main_thread():
            self._set(signal.SIGINT)
            if hosts.count() == 1:
                self._set(signal.SIGTERM)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        # Told after the last step, of which nobody asked: the next run must not begin.
        if kind is None and self._told is not None and hosts.count() == 1:
            signal.raise_signal(self._told)

    def _set(self, number: int) -> None:
        self._before[number] = signal.signal(number, self._tell)

    def _tell(self, number: int, frame: FrameType | None) -> None:
        self._told = number
        if number == signal.SIGINT:
            signal.signal(number, signal.default_int_handler)
            if hosts.count() > 1:
                signal.raise_signal(signal.SIGTERM)
