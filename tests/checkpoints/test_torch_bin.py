"""PyTorch `.bin` files, read without PyTorch."""

import json
import pickle
import zipfile

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch_format import Archive, call, dump, save

from geomjax.checkpoints import CheckpointError
from geomjax.checkpoints.torch_bin import TorchSource
from geomjax.checkpoints.torch_pickle import Global


def _array(*shape, dtype=np.float32, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def _assert_same(source, tensors):
    assert list(source.keys()) == list(tensors)
    for name, tensor in tensors.items():
        read = source.read(name)
        assert source.spec(name) == (tensor.shape, tensor.dtype)
        assert (read.shape, read.dtype) == (tensor.shape, tensor.dtype)
        assert np.ascontiguousarray(read).tobytes() == tensor.tobytes()
        assert not read.flags.writeable
        source.prefetch(name)
        source.release(name)


def _open(tmp_path, archive, root):
    return TorchSource(archive.save(tmp_path / "pytorch_model.bin", root))


def test_reads_a_state_dict(tmp_path):
    tensors = {
        "single": _array(3, 4),
        "half": _array(5, 2, dtype=ml_dtypes.bfloat16),
        "ieee": _array(7, dtype=np.float16),
        "double": np.array(2.5),
        "empty": _array(0, 3),
    }
    save(tmp_path / "pytorch_model.bin", tensors)
    _assert_same(TorchSource(tmp_path), tensors)
    _assert_same(TorchSource(tmp_path / "pytorch_model.bin"), tensors)


def test_reads_views_parameters_and_shared_storages(tmp_path):
    archive = Archive()
    base = np.arange(12, dtype=np.float32)
    whole = archive.tensor(base)
    shared = whole.args[0]

    def view(offset, shape, strides):
        return call(
            "torch._utils._rebuild_tensor_v2", shared, offset, shape, strides, False
        )

    source = _open(
        tmp_path,
        archive,
        {
            "whole": whole,
            "slice": view(2, (5,), (1,)),
            "transposed": view(0, (3, 4), (1, 3)),
            "parameter": call(
                "torch._utils._rebuild_parameter", view(6, (2, 3), (3, 1)), True, {}
            ),
        },
    )
    _assert_same(
        source,
        {
            "whole": base,
            "slice": base[2:7],
            "transposed": np.ascontiguousarray(base.reshape(4, 3).T),
            "parameter": base[6:].reshape(2, 3),
        },
    )
    assert np.shares_memory(source.read("whole"), source.read("whole"))


def test_what_is_no_dense_floating_tensor_is_left_out(tmp_path):
    archive = Archive()
    f8 = archive.tensor(np.zeros(4, np.float32))
    f8.name = "torch._utils._rebuild_tensor_v3"
    f8.args = (*f8.args[:6], Global("torch.float8_e4m3fn"))
    root = {
        "w": archive.tensor(_array(2)),
        "ids": archive.tensor(np.arange(3)),
        "f8": f8,
        "sparse": call("torch._utils._rebuild_sparse_tensor", 1),
        "step": 3,
    }
    source = _open(tmp_path, archive, root)
    assert list(source.keys()) == ["w"]
    assert set(source.left_out) == {"ids", "f8", "sparse", "step"}
    assert "int64" in source.left_out["ids"]
    assert "float8_e4m3fn" in source.left_out["f8"]
    assert "sparse" in source.left_out["sparse"]


def test_reads_shards_through_the_index(tmp_path):
    a, b = {"a": _array(2, 3)}, {"b": _array(4, seed=1)}
    save(tmp_path / "pytorch_model-00001-of-00002.bin", a)
    save(tmp_path / "pytorch_model-00002-of-00002.bin", b)
    weight_map = {
        k: f"pytorch_model-0000{i}-of-00002.bin" for i, k in ((1, "a"), (2, "b"))
    }
    index = tmp_path / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    _assert_same(TorchSource(tmp_path), a | b)
    index.write_text(json.dumps({"weight_map": weight_map | {"b": "../x.bin"}}))
    with pytest.raises(CheckpointError, match="inside its folder"):
        TorchSource(tmp_path)


def test_a_malicious_file_is_refused_and_not_run(tmp_path):
    marker = tmp_path / "was_run"

    class Payload:
        def __reduce__(self):
            return open, (str(marker), "w")

    content = pickle.dumps({"w": Payload()}, 2)
    with pytest.raises(CheckpointError, match=r"carries code: .*'_?io\.open'"):
        _open(tmp_path, Archive(), content)
    assert not marker.exists()
    pickle.loads(content)["w"].close()  # The payload does run where pickle reads it.
    assert marker.exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shape": (3, 5), "strides": (5, 1)}, "does not fit its storage"),
        ({"shape": (4,), "strides": (1,), "offset": 10}, "does not fit its storage"),
        ({"shape": (2,), "strides": (-1,)}, "does not fit its storage"),
        ({"shape": (-2,), "strides": (1,)}, "does not fit its storage"),
        ({"shape": (2,), "strides": (1, 1)}, "does not fit its storage"),
        ({"shape": (2**40, 2**40), "strides": (0, 0)}, "does not fit its storage"),
        ({"shape": (50,), "strides": (0,)}, "does not fit its storage"),
        ({"shape": (2.0,), "strides": (1,)}, "not of integers"),
        ({"numel": 13}, "truncated"),
        ({"numel": -1}, "truncated"),
        ({"numel": 2**70}, "truncated"),
    ],
)
def test_a_tensor_that_does_not_fit_its_storage_is_refused(tmp_path, changes, message):
    archive = Archive()
    root = {
        "good": archive.tensor(_array(2)),
        "bad": archive.tensor(_array(12), **changes),
    }
    with pytest.raises(CheckpointError, match=f"'bad': .*{message}"):
        _open(tmp_path, archive, root)


