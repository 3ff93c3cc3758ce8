"""A process that judges completions one at a time; `RewardPool` starts and ends it.

It speaks JSON, one object a line: what it loads comes first, then one line for each
completion and one in return. Nothing but JSON passes between the processes.
"""

import importlib
import json
import logging
import math
import os
import resource
import signal
import sys
from collections.abc import Callable
from typing import Any, TextIO

from geomjax.data.prompts import Example, Message
from geomjax.rewards.contract import Judgement
from geomjax.sandbox import syscalls

_TEXT_CHARACTERS = 2_000


def main() -> None:
    """Reads what to load, then judges until standard input ends."""
    if sys.platform == "linux":
        # Even in the middle of a judgement this must not outlive its pool.
        syscalls.prctl(syscalls.PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # What a reward prints must not pass for an answer.
    # Its warning that it runs without a limit of its own: the pool has one.
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    order = json.loads(sys.stdin.readline())
    memory = order["memory_bytes"]
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    if hard == resource.RLIM_INFINITY or memory < hard:
        resource.setrlimit(resource.RLIMIT_AS, (memory, hard))
    try:
        reward = load_reward(order["reward"])
    except ValueError as error:
        _send(answers, {"error": str(error)})
        return
    _send(answers, {"error": None})
    for line in sys.stdin:
        _send(answers, _judge(reward, order["settings"], json.loads(line)))


def load_reward(path: str) -> Callable[..., Any]:
    """The function that `package.module:function` names.

    Raises:
        ValueError: if there is none.
    """
    module, _, name = path.partition(":")
    try:
        function = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"reward: {path!r} cannot be loaded ({error}); expected "
            "package.module:function, importable from here"
        ) from error
    if not callable(function):
        raise ValueError(
            f"reward: {path!r} is a {type(function).__name__}, not callable"
        )
    loaded: Callable[..., Any] = function
    return loaded


def _judge(
    reward: Callable[..., Any], settings: dict[str, Any], request: dict[str, Any]
) -> dict[str, Any]:
    prompt = request["prompt"]
    if not isinstance(prompt, str):
        prompt = tuple(Message(*message) for message in prompt)
    example = Example(
        prompt, request["answer"], request["line"], thinking=request["thinking"]
    )
    try:
        found = Judgement(*reward(example, request["completion"], **settings))
        if not math.isfinite(found.score):
            raise ValueError(f"the score is {found.score}")
        found = found._replace(score=float(found.score))
    # Whatever a stranger's function raises costs its sample, not the run.
    except Exception as error:  # noqa: BLE001
        found = Judgement(0.0, f"raised {type(error).__name__}: {error}", "failed")
    answer = None if found.answer is None else found.answer[:_TEXT_CHARACTERS]
    reason = found.reason[:_TEXT_CHARACTERS]
    return found._replace(reason=reason, answer=answer)._asdict()


def _send(answers: TextIO, value: dict[str, Any]) -> None:
    answers.write(json.dumps(value) + "\n")
    answers.flush()
