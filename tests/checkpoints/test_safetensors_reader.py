"""The safetensors reader: faithful on good files, `CheckpointError` on bad ones."""

import json
import math
import os
import struct

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from geomjax.checkpoints import CheckpointError, SafetensorsSource

F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def _bytes(header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def _open(tmp_path, content):
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    return SafetensorsSource(path)


@pytest.fixture
def tensors():
    rng = np.random.default_rng(0)
    return {
        "half": rng.standard_normal((3, 5)).astype(ml_dtypes.bfloat16),
        "single": rng.standard_normal((4, 3)).astype(np.float32),
        "ieee": rng.standard_normal(7).astype(np.float16),
        "double": np.array(1.5),
        "empty": np.zeros((0, 4), np.float32),
        "row": rng.standard_normal((1, 6)).astype(np.float32),
    }


def _assert_same(source, tensors):
    assert set(source.keys()) == set(tensors)
    for name, tensor in tensors.items():
        read = source.read(name)
        assert source.spec(name) == (tensor.shape, tensor.dtype)
        assert (read.shape, read.dtype) == (tensor.shape, tensor.dtype)
        assert read.tobytes() == tensor.tobytes()
        assert not read.flags.writeable


def test_reads_what_the_safetensors_library_writes(tmp_path, tensors):
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    _assert_same(SafetensorsSource(tmp_path), tensors)
    _assert_same(SafetensorsSource(tmp_path / "model.safetensors"), tensors)


def test_reads_are_views_that_survive_release(tmp_path, tensors):
    save_file(tensors, tmp_path / "model.safetensors")
    source = SafetensorsSource(tmp_path)
    first, second = source.read("half"), source.read("half")
    assert np.shares_memory(first, second)
    source.prefetch("half")
    source.release("half")
    assert first.tobytes() == tensors["half"].tobytes()


def test_misaligned_tensors_are_read_aligned(tmp_path):
    header = {
        "a": {"dtype": "BF16", "shape": [1], "data_offsets": [0, 2]},
        "b": {"dtype": "F64", "shape": [2], "data_offsets": [2, 18]},
    }
    values = np.array([1.5, -2.0])
    source = _open(tmp_path, _bytes(header, b"\x80\x3f" + values.tobytes()))
    assert source.read("b").flags.aligned
    np.testing.assert_array_equal(source.read("b"), values)


def test_other_dtypes_are_left_out_by_name(tmp_path):
    header = {
        "w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},
        "ids": {"dtype": "I64", "shape": [1], "data_offsets": [4, 12]},
        "f8": {"dtype": "F8_E4M3", "shape": [3], "data_offsets": [12, 15]},
        "f4": {"dtype": "F4", "shape": [2], "data_offsets": [15, 16]},
    }
    source = _open(tmp_path, _bytes(header, bytes(16)))
    assert list(source.keys()) == ["w"]
    assert set(source.left_out) == {"ids", "f8", "f4"}
    assert "F8_E4M3" in source.left_out["f8"]
    with pytest.raises(KeyError, match="F8_E4M3"):
        source.read("f8")
    with pytest.raises(KeyError, match="no such tensor"):
        source.spec("nothing")


BAD_FILES = {
    "empty file": (b"", "empty"),
    "shorter than a length": (b"\x01\x02", "truncated"),
    "length past the file": (_bytes({}, length=100), "truncated"),
    "length past the limit": (struct.pack("<Q", 2**63) + bytes(99), "the format allow"),
    "not JSON": (_bytes(b"{nonsense"), "not valid JSON"),
    "not UTF-8": (_bytes(b'{"\xff": 1}'), "not valid JSON"),
    "deeply nested": (_bytes(b'{"a":' * 60_000), "not valid JSON"),
    "an array": (_bytes(b"[]"), "not a JSON object"),
    "integer of many digits": (_bytes(b'{"a":' + b"9" * 5000 + b"}"), "not valid JSON"),
    "repeated name": (
        _bytes(
            b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},'
            b'"a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}',
            bytes(8),
        ),
        "'a': named twice",
    ),
    "repeated field": (
        _bytes(
            b'{"a":{"dtype":"F32","shape":[1],"shape":[1],"data_offsets":[0,4]}}',
            bytes(4),
        ),
        "'a': must have",
    ),
    "missing field": (_bytes({"a": {"dtype": "F32", "shape": [2]}}, bytes(8)), "must"),
    "entry not an object": (_bytes({"a": 3}), "'a': must have"),
    "unknown dtype": (_bytes({"a": F32 | {"dtype": "F31"}}, bytes(8)), "'F31'"),
    "dtype not a string": (_bytes({"a": F32 | {"dtype": ["F32"]}}, bytes(8)), "dtype"),
    "negative dimension": (_bytes({"a": F32 | {"shape": [-2]}}, bytes(8)), "shape"),
    "fractional dimension": (_bytes({"a": F32 | {"shape": [2.0]}}, bytes(8)), "shape"),
    "boolean dimension": (_bytes({"a": F32 | {"shape": [True]}}, bytes(8)), "shape"),
    "too many dimensions": (
        _bytes({"a": F32 | {"shape": [1] * 40 + [2]}}, bytes(8)),
        "shape",
    ),
    "shape past any memory": (
        _bytes({"a": F32 | {"shape": [0, 2**62, 2**62], "data_offsets": [0, 0]}}),
        "too large",
    ),
    "shape against offsets": (
        _bytes({"a": F32 | {"shape": [3]}}, bytes(8)),
        "12 bytes",
    ),
    "dtype against offsets": (
        _bytes({"a": F32 | {"dtype": "BF16"}}, bytes(8)),
        "4 byt",
    ),
    "offsets reversed": (
        _bytes({"a": F32 | {"data_offsets": [8, 0]}}, bytes(8)),
        "span -8",
    ),
    "offsets not a pair": (_bytes({"a": F32 | {"data_offsets": [0]}}, bytes(8)), "two"),
    "data cut short": (_bytes({"a": F32}, bytes(5)), "truncated"),
    "data to spare": (_bytes({"a": F32}, bytes(9)), "1 bytes after"),
    "a hole": (_bytes({"a": F32 | {"data_offsets": [4, 12]}}, bytes(12)), "hole of 4"),
    "overlap": (
        _bytes({"a": F32, "b": F32 | {"data_offsets": [4, 12]}}, bytes(12)),
        "'b': begins at byte 4 of the data and overlaps 'a'",
    ),
    "metadata not strings": (_bytes({"__metadata__": {"n": 1}}), "__metadata__"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_a_bad_file_is_refused_with_its_path(tmp_path, case):
    content, message = BAD_FILES[case]
    with pytest.raises(CheckpointError, match="model.safetensors") as caught:
        _open(tmp_path, content)
    assert message in str(caught.value)


def test_all_problems_of_a_header_are_listed_at_once(tmp_path):
    header = {"a": 1, "b": F32 | {"dtype": "X"}, "c": F32 | {"shape": [-1]}, "d": F32}
    with pytest.raises(CheckpointError) as caught:
        _open(tmp_path, _bytes(header, bytes(8)))
    assert len(caught.value.problems) == 3
    assert [p[:3] for p in caught.value.problems] == ["'a'", "'b'", "'c'"]


def test_a_missing_checkpoint_says_what_was_looked_for(tmp_path):
    with pytest.raises(CheckpointError, match=r"model\.safetensors\.index\.json"):
        SafetensorsSource(tmp_path)
    with pytest.raises(CheckpointError, match="no such file"):
        SafetensorsSource(tmp_path / "absent.safetensors")


@pytest.fixture
def sharded(tmp_path):
    """A folder of two shards, and a function that rewrites its index."""
    folder = tmp_path / "sharded"
    folder.mkdir()
    save_file({"a": np.ones(2, np.float32)}, folder / "one.safetensors")
    save_file({"b": np.full(3, 2, np.float32)}, folder / "two.safetensors")

    def write_index(**weight_map):
        text = json.dumps({"metadata": {}, "weight_map": weight_map})
        (folder / "model.safetensors.index.json").write_text(text)
        return folder

    write_index(a="one.safetensors", b="two.safetensors")
    return folder, write_index


def test_reads_shards_through_the_index(sharded):
    folder, _ = sharded
    _assert_same(
        SafetensorsSource(folder),
        {"a": np.ones(2, np.float32), "b": np.full(3, 2, np.float32)},
    )


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({"a": "one.safetensors", "b": "absent.safetensors"}, "there is none"),
        ({"a": "one.safetensors", "b": "../two.safetensors"}, "inside its folder"),
        ({"a": "one.safetensors", "b": "x/../../two.safetensors"}, "inside its folder"),
        ({"a": "one.safetensors", "b": "/etc/passwd"}, "inside its folder"),
        ({"a": "one.safetensors", "b": ""}, "not a file name"),
        ({"a": "one.safetensors", "b": "t\0"}, "not a file name"),
        ({"a": "one.safetensors", "b": "b" * 5000}, "cannot be opened"),
        ({"a": "one.safetensors", "b": 3}, "there is none"),
        ({"a": "one.safetensors", "b": "."}, "there is none"),
        ({"a": "one.safetensors", "b": "one.safetensors"}, "does not hold it"),
        ({"a": "two.safetensors", "b": "one.safetensors"}, "the index places it in"),
        ({"a": "one.safetensors"}, "no problem"),
        ({}, "no weight_map"),
    ],
)
def test_an_index_that_cannot_be_trusted_is_refused(sharded, weight_map, message):
    _, write_index = sharded
    folder = write_index(**weight_map)
    if message == "no problem":  # A shard that no tensor needs is not opened.
        assert list(SafetensorsSource(folder).keys()) == ["a"]
        return
    with pytest.raises(CheckpointError, match="index.json") as caught:
        SafetensorsSource(folder)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [b"", b"[]", b"{", b'{"weight_map": []}', b'{"weight_map": {"a": 1, "a": 2}}'],
)
def test_a_malformed_index_is_refused(sharded, text):
    folder, _ = sharded
    (folder / "model.safetensors.index.json").write_bytes(text)
    with pytest.raises(CheckpointError, match="index.json"):
        SafetensorsSource(folder)


