"""How a run ends before its time, apart so that naming it imports no trainer."""

from geomjax.hosts import Preempted as Preempted


class NonFiniteError(RuntimeError):
    """A loss, gradient or parameter that is not finite; the run has stopped."""
