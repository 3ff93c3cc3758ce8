"""Every named dataset, read from small files in its schema."""

import base64
import io
import json
import pickletools
import zlib

import pytest
from PIL import Image

from geomjax.data.adapters import ADAPTERS, BOXED, THINK_THEN_BOXED, load_examples
from geomjax.data.code_tests import Case, CodeTests, load_tests
from geomjax.data.prompts import Example, Message

DAPO = {
    "data_source": "math_dapo",
    "prompt": [{"content": "Solve it.\n\nWhat is 1+1?", "role": "user"}],
    "ability": "MATH",
    "reward_model": {"ground_truth": "2", "style": "rule-lighteval/MATH_v2"},
    "extra_info": {"index": "a"},
}
QUESTION = {"id": 7, "question": "What is 1+1?", "answer": "2"}
PROBLEM = {"id": 7, "problem": "What is 1+1?", "answer": "2"}
TWO = f"What is 1+1?\n{BOXED}"


def pickled(text):
    """A pickled string, as protocol 4 writes it: proto, frame, text, memo, stop."""
    data = text.encode()
    body = b"X" + len(data).to_bytes(4, "little") + data + b"\x94."
    return b"\x80\x04\x95" + len(body).to_bytes(8, "little") + body


def png(size=(3, 2)):
    file = io.BytesIO()
    Image.new("RGB", size).save(file, "PNG")
    return file.getvalue()


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize(
    ("name", "row", "prompt", "answer"),
    [
        (
            "dapo-math-17k",
            DAPO,
            (Message("user", "Solve it.\n\nWhat is 1+1?"),),
            "2",
        ),
        (
            "dolci-think-sft",
            {
                "id": "x",
                "messages": [
                    {"role": "user", "content": "Hi", "function_calls": None},
                    {"role": "assistant", "content": "<think>a</think>Hello"},
                ],
                "source": "y",
            },
            (Message("user", "Hi"),),
            "<think>a</think>Hello",
        ),
        (
            "openthoughts",
            {
                "system": "Think.",
                "conversations": [
                    {"from": "user", "value": "Hi"},
                    {"from": "assistant", "value": "Hello"},
                ],
            },
            (Message("system", "Think."), Message("user", "Hi")),
            "Hello",
        ),
        (
            "openthoughts3",
            {
                "difficulty": 8,
                "source": "s",
                "domain": "math",
                "conversations": [
                    {"from": "human", "value": "Hi"},
                    {"from": "gpt", "value": "Hello"},
                ],
            },
            (Message("user", "Hi"),),
            "Hello",
        ),
        ("aime24", {**PROBLEM, "solution": "", "url": "", "year": "2024"}, TWO, "2"),
        ("aime25", PROBLEM, TWO, "2"),
        ("amc23", {**QUESTION, "answer": 2, "url": ""}, TWO, "2"),
        ("math-500", {**PROBLEM, "subject": "Algebra", "level": 1}, TWO, "2"),
        ("minerva", QUESTION, TWO, "2"),
        ("beyond-aime", {**PROBLEM, "answer": 2}, TWO, "2"),
    ],
)
def test_text_sets(tmp_path, name, row, prompt, answer):
    [example] = load_examples(ADAPTERS[name], write(tmp_path / "a.jsonl", row))
    assert example == Example(prompt, answer, 1)


STDIN = {"input": "1 2\n", "output": "3\n"}
SUM = CodeTests(None, (Case("1 2\n", "3\n"),))
ADD = CodeTests("add", (Case([1, 2], 3),))


