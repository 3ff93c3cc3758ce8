"""How a run ends before its time, apart so that naming it imports no trainer."""


class NonFiniteError(RuntimeError):
    """A loss, gradient or parameter that is not finite; the run has stopped."""


class Preempted(RuntimeError):
    """The run was told to end; started again, it goes on where it was."""