def test_a_name_in_two_shards_is_refused(sharded):
    folder, _ = sharded
    both = {"a": np.ones(2, np.float32), "b": np.ones(3, np.float32)}
    save_file(both, folder / "two.safetensors")
    with pytest.raises(
        CheckpointError, match="'a': both in one.safetensors and in two"
    ):
        SafetensorsSource(folder)


def test_a_tensor_that_the_index_does_not_name_is_refused(sharded):
    folder, _ = sharded
    more = {"b": np.ones(3, np.float32), "c": np.ones(3, np.float32)}
    save_file(more, folder / "two.safetensors")
    with pytest.raises(CheckpointError, match="'c': in two.safetensors, but not"):
        SafetensorsSource(folder)


def test_problems_of_several_shards_are_listed_together(sharded):
    folder, _ = sharded
    (folder / "one.safetensors").write_bytes(b"short")
    (folder / "two.safetensors").write_bytes(_bytes(b"[]"))
    with pytest.raises(CheckpointError) as caught:
        SafetensorsSource(folder)
    assert [p.split(":")[0] for p in caught.value.problems] == [
        "one.safetensors",
        "two.safetensors",
    ]


def test_a_link_that_leaves_the_folder_is_refused(sharded, tmp_path):
    folder, _ = sharded
    outside = tmp_path / "outside.safetensors"
    os.replace(folder / "two.safetensors", outside)
    (folder / "two.safetensors").symlink_to(outside)
    with pytest.raises(CheckpointError, match="a link that leaves the folder"):
        SafetensorsSource(folder)


