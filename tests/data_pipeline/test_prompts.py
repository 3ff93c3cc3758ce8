import errno
import json
import os
import tempfile

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from geomjax.data.image_store import ImageStore
from geomjax.data.overlap import find_duplicates
from geomjax.data.prompts import Example, Message, read_prompts
from geomjax.data.sources import read_source


def write(path, *lines):
    path.write_bytes(b"".join(line + b"\n" for line in lines))
    return path


def record(**fields):
    return json.dumps(fields).encode()


def test_reads_text_and_conversations_with_line_numbers(tmp_path):
    path = write(
        tmp_path / "p.jsonl",
        b"\xef\xbb\xbf" + record(prompt="1+1=", answer="2", source="ignored"),
        b"",
        record(
            prompt=[
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": "1+2?"},
            ]
        ),
        '{"prompt": "a\u2028b", "answer": null}\r'.encode(),
    )
    assert read_prompts(path) == [
        Example("1+1=", "2", 1),
        Example((Message("system", "Be brief."), Message("user", "1+2?")), None, 3),
        Example("a\u2028b", None, 4),
    ]


def test_duplicates_are_kept_and_counted(tmp_path):
    chat = [{"role": "user", "content": "a"}]
    path = write(
        tmp_path / "p.jsonl",
        *(record(prompt=prompt) for prompt in ["a", "b", "a", chat, chat, "a"]),
    )
    examples = read_prompts(path)
    assert len(examples) == 6
    assert len(find_duplicates(examples)) == 3


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere.jsonl"):
        read_prompts(tmp_path / "nowhere.jsonl")


@pytest.mark.parametrize("content", [b"", b"\n  \n\n", b"\xef\xbb\xbf"])
def test_empty_file(tmp_path, content):
    path = tmp_path / "p.jsonl"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"p\.jsonl holds no prompt"):
        read_prompts(path)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b'{"prompt": "a"', "is not JSON"),
        (b'{"prompt": "a"} {"prompt": "b"}', "is not JSON"),
        (b'{"prompt": ' + b"9" * 5000 + b"}", "limit"),
        (b"[" * 200_000, "nested too deeply"),
        (b'{"prompt": "caf\xe9"}', r"is not UTF-8 \(byte 15: 0xe9\)"),
        ('{"prompt": "a"}'.encode("utf-16"), "is not UTF-8"),
        (rb'{"prompt": "a\ud800"}', "surrogate"),
        (b'"a"', "is a string, expected an object"),
        (b"null", "is null, expected an object"),
        (record(question="a", answer="b"), r"no `prompt`.*\['answer', 'question'\]"),
        (record(prompt=""), "`prompt` is empty"),
        (record(prompt=[]), "`prompt` is an empty list"),
        (record(prompt=5), "`prompt` is a number, expected a string"),
        (record(prompt=None), "`prompt` is null, expected a string"),
        (record(prompt={"role": "user"}), r"an object with the fields \['role'\]"),
        (record(prompt=["a"]), r"`prompt\[0\]` is a string"),
        (record(prompt=[{"role": "user"}]), r"`prompt\[0\]` is .*`content` alone"),
        (
            record(prompt=[{"role": "user", "content": "a", "tool_calls": []}]),
            "tool_calls",
        ),
        (
            record(prompt=[{"role": "user", "content": [{"type": "image"}]}]),
            r"`prompt\[0\].content` is a list",
        ),
        (record(prompt="a", answer=5), "`answer` is a number, expected a string"),
        (record(prompt="a", answer=True), "`answer` is a boolean"),
    ],
)
def test_malformed_line_is_named(tmp_path, line, said):
    path = write(tmp_path / "p.jsonl", record(prompt="fine", answer="1"), b"", line)
    with pytest.raises(ValueError, match=rf"p\.jsonl:\n  line 3: .*{said}"):
        read_prompts(path)


def test_missing_answers_are_named_when_required(tmp_path):
    path = write(
        tmp_path / "p.jsonl",
        record(prompt="a"),
        record(prompt="b", answer="1"),
        record(prompt="c", answer=None),
    )
    assert len(read_prompts(path)) == 3
    with pytest.raises(ValueError, match="answer") as error:
        read_prompts(path, require_answers=True)
    assert "line 1: has no `answer`" in str(error.value)
    assert "line 3: has no `answer`" in str(error.value)
    assert "line 2" not in str(error.value)


