"""Programs, run in the sandbox against their tests.

A program gets only its inputs. What it should answer stays outside and is compared
here, so that no program can find its marks instead of earning them.
"""

import json
import re
from decimal import Decimal, InvalidOperation
from typing import Any

from geomjax.data.code_tests import Case, CodeTests, load_tests
from geomjax.data.prompts import Example
from geomjax.rewards.contract import UNFINISHED, Judgement, final_part
from geomjax.sandbox.limits import Limits
from geomjax.sandbox.run import Isolation, Run, run_program

# Of any language, so that the end of one block is not taken for the start of the next.
# A fence begins a line, unless it names Python.
_BLOCK = re.compile(
    r"(?:^[ \t]*|(?=```[ \t]*(?i:py)))```[ \t]*([^\s`]*)[^\n`]*\n(.*?)^[ \t]*```(?!\w)",
    re.DOTALL | re.MULTILINE,
)
_PYTHON = {"", "py", "python", "python3"}
_SHOWN = 200

# Contest sites import these for their users.
_IMPORTS = (
    "import bisect, collections, copy, functools, heapq, itertools, math, operator, "
    "random, re, string, sys; from bisect import *; from collections import *; "
    "from functools import *; from heapq import *; from itertools import *; "
    "from math import *; from typing import *; sys.setrecursionlimit(50_000)\n"
)
# Compiled by itself: what is of the `__future__` must come first, and the lines of its
# errors are its own.
_PROGRAM = 'exec(compile({program!r}, "<program>", "exec", dont_inherit=True))\n'
# Reads the arguments, calls the function, writes its result where prints of the
# program do not go.
_ASIDE = "import os as _os; _out = _os.dup(1); _os.dup2(2, 1); "
_CALL = """
if True:
    import json as _json, sys as _sys
    _given = _json.loads(_sys.stdin.read())
    _names = globals()
    _class = _names.get("Solution")
    _called = getattr(_class(), {name!r}) if hasattr(_class, {name!r}) \\
        else _names[{name!r}]
    _result = _called(*_given)
    with open(_out, "w") as _file:
        _json.dump(_result, _file)
"""


def code(
    example: Example,
    completion: str,
    *,
    test_s: float = 10.0,
    memory_bytes: int = 1 << 30,
    isolation: Isolation = "namespaces",
    thinking_end: str = "</think>",
) -> Judgement:
    """Scores 1 if the completion's program passes all of the example's tests, else 0.

    The program is the last block of code after the train of thought whose fence names
    Python or no language. Each test is a run of its own; the first that fails ends the
    series.

    Args:
        example: its answer holds the tests (`geomjax.data.code_tests`).
        completion: the text to score.
        test_s: seconds that each test may take, by the clock. With `RewardPool`, its
            limit must leave room for the sum.
        memory_bytes: address space of the program.
        isolation: see `run_program`.
        thinking_end: what ends the train of thought (`final_part`).

    Raises:
        SandboxUnavailable: if the machine grants no isolation.
    """
    try:
        tests = load_tests(example.answer or "")
    except ValueError as error:
        return Judgement(0.0, str(error), "unparsed reference")
    said = final_part(example, completion, thinking_end)
    if said is None:
        return UNFINISHED
    programs = [
        program
        for language, program in _BLOCK.findall(said)
        if language.lower() in _PYTHON
    ]
    if not programs:
        return Judgement(0.0, "no block of code found", "unparsed completion")
    limits = Limits(wall_s=test_s, cpu_s=test_s, memory_bytes=memory_bytes)
    for number, case in enumerate(tests.cases, start=1):
        problem = _problem(programs[-1], tests, case, limits, isolation)
        if problem is not None:
            return Judgement(0.0, f"test {number} of {len(tests.cases)}: {problem}")
    return Judgement(1.0, f"passed {len(tests.cases)} tests")


def _problem(
    program: str, tests: CodeTests, case: Case, limits: Limits, isolation: Isolation
) -> str | None:
    """What is wrong with the program on one test, or None."""
    # Half of a surrogate pair is not text; it reaches the program as a question mark.
    program = program.encode(errors="replace").decode()
    source = _IMPORTS + _PROGRAM.format(program=program)
    if tests.function is None:
        given = case.given
    else:
        given = json.dumps(case.given)
        source = _ASIDE + source + _CALL.format(name=tests.function)
    run = run_program(source, stdin=given.encode(), limits=limits, isolation=isolation)
    if run.ended != "exited":
        return f"exceeded its {run.ended}"
    if run.status != 0:
        return f"ended with status {run.status}: {_last_line(run)}"
    printed = run.stdout.decode(errors="replace")
    if tests.function is None:
        return (
            None if same_output(printed, case.expected) else _difference(printed, case)
        )
    try:
        result = json.loads(printed)
    except ValueError:
        return f"returned what is not JSON: {printed[:_SHOWN]!r}"
    return None if same_value(result, case.expected) else _difference(printed, case)


def same_output(printed: str, expected: str) -> bool:
    """Whether two outputs are equal line by line, up to outer spaces and numerals.

    Empty lines at the end do not count; words of a line that are both numbers are
    compared as decimal numbers (`1.0` equals `1`).
    """
    ours = [line.split() for line in printed.strip().split("\n")]
    theirs = [line.split() for line in expected.strip().split("\n")]
    return len(ours) == len(theirs) and all(
        len(a) == len(b) and all(map(_same_word, a, b))
        for a, b in zip(ours, theirs, strict=True)
    )


def same_value(result: Any, expected: Any) -> bool:
    """Whether two JSON values are equal; true and 1 are not."""
    if isinstance(result, list) and isinstance(expected, list):
        return len(result) == len(expected) and all(map(same_value, result, expected))
    if isinstance(result, dict) and isinstance(expected, dict):
        return result.keys() == expected.keys() and all(
            same_value(value, expected[key]) for key, value in result.items()
        )
    if isinstance(result, bool) or isinstance(expected, bool):
        return result is expected
    return bool(result == expected)


def _same_word(ours: str, theirs: str) -> bool:
    if ours == theirs:
        return True
    try:
        return Decimal(ours) == Decimal(theirs)
    except InvalidOperation:
        return False


def _difference(printed: str, case: Case) -> str:
    expected = case.expected
    text = expected if isinstance(expected, str) else json.dumps(expected)
    return f"got {printed[:_SHOWN]!r}, expected {text[:_SHOWN]!r}"


def _last_line(run: Run) -> str:
    lines = run.stderr.decode(errors="replace").strip().splitlines()
    return lines[-1][:_SHOWN] if lines else "nothing on standard error"