def test_the_links_of_a_hub_snapshot_are_followed(sharded, tmp_path):
    folder, _ = sharded
    repository = tmp_path / "models--org--name"
    (repository / "blobs").mkdir(parents=True)
    snapshot = repository / "snapshots" / "0123abcd"
    snapshot.mkdir(parents=True)
    for path in folder.iterdir():
        os.replace(path, repository / "blobs" / path.name)
        (snapshot / path.name).symlink_to(f"../../blobs/{path.name}")
    assert set(SafetensorsSource(snapshot).keys()) == {"a", "b"}


def _opened_is_sound(path):
    """Opens a file; what can be opened must be readable within its bounds."""
    try:
        source = SafetensorsSource(path)
    except CheckpointError:
        return
    size = path.stat().st_size
    for name in source.keys():
        array = source.read(name)
        assert array.nbytes <= size
        array.tobytes()
        source.release(name)


@settings(max_examples=200, deadline=None)
@given(content=st.binary(max_size=200))
def test_random_bytes_never_break_the_reader(tmp_path_factory, content):
    path = tmp_path_factory.mktemp("fuzz") / "f.safetensors"
    path.write_bytes(content)
    _opened_is_sound(path)


_JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.text(max_size=3),
    lambda children: (
        st.lists(children, max_size=3)
        | st.dictionaries(st.text(max_size=12), children, max_size=3)
    ),
    max_leaves=5,
)
_ENTRY = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "BF16", "F64", "I8", "F4", "??"]) | _JSON,
        "shape": st.lists(st.integers(0, 4), max_size=3) | _JSON,
        "data_offsets": st.lists(st.integers(0, 70), min_size=2, max_size=2) | _JSON,
    }
)