def test_a_missing_storage_is_refused(tmp_path):
    archive = Archive()
    root = {"w": archive.tensor(_array(2))}
    archive.storages.clear()
    with pytest.raises(CheckpointError, match="'w': storage '0' is missing"):
        _open(tmp_path, archive, root)


@pytest.mark.parametrize(
    ("root", "message"),
    [
        (3, "holds no state dict"),
        ({"model": {}}, "no tensors at its top level, only 'model'"),
        ({1: None}, "holds no state dict"),
        (call("torch._utils._rebuild_tensor_v2"), "holds no state dict"),
    ],
)
def test_what_is_no_state_dict_is_refused(tmp_path, root, message):
    with pytest.raises(CheckpointError, match=message):
        _open(tmp_path, Archive(), root)


def test_archives_that_cannot_be_mapped_are_refused(tmp_path):
    path = tmp_path / "pytorch_model.bin"
    archive = Archive()
    root = {"w": archive.tensor(np.zeros(100, np.float32))}
    archive.save(path, root, compression=zipfile.ZIP_DEFLATED)
    with pytest.raises(CheckpointError, match="compressed"):
        TorchSource(path)
    archive.save(path, root, order=b"big")
    with pytest.raises(CheckpointError, match="little-endian"):
        TorchSource(path)
    path.write_bytes(dump({}))
    with pytest.raises(CheckpointError, match=r"since PyTorch 1\.6"):
        TorchSource(path)
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("other", b"")
    with pytest.raises(CheckpointError, match=r"0 files named data\.pkl"):
        TorchSource(path)


def test_a_file_cut_short_is_refused(tmp_path):
    path = save(tmp_path / "pytorch_model.bin", {"w": _array(50)})
    content = path.read_bytes()
    for size in range(0, len(content), 7):
        path.write_bytes(content[:size])
        with pytest.raises(CheckpointError):
            TorchSource(path)


def test_an_empty_folder_says_what_was_looked_for(tmp_path):
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin"):
        TorchSource(tmp_path)


@settings(max_examples=300, deadline=None)
@given(
    edits=st.lists(
        st.tuples(st.integers(0, 10**6), st.integers(0, 255)), min_size=1, max_size=3
    )
)
def test_mutated_files_never_break_the_reader(tmp_path_factory, edits):
    folder = tmp_path_factory.mktemp("fuzz")
    path = save(folder / "f.bin", {"a": _array(2, 3), "b": _array(4)})
    content = bytearray(path.read_bytes())
    for position, value in edits:
        content[position % len(content)] = value
    path.write_bytes(content)
    try:
        source = TorchSource(path)
    except CheckpointError:
        return
    for name in source.keys():
        assert source.read(name).nbytes <= len(content)
        source.read(name).tobytes()


@pytest.mark.parity
def test_reads_what_torch_writes(tmp_path):
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    tensors = {
        "single": torch.randn(3, 4),
        "half": torch.randn(5, 2, dtype=torch.bfloat16),
        "ieee": torch.randn(2).half(),
        "double": torch.tensor(2.5, dtype=torch.float64),
        "transposed": torch.randn(4, 6).T,
        "slice": torch.randn(8)[2:5],
        "empty": torch.zeros(0, 3),
        "parameter": torch.nn.Parameter(torch.randn(3)),
        "ids": torch.arange(3),
        "f8": torch.randn(4).to(torch.float8_e4m3fn),
        "sparse": torch.eye(3).to_sparse(),
    }
    for protocol in (2, 4):
        torch.save(tensors, tmp_path / "pytorch_model.bin", pickle_protocol=protocol)
        source = TorchSource(tmp_path)
        assert set(source.left_out) == {"ids", "f8", "sparse"}
        for name in source.keys():
            expected = tensors[name].detach()
            assert source.spec(name).dtype.name == str(expected.dtype)[6:]
            np.testing.assert_array_equal(
                source.read(name).astype(np.float64), expected.double().numpy()
            )
    module = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    torch.save(module.state_dict(), tmp_path / "pytorch_model.bin")
    source = TorchSource(tmp_path)
    assert set(source.left_out) == {"1.num_batches_tracked"}
    np.testing.assert_array_equal(
        source.read("0.weight"), module[0].weight.detach().numpy()
    )
    torch.save(module, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="Sequential"):
        TorchSource(tmp_path)
