"""How every experiment starts, and how it reports errors."""

import os
import sys
import traceback
from collections.abc import Callable

from absl import app, logging

from geomjax.train.loop import NonFiniteError

EXPECTED = (ValueError, OSError, NonFiniteError)
"""Errors that speak to the user; anything else is a defect and shows its traceback."""


def main(run: Callable[[], None]) -> None:
    """Parses flags and runs; an expected error becomes one message and status 1.

    With `--verbosity=1` its traceback is shown too.

    Args:
      run: The experiment.
    """
    # Progress bars and messages of libraries stay out of ours.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

    def guarded(argv: list[str]) -> None:
        if len(argv) > 1:
            raise app.UsageError(f"unexpected arguments: {argv[1:]}")
        try:
            run()
        except EXPECTED as error:
            if logging.level_debug():
                traceback.print_exc()
            sys.exit(f"error: {error}")

    app.run(guarded)