def test_problems_are_collected_up_to_a_limit(tmp_path):
    path = write(tmp_path / "p.jsonl", *[b"{}"] * 25)
    with pytest.raises(ValueError, match="and 15 more") as error:
        read_prompts(path)
    message = str(error.value)
    assert message.count("has no `prompt`") == 10
    assert "line 1:" in message
    assert "line 10:" in message


text = st.text(st.characters(exclude_categories=["Cs"]), min_size=1)


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(text, st.none() | text), min_size=1), st.booleans())
def test_what_json_writes_is_read_back(tmp_path, pairs, ascii_only):
    path = write(
        tmp_path / "p.jsonl",
        *(
            json.dumps({"prompt": p, "answer": a}, ensure_ascii=ascii_only).encode()
            for p, a in pairs
        ),
    )
    assert read_prompts(path) == [
        Example(p, a, line) for line, (p, a) in enumerate(pairs, start=1)
    ]


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.binary()
    | st.recursive(
        st.none() | st.booleans() | st.floats() | st.integers() | st.text(),
        lambda inner: (
            st.lists(inner)
            | st.dictionaries(st.sampled_from(["prompt", "answer", "role"]), inner)
        ),
    ).map(lambda value: json.dumps(value).encode())
)
def test_any_other_bytes_are_a_value_error(tmp_path, content):
    path = tmp_path / "p.jsonl"
    path.write_bytes(content)
    try:
        outcome = read_prompts(path)
    except ValueError as error:
        outcome = str(error)
    if isinstance(outcome, str):
        assert "p.jsonl" in outcome
    else:
        assert all(example.prompt for example in outcome)


def png(path, side=4):
    Image.new("RGB", (side, side)).save(path, "PNG")
    return path.read_bytes()


def test_images_are_read_from_beside_the_file(tmp_path):
    (tmp_path / "images").mkdir()
    data = png(tmp_path / "images" / "a.png")
    path = write(
        tmp_path / "p.jsonl",
        record(prompt="<image>How many?", answer="2", images=["images/a.png"]),
        record(prompt="1+1=", answer="2", images=[]),
    )
    first, second = read_prompts(path)
    assert first[:3] == ("<image>How many?", "2", 1)
    assert [image.read() for image in first.images] == [data]
    assert second.images == ()


def test_images_that_cannot_be_used_are_named(tmp_path):
    inside = tmp_path / "inside"
    inside.mkdir()
    png(tmp_path / "outside.png")
    png(inside / "a.png")
    (inside / "b.png").write_bytes(b"no image")
    path = write(
        inside / "p.jsonl",
        record(prompt="<image>", images=["../outside.png"]),
        record(prompt="<image>", images=[str(tmp_path / "outside.png")]),
        record(prompt="<image>", images=["missing.png"]),
        record(prompt="<image>", images=["b.png"]),
        record(prompt="<image><image>", images=["a.png"]),
        record(prompt="<image>", images="a.png"),
        record(prompt="<image>", images=[3]),
    )
    with pytest.raises(ValueError, match="line 1: the image ../outside.png lies") as e:
        read_prompts(path)
    for said in (
        "outside.png lies outside the file's folder",
        "missing.png is missing",
        "is of no known format",
        "has 1 images and 2 <image> marks",
        "`images` is a string, expected a list of paths",
        "`images` is a number, expected a string",
    ):
        assert said in str(e.value)


def test_a_limit_reads_no_further(tmp_path, monkeypatch):
    """Neither the lines after it nor their images, of which none is opened."""
    png(tmp_path / "a.png")
    path = write(
        tmp_path / "p.jsonl",
        record(prompt="<image>1", images=["a.png"]),
        b"",
        record(prompt="2"),
        record(prompt="<image>3", images=["missing.png"]),
        b"no JSON",
    )
    kept = []
    keep = ImageStore.keep
    monkeypatch.setattr(
        ImageStore, "keep", lambda store, data: kept.append(data) or keep(store, data)
    )
    assert [example.line for example in read_prompts(path, limit=2)] == [1, 3]
    assert [example.line for example in read_source(str(path), limit=1)] == [1]
    assert len(kept) == 2
    with pytest.raises(ValueError, match=r"line 4: .*missing\.png is missing"):
        read_prompts(path, limit=3)


def test_a_full_disk_is_named(tmp_path, monkeypatch):
    png(tmp_path / "a.png")
    path = write(tmp_path / "p.jsonl", record(prompt="<image>1", images=["a.png"]))
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))

    def full(descriptor, data):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(OSError, match="No space left.*TMPDIR.*/temporary'") as caught:
        read_prompts(path)
    assert caught.value.errno == errno.ENOSPC
    assert caught.value.filename == str(temporary)
