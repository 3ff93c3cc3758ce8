"""One short text names a file, a named set, the same in local files, or the hub."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from geomjax.data.prompts import Example, Message
from geomjax.data.sources import Columns, read_source

ROWS = [{"prompt": "1+1=", "answer": "2"}, {"prompt": "2+1=", "answer": "3"}]
DAPO = {
    "data_source": "math_dapo",
    "prompt": [{"content": "What is 1+1?", "role": "user"}],
    "ability": "MATH",
    "reward_model": {"ground_truth": "2", "style": "rule-lighteval/MATH_v2"},
    "extra_info": {"index": "a"},
}


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def arrow(path, rows):
    table = pa.Table.from_pylist(rows)
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as w:
        w.write_table(table)
    return str(path)


def parquet(path, rows):
    pq.write_table(pa.Table.from_pylist(rows), path)
    return str(path)


def test_files_of_every_kind_give_the_same(tmp_path):
    expected = [Example("1+1=", "2", 1), Example("2+1=", "3", 2)]
    assert read_source(write(tmp_path / "a.jsonl", ROWS)) == expected
    assert read_source(parquet(tmp_path / "a.parquet", ROWS)) == expected
    assert read_source(arrow(tmp_path / "a.arrow", ROWS)) == expected
    assert read_source(str(tmp_path / "a.parquet"), limit=1) == expected[:1]
    assert read_source(str(tmp_path / "a.jsonl"), limit=1) == expected[:1]


def test_a_folder_and_columns_of_ones_own(tmp_path):
    folder = tmp_path / "set"
    folder.mkdir()
    messages = [{"role": "user", "content": "Hi"}]
    parquet(folder / "1.parquet", [{"q": messages, "a": 7, "id": 0}])
    columns = Columns(prompt="q", answer="a")
    (example,) = read_source(str(folder), columns=columns)
    assert example == Example((Message("user", "Hi"),), "7", 1)
    (example,) = read_source(str(folder), columns=columns._replace(answer=""))
    assert example.answer is None
    with pytest.raises(ValueError, match="no column prompt, answer; it has q, a, id"):
        read_source(str(folder))


def test_a_named_set_in_local_files(tmp_path):
    path = write(tmp_path / "dapo.jsonl", [DAPO])
    (example,) = read_source(f"dapo-math-17k={path}")
    assert example == Example((Message("user", "What is 1+1?"),), "2", 1)


def test_an_unreachable_hub_says_how_to_use_files(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    for source in ("math-500", "someone/some-set"):
        with pytest.raises(ValueError, match="give the path of the files"):
            read_source(source)


def test_what_is_no_source_is_refused_with_what_there_is(tmp_path):
    with pytest.raises(FileNotFoundError, match="aime24, aime25"):
        read_source("aime-24")
    with pytest.raises(FileNotFoundError, match=r"none\.parquet"):
        read_source(str(tmp_path / "none.parquet"))
    with pytest.raises(FileNotFoundError, match=r"no file .*none\.jsonl"):
        read_source(str(tmp_path / "none.jsonl"))


def test_missing_answers_and_odd_values_are_named(tmp_path):
    path = parquet(tmp_path / "a.parquet", [{"prompt": "a"}, {"prompt": "b"}])
    columns = Columns(answer="")
    with pytest.raises(ValueError, match="2 examples have no answer"):
        read_source(path, columns=columns, require_answers=True)
    path = write(tmp_path / "b.jsonl", [{"q": "a", "a": [1]}, {"q": "", "a": "1"}])
    with pytest.raises(ValueError, match=r"row 1: `a` is \[1\], expected text") as e:
        read_source(path, columns=Columns("q", "a"))
    assert "row 2: `prompt` is empty" in str(e.value)
