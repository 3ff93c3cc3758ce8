"""Orbax checkpoints as a source."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from geomjax.checkpoints import CheckpointError, open_source
from geomjax.checkpoints.orbax_source import OrbaxSource

# Orbax leaves tasks and threads behind when a file that it reads is damaged.
damaged = pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnhandledThreadExceptionWarning",
    "ignore::pytest.PytestUnraisableExceptionWarning",
)


@pytest.fixture(scope="module")
def params():
    mesh = jax.make_mesh((8,), ("data",))
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    values = jax.random.normal(jax.random.key(0), (8, 6))
    return {
        "embed": jax.device_put(values, sharding),
        "layers": {"q": jnp.arange(24, dtype=jnp.bfloat16).reshape(2, 3, 4)},
        "blocks": [jnp.ones(3, jnp.float16), {"w": jnp.full((2, 2), 2.0)}],
    }


@pytest.fixture(scope="module")
def saved(tmp_path_factory, params):
    """A folder with the params in each of Orbax's layouts."""
    folder = tmp_path_factory.mktemp("orbax")
    state = {"params": params, "step": 3, "moments": (jnp.zeros(2),)}
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder / "params", params)
        checkpointer.save(folder / "state", state)
    ocp.PyTreeCheckpointer(use_ocdbt=False).save(folder / "files", params)
    with ocp.CheckpointManager(folder / "run") as manager:
        for step in (1, 2):
            manager.save(step, args=ocp.args.StandardSave(state))
    with ocp.CheckpointManager(folder / "many") as manager:
        items = {name: ocp.args.StandardSave(params) for name in ("a", "b")}
        manager.save(1, args=ocp.args.Composite(**items))
    return folder


def _assert_holds(source, params):
    expected = {
        jax.tree_util.keystr(path, simple=True, separator="."): np.asarray(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    }
    assert set(source.keys()) == set(expected)
    for name, array in expected.items():
        source.prefetch(name)
        assert source.spec(name) == (array.shape, array.dtype)
        assert source.read(name).dtype == array.dtype
        assert source.read(name).tobytes() == array.tobytes()
        source.release(name)


@pytest.mark.parametrize(
    "place", ["params", "files", "state", "run/2", "run/2/default"]
)
def test_reads_every_layout(saved, params, place):
    source = open_source(saved / place)
    assert isinstance(source, OrbaxSource)
    _assert_holds(source, params)


def test_what_is_no_parameter_of_a_state_is_left_out(saved):
    source = OrbaxSource(saved / "state")
    assert set(source.left_out) == {"step", "moments.0"}
    assert "training state" in source.left_out["step"]
    with pytest.raises(KeyError, match="training state"):
        source.read("step")


def test_integers_are_left_out(tmp_path):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "t", {"w": jnp.ones(2), "ids": jnp.arange(2)})
    source = OrbaxSource(tmp_path / "t")
    assert list(source.keys()) == ["w"]
    assert "int32" in source.left_out["ids"]


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("run", r"holds the steps \[1, 2\]; give the folder of one"),
        ("many/1", r"holds the trees \['a', 'b'\]; give the folder of one"),
        ("absent", "no such folder"),
    ],
)
def test_a_folder_that_is_not_one_tree_says_what_to_give(saved, place, message):
    with pytest.raises(CheckpointError, match=message):
        OrbaxSource(saved / place)


def test_a_folder_without_a_tree_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="no Orbax checkpoint"):
        OrbaxSource(tmp_path)


def test_a_save_that_was_cut_off_is_refused(saved, tmp_path):
    unfinished = tmp_path / "params.orbax-checkpoint-tmp"
    shutil.copytree(saved / "params", unfinished)
    with pytest.raises(CheckpointError, match="never finished"):
        OrbaxSource(unfinished)


@damaged
@pytest.mark.parametrize("name", ["_METADATA", "manifest.ocdbt"])
@pytest.mark.parametrize("content", [None, b"", b"{nonsense"])
def test_damaged_descriptions_are_refused(saved, tmp_path, name, content):
    folder = tmp_path / "t"
    shutil.copytree(saved / "params", folder)
    if content is None:
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(content)
    with pytest.raises(CheckpointError, match="damaged or incomplete|no Orbax"):
        OrbaxSource(folder)


@damaged
@pytest.mark.parametrize("keep", [0, 20])
def test_damaged_data_is_refused_with_the_name(saved, tmp_path, keep):
    folder = tmp_path / "t"
    shutil.copytree(saved / "files", folder)
    source = OrbaxSource(folder)
    path = folder / "layers.q" / "0.0.0"
    content = path.read_bytes()
    path.unlink()
    if keep:
        path.write_bytes(content[:keep])
    with pytest.raises(CheckpointError, match=r"'layers\.q': damaged or incomplete"):
        source.read("layers.q")