@pytest.mark.parametrize(
    ("name", "tests", "extra", "expected"),
    [
        ("taco", {"inputs": ["1 2\n"], "outputs": ["3\n"]}, {}, SUM),
        ("taco", {"inputs": [["1", "2"]], "outputs": [["3"]]}, {}, None),
        ("taco", {"fn_name": "add", "inputs": [[1, 2]], "outputs": [[3]]}, {}, ADD),
        ("primeintellect", [{"type": "stdin_stdout", **STDIN}], {}, SUM),
        (
            "primeintellect",
            [
                {
                    "type": "function_call",
                    "fn_name": "add",
                    "input": [1, 2],
                    "output": [3],
                }
            ],
            {},
            ADD,
        ),
        ("lcbv5", [{"testtype": "stdin", **STDIN, "metadata": {}}], {}, SUM),
        (
            "lcbv5",
            [
                {
                    "testtype": "functional",
                    "input": "1\n2",
                    "output": "3",
                    "metadata": {"func_name": "add"},
                }
            ],
            {"starter_code": "class Solution:"},
            ADD,
        ),
        (
            "lcbv5",
            [{"testtype": "functional", "input": "1\n2", "output": "3"}],
            {"metadata": {"func_name": "add"}},
            ADD,
        ),
        ("codeforces", [{"testtype": "stdin", **STDIN}], {}, SUM),
    ],
)
def test_deepcoder(tmp_path, name, tests, extra, expected):
    row = {"problem": "Add.", "tests": json.dumps(tests), **extra}
    path = write(tmp_path / "a.jsonl", row)
    [example] = load_examples(ADAPTERS[f"deepcoder-{name}"], path)
    expected = expected or CodeTests(None, (Case("1\n2", "3"),))
    assert load_tests(example.answer) == expected
    assert example.prompt.startswith("Add.\n\n")
    assert ("standard input" in example.prompt) == (expected.function is None)
    if "starter_code" in extra:
        assert example.prompt.endswith("```python\nclass Solution:\n```")
    elif expected.function:
        assert "def add(" in example.prompt


def livecodebench(private):
    return {
        "question_title": "Add",
        "question_content": "Add.",
        "starter_code": "",
        "public_test_cases": json.dumps([{"testtype": "stdin", **STDIN}]),
        "private_test_cases": private,
        "metadata": "{}",
    }


def test_livecodebench_takes_its_pickles_apart(tmp_path):
    hidden = [{"testtype": "stdin", "input": "2 2\n", "output": "4\n"}]
    packed = pickled(json.dumps(hidden))
    assert [op.name for op, _, _ in pickletools.genops(packed)][-1] == "STOP"
    rows = [
        livecodebench(json.dumps(hidden)),
        livecodebench(base64.b64encode(zlib.compress(packed)).decode()),
    ]
    path = write(tmp_path / "test5.jsonl", *rows)
    for example in load_examples(ADAPTERS["livecodebench-v5"], path):
        cases = (*SUM.cases, Case("2 2\n", "4\n"))
        assert load_tests(example.answer) == CodeTests(None, cases)


def test_a_pickle_that_would_act_is_refused_and_not_loaded(tmp_path):
    marker = tmp_path / "ran"
    evil = b"cos\nsystem\n(X" + len(f"touch {marker}").to_bytes(4, "little")
    evil += f"touch {marker}".encode() + b"tR."
    private = base64.b64encode(zlib.compress(evil)).decode()
    damaged = base64.b64encode(b"damaged").decode()
    path = write(tmp_path / "a.jsonl", livecodebench(private), livecodebench(damaged))
    with pytest.raises(
        ValueError, match=r"a\.jsonl, row 1: .*texts(.|\n)*row 2: .*dam"
    ):
        load_examples(ADAPTERS["livecodebench-v5"], path)
    assert not marker.exists()


