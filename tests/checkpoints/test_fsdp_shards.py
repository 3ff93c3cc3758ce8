"""The rank files of an FSDP run, put together without PyTorch."""

import subprocess
import sys
import textwrap

import ml_dtypes
import numpy as np
import pytest
from torch_format import Archive, call

from geomjax.checkpoints import CheckpointError
from geomjax.checkpoints.fsdp_shards import FsdpSource


def _array(*shape, seed=0, dtype=np.float32):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def _write(folder, ranks, world=None):
    """One file a rank; `ranks` maps a rank to a function of its archive."""
    for rank, entries in ranks.items():
        archive = Archive()
        root = call("collections.OrderedDict", items=entries(archive))
        size = len(ranks) if world is None else world
        archive.save(folder / f"model_world_size_{size}_rank_{rank}.pt", root)
    return folder


def _chunks(array, count, axis=0):
    """As torch.chunk: equal slices, the last ones smaller or empty."""
    step = -(-array.shape[axis] // count)
    cuts = [min(step * i, array.shape[axis]) for i in range(1, count)]
    return np.split(array, cuts, axis)


def _sharded(tensors, count, axis=0):
    def entries(rank):
        return lambda archive: {
            name: archive.dtensor(
                np.ascontiguousarray(_chunks(array, count, axis)[rank]),
                array.shape,
                (axis,),
                [rank],
            )
            for name, array in tensors.items()
        }

    return {rank: entries(rank) for rank in range(count)}


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_uneven_slices_are_put_together(tmp_path, count):
    tensors = {
        "embed": _array(7, 4, dtype=ml_dtypes.bfloat16),
        "w": _array(8, 4),
        "norm": _array(3),
    }
    source = FsdpSource(_write(tmp_path, _sharded(tensors, count)))
    assert list(source.keys()) == list(tensors)
    for name, array in tensors.items():
        source.prefetch(name)
        assert source.spec(name) == (array.shape, array.dtype)
        assert source.read(name).tobytes() == array.tobytes()
        source.release(name)
        assert source.read(name).dtype == array.dtype


def test_slices_along_another_axis(tmp_path):
    array = _array(4, 6)
    source = FsdpSource(_write(tmp_path, _sharded({"w": array}, 3, axis=1)))
    np.testing.assert_array_equal(source.read("w"), array)


def test_copies_along_one_mesh_axis_and_slices_along_the_other(tmp_path):
    array, scale = _array(5, 2), _array(3, seed=1)

    def entries(rank):
        place = [rank // 2, rank % 2]
        return lambda archive: {
            "w": archive.dtensor(_chunks(array, 2)[place[1]], (5, 2), (None, 0), place),
            "scale": archive.dtensor(scale, (3,), (None, None), place),
        }

    source = FsdpSource(_write(tmp_path, {rank: entries(rank) for rank in range(4)}))
    np.testing.assert_array_equal(source.read("w"), array)
    np.testing.assert_array_equal(source.read("scale"), scale)


def test_slices_along_both_mesh_axes(tmp_path):
    array = _array(4, 6)

    def entries(rank):
        i, j = divmod(rank, 3)
        piece = np.ascontiguousarray(array[2 * i : 2 * i + 2, 2 * j : 2 * j + 2])
        return lambda archive: {"w": archive.dtensor(piece, (4, 6), (0, 1), [i, j])}

    source = FsdpSource(_write(tmp_path, {rank: entries(rank) for rank in range(6)}))
    np.testing.assert_array_equal(source.read("w"), array)


def test_a_single_rank_s_plain_tensors_are_whole(tmp_path):
    array = _array(3, 2)
    source = FsdpSource(_write(tmp_path, {0: lambda a: {"w": a.tensor(array)}}))
    np.testing.assert_array_equal(source.read("w"), array)


def test_plain_tensors_of_several_ranks_are_left_out(tmp_path):
    slices = _sharded({"w": _array(4)}, 2)
    ranks = {
        rank: lambda a, inner=inner: inner(a) | {"p": a.tensor(_array(2)), "step": 3}
        for rank, inner in slices.items()
    }
    source = FsdpSource(_write(tmp_path, ranks))
    assert list(source.keys()) == ["w"]
    assert "copies or slices" in source.left_out["p"]
    assert "int is not a tensor" in source.left_out["step"]
    with pytest.raises(KeyError, match="copies or slices"):
        source.read("p")


def test_an_older_mesh_without_coordinates_goes_by_rank(tmp_path):
    array = _array(4)

    def entries(rank):
        piece = _chunks(array, 2)[rank]
        return lambda a: {"w": a.dtensor(piece, (4,), (0,), None, mesh={"mesh": None})}

    source = FsdpSource(_write(tmp_path, {0: entries(0), 1: entries(1)}))
    np.testing.assert_array_equal(source.read("w"), array)


def test_classes_are_known_under_the_names_of_older_versions(tmp_path):
    array = _array(4)
    for rank, piece in enumerate(_chunks(array, 2)):
        archive = Archive("torch.distributed._tensor")
        root = {"w": archive.dtensor(piece, (4,), (0,), [rank])}
        archive.save(tmp_path / f"model_world_size_2_rank_{rank}.pt", root)
    np.testing.assert_array_equal(FsdpSource(tmp_path).read("w"), array)


def test_the_config_of_the_run_says_whether_heads_are_tied(tmp_path):
    folder = _write(tmp_path, _sharded({"w": _array(4)}, 2))
    assert FsdpSource(folder).tie_word_embeddings is None
    (folder / "huggingface").mkdir()
    (folder / "huggingface" / "config.json").write_text('{"tie_word_embeddings": true}')
    assert FsdpSource(folder).tie_word_embeddings is True


def _dtensor(array, shape=(4,), placements=(0,), place=(0,), **options):
    return lambda a: {"w": a.dtensor(array, shape, placements, list(place), **options)}


HALF = _array(2)


@pytest.mark.parametrize(
    ("ranks", "world", "message"),
    [
        ({}, None, "found sizes: none"),
        ({0: _dtensor(HALF)}, 2, "rank 1 of 2 has no file"),
        ({0: _dtensor(HALF), 1: _dtensor(HALF), 2: _dtensor(HALF)}, 2, "a rank 2"),
        ({0: _dtensor(HALF), 1: lambda a: {}}, None, "absent from the files of ranks"),
        (
            {0: _dtensor(HALF), 1: _dtensor(HALF)},
            None,
            "two ranks have the same place",
        ),
        ({0: _dtensor(HALF), 1: _dtensor(HALF, place=(2,))}, None, "only the places"),
        (
            {0: _dtensor(HALF), 1: _dtensor(_array(3), place=(1,))},
            None,
            "make up shape",
        ),
        (
            {0: _dtensor(HALF), 1: _dtensor(_array(2, 2), place=(1,))},
            None,
            "do not fit together",
        ),
        (
            {0: _dtensor(HALF, placements=(1,)), 1: _dtensor(HALF, (4,), (1,), (1,))},
            None,
            "do not fit together",
        ),
        ({0: _dtensor(HALF), 1: _dtensor(HALF, (5,), place=(1,))}, None, "whole shape"),
        (
            {0: _dtensor(HALF), 1: _dtensor(HALF, (4,), (None,), (1,))},
            None,
            "placement",
        ),
        (
            {0: _dtensor(HALF), 1: _dtensor(HALF.astype("f2"), place=(1,))},
            None,
            "dtypes differ",
        ),
        ({0: _dtensor(HALF, placements=("Partial",))}, None, "placement Partial"),
        ({0: _dtensor(HALF, placements=("_StridedShard",))}, None, "_StridedShard"),
        ({0: _dtensor(HALF, placements=())}, None, "without placements"),
        ({0: _dtensor(HALF, placements=(0, 0))}, None, "coordinates"),
        ({0: lambda a: {"step": 3}}, None, "no tensor can be read"),
    ],
)
def test_ranks_that_do_not_fit_together_are_refused(tmp_path, ranks, world, message):
    with pytest.raises(CheckpointError, match=message):
        FsdpSource(_write(tmp_path, ranks, world))


def test_files_of_two_runs_are_refused(tmp_path):
    _write(tmp_path, _sharded({"w": _array(4)}, 2))
    _write(tmp_path, _sharded({"w": _array(4)}, 3))
    with pytest.raises(CheckpointError, match="found sizes: 2, 3"):
        FsdpSource(tmp_path)


def test_every_parameter_that_does_not_fit_is_listed(tmp_path):
    def entries(rank):
        return lambda a: {n: a.dtensor(HALF, (5,), (0,), [rank]) for n in ("u", "v")}

    with pytest.raises(CheckpointError) as caught:
        FsdpSource(_write(tmp_path, {0: entries(0), 1: entries(1)}))
    assert [p[:3] for p in caught.value.problems] == ["'u'", "'v'"]


@pytest.mark.parity
def test_reads_what_torch_s_dtensors_write(tmp_path):
    pytest.importorskip("torch")
    program = """
        import sys
        import torch
        import torch.distributed as dist
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.tensor import DTensor, Replicate, Shard
        from torch.testing._internal.distributed.fake_pg import FakeStore

        def save(folder, rank):
            flat = init_device_mesh("cpu", (4,), mesh_dim_names=("fsdp",))
            grid = init_device_mesh("cpu", (2, 2), mesh_dim_names=("ddp", "fsdp"))
            torch.manual_seed(0)
            state = {}
            for name, shape, dtype in (
                ("embed", (7, 4), torch.bfloat16), ("w", (8, 4), torch.float32),
                ("norm", (3,), torch.float32),
            ):
                whole = torch.randn(shape).to(dtype)
                for mesh, count, index, placements in (
                    (flat, 4, rank, [Shard(0)]),
                    (grid, 2, rank % 2, [Replicate(), Shard(0)]),
                ):
                    chunks = torch.chunk(whole, count, 0)
                    local = chunks[index] if index < len(chunks) else whole[:0]
                    state[f"{name}_{len(placements)}"] = DTensor.from_local(
                        local.clone(), mesh, placements, run_check=False,
                        shape=whole.shape, stride=whole.stride(),
                    )
                torch.save(whole, f"{folder}/{name}.whole")
            torch.save(state, f"{folder}/model_world_size_4_rank_{rank}.pt")

        for rank in range(4):
            dist.init_process_group("fake", rank=rank, world_size=4, store=FakeStore())
            save(sys.argv[1], rank)
            dist.destroy_process_group()
    """
    subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program), str(tmp_path)],
        check=True,
        capture_output=True,
    )
    import torch

    source = FsdpSource(tmp_path)
    assert len(list(source.keys())) == 6
    for key in source.keys():
        whole = torch.load(tmp_path / f"{key.split('_')[0]}.whole")
        assert source.spec(key).dtype.name == str(whole.dtype)[6:]
        np.testing.assert_array_equal(
            source.read(key).astype(np.float32), whole.float().numpy()
        )
