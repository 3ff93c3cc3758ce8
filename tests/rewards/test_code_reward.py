import pytest

from geomjax.data.code_tests import Case, CodeTests, dump_tests, load_tests
from geomjax.data.prompts import Example
from geomjax.rewards.code import code, same_output, same_value
from geomjax.rewards.contract import Judgement

SUM = CodeTests(None, (Case("1 2\n", "3\n"), Case("10 5\n", "15")))
CALL = CodeTests("add", (Case([1, 2], 3), Case([[1], [2]], [1, 2])))


def judge(tests, program, **settings):
    example = Example("?", dump_tests(tests), 1)
    return code(example, f"Here it is:\n```python\n{program}\n```\n", **settings)


@pytest.mark.usefixtures("sandbox")
@pytest.mark.parametrize(
    ("tests", "program"),
    [
        (SUM, "print(sum(map(int, input().split())))"),
        (SUM, "import sys\nprint(sum(map(float, sys.stdin.read().split())), '')"),
        (SUM, "a = deque(map(int, input().split()))\nprint(a[0] + a[1])\nexit()"),
        (CALL, "def add(a, b):\n    print('busy')\n    return a + b\nprint(add(1, 1))"),
        (CALL, "class Solution:\n    def add(self, a: List, b):\n        return a + b"),
        (CodeTests("f", (Case([], [1, 2]),)), "def f():\n    return 1, 2"),
        (
            SUM,
            "from __future__ import annotations\nprint(sum(map(int, input().split())))",
        ),
        (
            CALL,
            '"""Adds."""\nfrom __future__ import division\ndef add(a, b): return a + b',
        ),
        (CALL, "class Solution:\n    pass\ndef add(a, b):\n    return a + b"),
        (CALL, "class Solution:\n    def __init__(self, x): pass\nadd = operator.add"),
    ],
)
def test_right_programs_pass(tests, program):
    passed = f"passed {len(tests.cases)} tests"
    assert judge(tests, program) == Judgement(1.0, passed)


@pytest.mark.usefixtures("sandbox")
@pytest.mark.parametrize(
    ("tests", "program", "reason"),
    [
        (SUM, "print(3)", "test 2 of 2: got '3\\n', expected '15'"),
        (SUM, "print('3\\n4')", "test 1 of 2: got"),
        (SUM, "1 / 0", "test 1 of 2: ended with status 1: ZeroDivisionError"),
        (SUM, "def", "SyntaxError"),
        (SUM, "while True: pass", "test 1 of 2: "),
        (SUM, "print('x' * 2_000_000)", "test 1 of 2: exceeded its output"),
        (SUM, "bytearray(1 << 30)", "MemoryError"),
        (CALL, "def plus(a, b): return a + b", "KeyError: 'add'"),
        (CALL, "def add(a, b): return 3", "test 2 of 2: got '3', expected '[1, 2]'"),
        (CALL, "def add(a, b): return {1}", "not JSON serializable"),
        (CALL, "print(3)\nexit()", "test 1 of 2: returned what is not JSON: ''"),
        (CodeTests("f", (Case([], 1),)), "def f(): return True", "got 'true'"),
    ],
)
def test_wrong_programs_fail_for_a_reason(tests, program, reason):
    judgement = judge(tests, program, test_s=1.0, memory_bytes=256 << 20)
    assert (judgement.score, judgement.status) == (0.0, "judged")
    assert reason in judgement.reason


@pytest.mark.usefixtures("sandbox")
def test_a_program_cannot_find_what_it_should_answer():
    tests = CodeTests(None, (Case("", "squeamish ossifrage"),))
    program = (
        "import gc, os\n"
        "for folder, _, names in os.walk('/tmp'):\n"
        "    for name in names:\n"
        "        print(open(os.path.join(folder, name)).read())\n"
        "print([x for x in gc.get_objects() if isinstance(x, str)], input.__doc__)"
    )
    judgement = judge(tests, program)
    assert judgement.score == 0.0
    assert "squeamish" not in judgement.reason.partition("expected")[0]


RIGHT = "```python\nprint(sum(map(int, input().split())))\n```"
OTHER = "\nprint(3)\n```"


@pytest.mark.usefixtures("sandbox")
@pytest.mark.parametrize(
    "completion",
    [
        f"As in C++:\n```cpp{OTHER}\nand so:\n{RIGHT}",
        f"```text{OTHER}\n{RIGHT}\nwhich prints\n```text{OTHER}\nas wanted.",
        f"```{OTHER}\nBetter:\n{RIGHT}\n```c++ linenums{OTHER}",
        f"```python{OTHER} was wrong.\n{RIGHT.replace('python', ' Python3 run')}",
        f"Inline ```x```, and then this: {RIGHT}",
        RIGHT.replace("print", "# ``` ends no program in mid-line\nprint"),
    ],
)
def test_only_blocks_that_may_be_python_are_run(completion):
    judgement = code(Example("?", dump_tests(SUM), 1), completion)
    assert judgement == Judgement(1.0, "passed 2 tests")


def test_the_last_block_after_the_thinking_counts():
    example = Example("?", dump_tests(SUM), 1)
    for completion in (
        "",
        "print(3)",
        "<think>```python\nprint(3)\n```</think>",
        "```cpp\nint main() {}\n```\nprint(3)\n```text\n3\n```",
    ):
        judgement = code(example, completion)
        assert judgement.status == "unparsed completion"


@pytest.mark.parametrize(
    ("answer", "problem"),
    [
        (None, "not JSON"),
        ("print(1)", "not JSON"),
        ("[1]", "expected an object"),
        (dump_tests(CodeTests(None, ())), "not empty"),
        (dump_tests(CodeTests(None, (Case([1], "x"),))), "gives list, expected str"),
        (dump_tests(CodeTests("f", (Case("1", "x"),))), "gives str, expected list"),
    ],
)
def test_tests_that_cannot_be_read_are_told_apart(answer, problem):
    judgement = code(Example("?", answer, 1), "```python\npass\n```")
    assert judgement.status == "unparsed reference"
    assert problem in judgement.reason


def test_tests_come_back_as_they_were_written():
    for tests in (SUM, CALL):
        assert load_tests(dump_tests(tests)) == tests


@pytest.mark.parametrize(
    ("printed", "expected", "equal"),
    [
        ("1 2\n3\n", "1 2\n3", True),
        ("1  2 \n3\n\n", "1 2\n3", True),
        ("1.0", "1", True),
        ("1e3", "1000", True),
        ("YES", "yes", False),
        ("1 2 3", "1 2\n3", False),
        ("1", "1 1", False),
        ("nan", "nan", True),
        ("1.0000001", "1", False),
        ("", "", True),
    ],
)
def test_outputs_are_compared_by_line_and_number(printed, expected, equal):
    assert same_output(printed, expected) is equal


def test_values_are_compared_with_their_types():
    assert same_value([1, 2.0, "a", {"b": None}], [1, 2, "a", {"b": None}])
    assert not same_value([True], [1])
    assert not same_value([1], [1, 2])
    assert not same_value({"a": 1}, {"b": 1})
    assert not same_value("1", 1)