def test_images_of_geometry3k(tmp_path):
    pa = pytest.importorskip("pyarrow", reason="needs the data extra")
    import pyarrow.parquet as pq

    rows = [
        {
            "images": [{"bytes": png(), "path": None}],
            "problem": "<image>Find x.",
            "answer": "3",
        }
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    for name in ("geometry3k", "geo3k"):
        [example] = load_examples(ADAPTERS[name], tmp_path)
        prompt = f"<image>Find x. {THINK_THEN_BOXED}"
        assert example[:3] == (prompt, "3", 1)
        assert [image.read() for image in example.images] == [png()]


def test_images_by_path_are_found_beside_their_file(tmp_path):
    (tmp_path / "x.png").write_bytes(png())
    row = {"images": ["x.png"], "problem": "<image>?", "answer": "3"}
    path = write(tmp_path / "a.jsonl", row)
    [example] = load_examples(ADAPTERS["geo3k"], path)
    assert [image.read() for image in example.images] == [png()]
    (tmp_path / "inner").mkdir()
    path = write(tmp_path / "inner" / "a.jsonl", row | {"images": ["../x.png"]})
    with pytest.raises(ValueError, match=r"\.\./x\.png lies outside"):
        load_examples(ADAPTERS["geo3k"], path)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"images": ["none.png"]}, "none.png is missing"),
        ({"images": []}, None),
        ({"images": [None]}, "there is no image"),
        ({"images": [{"bytes": None, "path": None}]}, "there is no image"),
        ({"problem": "no mark"}, "1 images and 0 <image> marks"),
        ({"images": ["bad.png"]}, "of no known format"),
        ({"images": ["cut.png"]}, "is damaged"),
        ({"answer": ""}, "`answer` is '', expected text"),
    ],
)
def test_what_is_wrong_with_images_is_said(tmp_path, changes, problem):
    (tmp_path / "x.png").write_bytes(png())
    (tmp_path / "bad.png").write_bytes(b"not an image")
    (tmp_path / "cut.png").write_bytes(png((300, 200))[:-40])
    row = {"images": ["x.png"], "problem": "<image>?", "answer": "3", **changes}
    path = write(tmp_path / "a.jsonl", row)
    if problem is None:
        assert load_examples(ADAPTERS["geo3k"], path)[0].images == ()
        return
    with pytest.raises(ValueError, match="row 1: ") as caught:
        load_examples(ADAPTERS["geo3k"], path)
    assert problem in str(caught.value)


def test_missing_columns_name_those_found(tmp_path):
    path = write(tmp_path / "a.jsonl", {"query": "?", "label": "1"})
    with pytest.raises(
        ValueError, match="no column question, answer; it has query, la"
    ):
        load_examples(ADAPTERS["amc23"], path)


def test_all_malformed_rows_are_named(tmp_path):
    bad = [
        {**DAPO, "prompt": []},
        {**DAPO, "reward_model": {"style": "rule"}},
        DAPO,
        {**DAPO, "reward_model": {"ground_truth": None}},
        {**DAPO, "prompt": [{"role": "user"}]},
    ]
    path = write(tmp_path / "a.jsonl", *bad)
    with pytest.raises(ValueError, match="has no messages") as caught:
        load_examples(ADAPTERS["dapo-math-17k"], path)
    text = str(caught.value)
    assert "row 2: has no field 'ground_truth'" in text
    assert "row 3" not in text
    assert "row 4: `ground_truth` is None, expected text" in text
    assert "row 5: has no field 'content'" in text


@pytest.mark.parametrize("last", ["user", "system"])
def test_a_conversation_must_end_with_a_reply(tmp_path, last):
    turns = [{"role": "user", "content": "a"}, {"role": last, "content": "b"}]
    path = write(tmp_path / "a.jsonl", {"messages": turns})
    with pytest.raises(ValueError, match="does not end with a reply"):
        load_examples(ADAPTERS["dolci-think-sft"], path)


@pytest.mark.parametrize(
    ("results", "expected"),
    [
        ([[3], [4]], [3, 4]),
        ([[[1, 2]], [[]]], [[1, 2], []]),
        # Not all are lists of one: the function returns lists itself.
        ([[3], []], [[3], []]),
        ([[1, 2], [3]], [[1, 2], [3]]),
        ([[]], [[]]),
        ([3, [4]], [3, [4]]),
    ],
)
@pytest.mark.parametrize("name", ["taco", "primeintellect"])
def test_results_of_functions_are_unwrapped_where_all_are(
    tmp_path, name, results, expected
):
    tests = {"fn_name": "f", "inputs": [[1]] * len(results), "outputs": results}
    if name == "primeintellect":
        listed = {"type": "function_call", "fn_name": "f", "input": [1]}
        tests = [listed | {"output": result} for result in results]
    row = {"problem": "?", "tests": json.dumps(tests)}
    path = write(tmp_path / "a.jsonl", row)
    [example] = load_examples(ADAPTERS[f"deepcoder-{name}"], path)
    cases = load_tests(example.answer).cases
    assert [case.expected for case in cases] == expected


@pytest.mark.parametrize("tests", ["", "[]", '[{"testtype": "odd"}]', '{"inputs": []}'])
def test_tests_of_no_known_form_are_named(tmp_path, tests):
    row = {"problem": "?", "tests": tests}
    with pytest.raises(ValueError, match=r"a\.jsonl, row 1: "):
        load_examples(ADAPTERS["deepcoder-taco"], write(tmp_path / "a.jsonl", row))
