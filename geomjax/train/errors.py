"""How a run ends before its time, apart so that naming it imports no trainer."""


class NonFiniteError(RuntimeError):
    """A loss, gradient or parameter that is not finite; the run has stopped."""


class Preempted(BaseException):
    """The run was told to end; started again, it goes on where it was.

    No `Exception`, as KeyboardInterrupt is none: what handles errors lets it pass.
    """
