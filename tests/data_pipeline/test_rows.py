import pytest

from geomjax.data.adapters import Adapter, load_examples
from geomjax.data.rows import read_hub, read_local, require_columns

PLAIN = Adapter("", "", ("a",), lambda row: (str(row["a"]), None), "mathematics")


def test_jsonl_keeps_order_and_counts_blank_lines(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(
        b'\xef\xbb\xbf{"a": 1, "b": "\xe2\x80\xa8"}\n\n{"b": "y", "a": 2}\n'
    )
    found = read_local(path)
    assert found.columns == ("a", "b")
    assert [(place.line, row) for place, row in found.rows] == [
        (1, {"a": 1, "b": "\u2028"}),
        (3, {"b": "y", "a": 2}),
    ]
    assert len(list(read_local(path, limit=1).rows)) == 1


def test_every_format_gives_the_same_rows(tmp_path):
    pa = pytest.importorskip("pyarrow", reason="needs the data extra")
    import pyarrow.parquet as pq

    table = pa.Table.from_pylist([{"a": 1, "b": [{"c": "x"}]}, {"a": 2, "b": []}])
    pq.write_table(table, tmp_path / "a.parquet")
    for name, make in (("f", pa.ipc.new_file), ("s", pa.ipc.new_stream)):
        with make(str(tmp_path / f"{name}.arrow"), table.schema) as writer:
            writer.write_table(table)
    for name in ("a.parquet", "f.arrow", "s.arrow"):
        found = read_local(tmp_path / name)
        assert [row for _, row in found.rows] == table.to_pylist()
        assert len(list(read_local(tmp_path / name, limit=1).rows)) == 1
    places = [place for place, _ in read_local(tmp_path).rows]
    assert [place.line for place in places] == [1, 2] * 3
    assert places[2].file.endswith("f.arrow")


def test_what_datasets_saves_is_read(tmp_path):
    datasets = pytest.importorskip("datasets", reason="needs the data extra")
    datasets.Dataset.from_list([{"a": 1}, {"a": 2}]).save_to_disk(str(tmp_path / "d"))
    assert [row for _, row in read_local(tmp_path / "d").rows] == [{"a": 1}, {"a": 2}]


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (b'{"a": 1}\n{"a": \n[3]\n', "row 2 is not JSON(.|\n)*row 3 is a list"),
        (b'{"a": "\xff"}\n', "row 1 is not JSON in UTF-8"),
        (
            b'{"a": 1}\n{"b": 1}\n',
            r"row 2 has the fields \['b'\], the first row \['a'\]",
        ),
        (b"\n \n", "holds no row"),
    ],
)
def test_damaged_jsonl_names_its_lines(tmp_path, data, problem):
    path = tmp_path / "a.jsonl"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=problem):
        load_examples(PLAIN, path)


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow"])
def test_damaged_tables_are_named(tmp_path, name):
    pytest.importorskip("pyarrow", reason="needs the data extra")
    (tmp_path / name).write_bytes(b"PAR1 and then nothing of the kind")
    with pytest.raises(ValueError, match=f"{name} cannot be read"):
        read_local(tmp_path / name)


@pytest.mark.parametrize("name", ["absent.jsonl", "table.csv", "empty"])
def test_what_is_no_data_is_told(tmp_path, name):
    (tmp_path / "table.csv").write_text("a,b\n")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"no \.jsonl, \.parquet, \.arrow file"):
        read_local(tmp_path / name)


def test_missing_columns_name_those_found(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": 1, "b": 2}\n')
    require_columns(read_local(path), ("a",))
    with pytest.raises(
        ValueError, match="no column c, d; it has a, b; expected a, c, d"
    ):
        require_columns(read_local(path), ("a", "c", "d"))


@pytest.mark.parametrize("files", [(), ("test.jsonl",)])
def test_a_hub_out_of_reach_says_how_to_use_local_files(files, monkeypatch, tmp_path):
    pytest.importorskip("datasets", reason="needs the data extra")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path))
    with pytest.raises(ValueError, match="hf download --repo-type dataset nobody/none"):
        read_hub("nobody/none", split="train", files=files, limit=3)


def test_a_hub_dataset_is_read_undecoded(monkeypatch, tmp_path):
    datasets = pytest.importorskip("datasets", reason="needs the data extra")
    data = datasets.Dataset.from_list([{"image": {"bytes": b"x", "path": None}}] * 2)
    data = data.cast_column("image", datasets.Image())
    asked = []

    def load(name, config, *, split):
        asked.append((name, config, split))
        return data

    monkeypatch.setattr(datasets, "load_dataset", load)
    found = read_hub("a/b", config="c", split="test", limit=2)
    assert asked == [("a/b", "c", "test[:2]")]
    rows = list(found.rows)
    assert [str(place) for place, _ in rows] == [
        "a/b[test], row 1",
        "a/b[test], row 2",
    ]
    assert rows[0][1] == {"image": {"bytes": b"x", "path": None}}
