"""Programming problems: DeepCoder's and LiveCodeBench's tests in one form.

The forms of the tests are read off public loaders of these datasets, named below; the
datasets themselves were not at hand.
"""

import base64
import binascii
import json
import pickletools
import zlib
from collections.abc import Iterable
from typing import Any

from geomjax.data.code_tests import Case, CodeTests, dump_tests
from geomjax.data.rows import Row

# Our wording; both projects use their own, to this effect.
PROGRAM_WORDING = (
    "Write a Python program that reads from standard input and writes to standard "
    "output. Put the whole program into one block of code (```python ... ```)."
)
STARTER_WORDING = (
    "Write Python code that completes the following start. Put the whole code into one "
    "block of code (```python ... ```)."
)
# A decompressed test suite above this is refused; the largest published are near it.
_MAX_TEST_BYTES = 1 << 30


def deepcoder_row(row: Row) -> tuple[str, str]:
    """Prompt and answer of a row of DeepCoder-Preview-Dataset.

    `tests` is JSON in one of two forms, which xxman-google/NeMo-RL and rllm tell apart
    in the same way: an object with lists `inputs` and `outputs` and perhaps `fn_name`
    (taco); or a list of objects with `input`
    and `output`, of `type` stdin_stdout or function_call (primeintellect, with
    `fn_name`), or of `testtype` stdin or functional (lcbv5, codeforces, with
    `metadata.func_name`). Function results of taco and primeintellect come from APPS,
    where most problems, and not all, wrap each in a list of one: they are unwrapped
    where all results of a problem are such lists. (APPS's own test accepts either.)
    """
    tests = json.loads(row["tests"]) if isinstance(row["tests"], str) else row["tests"]
    if isinstance(tests, dict):
        function = tests["fn_name"] if "fn_name" in tests else None
        pairs = zip(tests["inputs"], tests["outputs"], strict=True)
        cases = _apps_cases(pairs, function)
    else:
        function = _function_of(tests, row)
        cases = _listed_cases(tests, function)
    starter = row["starter_code"] if "starter_code" in row else ""
    return _prompt(row["problem"], starter, function), _answer(function, cases)


def livecodebench_row(row: Row) -> tuple[str, str]:
    """Prompt and answer of a row of LiveCodeBench's code_generation_lite.

    `public_test_cases` is JSON; `private_test_cases` is JSON, or JSON in a pickled
    string, compressed by zlib, in base64 (so in the benchmark's own loader). The pickle
    is taken apart, not loaded, so that nothing in it is executed.
    """
    tests = [
        *json.loads(row["public_test_cases"]),
        *_private_tests(row["private_test_cases"]),
    ]
    function = _function_of(tests, row)
    cases = _listed_cases(tests, function)
    prompt = _prompt(row["question_content"], row["starter_code"], function)
    return prompt, _answer(function, cases)


def _private_tests(text: str) -> list[Any]:
    if text.lstrip().startswith("["):
        tests: list[Any] = json.loads(text)
        return tests
    try:
        unzip = zlib.decompressobj()
        data = unzip.decompress(base64.b64decode(text, validate=True), _MAX_TEST_BYTES)
        if unzip.unconsumed_tail:
            raise ValueError(f"its tests are larger than {_MAX_TEST_BYTES} bytes")
        texts = [
            argument
            for _, argument, _ in pickletools.genops(data)
            if isinstance(argument, str)
        ]
    except (binascii.Error, zlib.error) as error:
        raise ValueError(f"its private tests are damaged: {error}") from error
    if len(texts) != 1:
        raise ValueError(f"its private tests hold {len(texts)} texts, expected one")
    tests = json.loads(texts[0])
    return tests


def _function_of(tests: list[Any], row: Row) -> str | None:
    """The function that the tests call, which they or the row's metadata name."""
    if not tests:
        raise ValueError("has no test")
    first = tests[0]
    kind = first["type"] if "type" in first else first["testtype"]
    if kind in ("stdin", "stdin_stdout"):
        return None
    if kind == "function_call":
        name: str = first["fn_name"]
        return name
    if kind != "functional":
        raise ValueError(f"has tests of the unknown kind {kind!r}")
    metadata = (first["metadata"] if "metadata" in first else None) or row["metadata"]
    metadata = json.loads(metadata) if isinstance(metadata, str) else metadata
    name = metadata["func_name"]
    return name


def _listed_cases(tests: list[Any], function: str | None) -> list[Case]:
    if function is not None and "type" in tests[0]:
        return _apps_cases(
            [(test["input"], test["output"]) for test in tests], function
        )
    if function is None:
        return [Case(test["input"], test["output"]) for test in tests]
    # LiveCodeBench: one argument a line, in JSON.
    return [
        Case(
            [json.loads(line) for line in test["input"].split("\n")],
            json.loads(test["output"]),
        )
        for test in tests
    ]


def _apps_cases(pairs: Iterable[tuple[Any, Any]], function: str | None) -> list[Case]:
    if function is None:
        # Some are lists of lines.
        return [
            Case(*("\n".join(t) if isinstance(t, list) else t for t in pair))
            for pair in pairs
        ]
    cases = [
        Case(*(json.loads(t) if isinstance(t, str) else t for t in pair))
        for pair in pairs
    ]
    wrapped = all(
        isinstance(case.expected, list) and len(case.expected) == 1 for case in cases
    )
    return (
        [case._replace(expected=case.expected[0]) for case in cases]
        if wrapped
        else cases
    )


def _prompt(problem: str, starter: str | None, function: str | None) -> str:
    if starter and starter.strip():
        return f"{problem}\n\n{STARTER_WORDING}\n\n```python\n{starter}\n```"
    if function is not None:
        # Without a start, the name is all that the tests and the program share.
        return f"{problem}\n\n{STARTER_WORDING}\n\n```python\ndef {function}(\n```"
    return f"{problem}\n\n{PROGRAM_WORDING}"


def _answer(function: str | None, cases: list[Case]) -> str:
    return dump_tests(CodeTests(function, tuple(cases)))