@settings(max_examples=300, deadline=None)
@given(
    header=st.dictionaries(st.text(max_size=4), _ENTRY | _JSON, max_size=4) | _JSON,
    data=st.binary(max_size=64),
    length=st.none() | st.integers(0, 2**64 - 1),
)
def test_headers_of_any_json_never_break_the_reader(
    tmp_path_factory, header, data, length
):
    path = tmp_path_factory.mktemp("fuzz") / "f.safetensors"
    path.write_bytes(_bytes(header, data, length))
    _opened_is_sound(path)


@settings(max_examples=200, deadline=None)
@given(
    index=st.binary(max_size=40)
    | st.builds(
        lambda weight_map: json.dumps({"weight_map": weight_map}).encode(),
        st.dictionaries(
            st.sampled_from(["a", "b"]) | st.text(max_size=3),
            st.sampled_from(["one.safetensors", "../one.safetensors"])
            | st.text(st.characters(), max_size=5)
            | _JSON,
            max_size=3,
        )
        | _JSON,
    )
)
def test_any_index_never_breaks_the_reader(tmp_path_factory, index):
    folder = tmp_path_factory.mktemp("fuzz")
    save_file({"a": np.ones(2, np.float32)}, folder / "one.safetensors")
    (folder / "model.safetensors.index.json").write_bytes(index)
    try:
        source = SafetensorsSource(folder)
    except CheckpointError:
        return
    assert list(source.keys()) == ["a"]


@settings(max_examples=300, deadline=None)
@given(
    edits=st.lists(
        st.tuples(st.integers(0, 400), st.integers(0, 255)), min_size=1, max_size=4
    ),
    cut=st.integers(0, 400),
)
def test_mutated_valid_files_never_break_the_reader(tmp_path_factory, edits, cut):
    header = {
        "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
        "b": {"dtype": "BF16", "shape": [5], "data_offsets": [24, 34]},
    }
    content = bytearray(_bytes(header, bytes(range(34))))
    for position, value in edits:
        content[position % len(content)] = value
    path = tmp_path_factory.mktemp("fuzz") / "f.safetensors"
    path.write_bytes(content[: max(1, len(content) - (cut if cut < 100 else 0))])
    _opened_is_sound(path)


@settings(max_examples=100, deadline=None)
@given(
    shapes=st.lists(st.lists(st.integers(0, 5), max_size=3), max_size=5),
    dtypes=st.lists(
        st.sampled_from([np.float64, np.float32, np.float16, ml_dtypes.bfloat16]),
        min_size=5,
        max_size=5,
    ),
)
def test_valid_files_are_read_as_written(tmp_path_factory, shapes, dtypes):
    rng = np.random.default_rng(len(shapes))
    tensors = {
        f"t{i}": rng.standard_normal(math.prod(shape)).reshape(shape).astype(dtype)
        for i, (shape, dtype) in enumerate(zip(shapes, dtypes, strict=False))
    }
    path = tmp_path_factory.mktemp("fuzz") / "f.safetensors"
    save_file(tensors, path)
    _assert_same(SafetensorsSource(path), tensors)
