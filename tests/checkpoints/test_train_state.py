"""Checkpoints of a run: bitwise, checked before use, and safe on a full disk."""

import json
import shutil
import subprocess
import sys
import textwrap
from contextlib import closing

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from geomjax.checkpoints.train_state import CHECKSUMS, TrainCheckpoints
from geomjax.optim.coordinate_mask import coordinate_mask
from geomjax.train.step import TrainState


def _bits(tree):
    return [
        (leaf.dtype, leaf.shape, np.asarray(leaf).tobytes())
        for leaf in jax.tree.leaves(tree)
    ]


def _state(value: float = 1.0, step: int = 0):
    key = jax.random.key(int(value * 1000))
    return {
        "step": jnp.int32(step),
        "float32": value * jax.random.normal(key, (3, 4)),
        "bfloat16": (value * jax.random.normal(key, (5,))).astype(jnp.bfloat16),
        "bool": jax.random.bernoulli(key, 0.5, (7, 2)),
        "uint8": jnp.arange(4, dtype=jnp.uint8),
    }


@pytest.fixture
def checkpoints(tmp_path):
    opened = []

    def open_again():
        opened.append(TrainCheckpoints(tmp_path / "checkpoints"))
        return opened[-1]

    yield open_again
    for each in opened:
        each.close()


def _save(checkpoints, steps):
    writer = checkpoints()
    for step in steps:
        writer.save(step, _state(float(step), step))
    writer.close()
    return writer.directory


def test_an_empty_folder_restores_nothing(checkpoints):
    reader = checkpoints()
    assert reader.restore(_state()) is None
    assert reader.skipped == []


def test_round_trip_is_bitwise(checkpoints):
    special = np.array([-0.0, 1e-45, np.inf, np.nan], np.float32)
    state = _state() | {"special": jnp.asarray(special)}
    writer = checkpoints()
    writer.save(4, state)
    writer.close()
    like = jax.tree.map(jnp.zeros_like, state)
    restored = checkpoints().restore(like).state
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    assert _bits(restored) == _bits(state)


@pytest.mark.parametrize(
    "tx",
    [
        optax.sgd(0.1),
        optax.sgd(0.1, momentum=0.9),
        optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3)),
        optax.masked(optax.adam(1e-3), {"a": True, "b": False}),
        optax.adamw(optax.linear_schedule(1e-3, 0.0, 10)),
    ],
    ids=["sgd", "momentum", "chain", "masked", "schedule"],
)
@pytest.mark.parametrize("masked", [False, True], ids=["full", "mask"])
def test_optimizer_states_keep_their_structure(checkpoints, tx, masked):
    params = {"a": jnp.ones((4, 3)), "b": jnp.full((3,), 0.5)}
    if masked:
        mask = {"a": np.arange(12).reshape(4, 3) % 3 == 0, "b": None}
        tx = coordinate_mask(mask, tx)
    gradients = {"a": jnp.full((4, 3), 0.3), "b": jnp.full((3,), -0.1)}
    with jax.numpy_dtype_promotion("standard"):  # As optax itself needs.
        _, opt_state = tx.update(gradients, tx.init(params), params)
    state = TrainState(jnp.int32(7), params, opt_state)
    writer = checkpoints()
    writer.save(7, state)
    writer.close()
    like = TrainState(jnp.int32(0), params, tx.init(params))
    restored = checkpoints().restore(like).state
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    assert _bits(restored) == _bits(state)
    with jax.numpy_dtype_promotion("standard"):
        update = jax.jit(tx.update)
        expected = update(gradients, state.opt_state, params)
        assert _bits(update(gradients, restored.opt_state, params)) == _bits(expected)


def test_a_saved_state_may_be_donated_at_once(checkpoints):
    state = {"step": jnp.int32(0), "weight": jnp.ones((1024, 512))}
    advance = jax.jit(
        lambda s: {"step": s["step"] + 1, "weight": s["weight"] + 1.0},
        donate_argnums=0,
    )
    writer = checkpoints()
    for step in range(1, 6):
        state = advance(state)
        writer.save(step, state)
    jax.block_until_ready(advance(state))
    writer.close()
    restored = (
        checkpoints()
        .restore({"step": jnp.int32(0), "weight": jnp.zeros((1024, 512))})
        .state
    )
    assert int(restored["step"]) == 5
    np.testing.assert_array_equal(restored["weight"], np.full((1024, 512), 6.0))


def test_the_two_newest_are_kept_and_the_newest_restored(checkpoints):
    directory = _save(checkpoints, [2, 4, 6, 10])
    assert sorted(p.name for p in (directory / "states").iterdir()) == ["10", "6"]
    assert _bits(checkpoints().restore(_state()).state) == _bits(_state(10.0, 10))


def test_as_many_are_kept_as_is_asked(tmp_path):
    with closing(TrainCheckpoints(tmp_path, keep=3)) as checkpoints:
        for step in range(5):
            checkpoints.save(step, _state(float(step), step))
    assert sorted(p.name for p in (tmp_path / "states").iterdir()) == ["2", "3", "4"]


def test_json_data_is_saved_with_the_state(checkpoints):
    writer = checkpoints()
    extra = {"data": [{"next": 3, "seed": "a"}], "none": None}
    writer.save(2, _state(2.0, 2), extra)
    writer.save(4, _state(4.0, 4))
    writer.close()
    assert checkpoints().restore(_state()).extra is None
    _truncate(writer.directory, "4")
    assert checkpoints().restore(_state()).extra == extra


def test_another_configurations_checkpoint_is_refused(tmp_path):
    with closing(TrainCheckpoints(tmp_path, config_hash="abc")) as writer:
        writer.save(2, _state(2.0, 2))
    for other in ("", "def"):
        reader = TrainCheckpoints(tmp_path, config_hash=other)
        with closing(reader), pytest.raises(ValueError, match="another configuration"):
            reader.restore(_state())
    with closing(TrainCheckpoints(tmp_path, config_hash="abc")) as reader:
        assert _bits(reader.restore(_state()).state) == _bits(_state(2.0, 2))


def _largest(folder):
    return max(
        (path for path in folder.rglob("*") if path.is_file()),
        key=lambda path: path.stat().st_size,
    )


def _truncate(directory, step):
    path = _largest(directory / "states" / step)
    path.write_bytes(path.read_bytes()[:-1])


def _remove_data(directory, step):
    _largest(directory / "states" / step).unlink()


def _remove_metadata(directory, step):
    (directory / "states" / step / "_CHECKPOINT_METADATA").unlink()


def _remove_item(directory, step):
    shutil.rmtree(directory / "states" / step / "state")


def _remove_listing(directory, step):
    (directory / "states" / step / CHECKSUMS).unlink()


def _truncate_listing(directory, step):
    path = directory / "states" / step / CHECKSUMS
    path.write_text(path.read_text()[:-5])


def _list_nothing(directory, step):
    (directory / "states" / step / CHECKSUMS).write_text("{}")


def _list_a_file_elsewhere(directory, step):
    path = directory / "states" / step / CHECKSUMS
    listed = json.loads(path.read_text()) | {"../../../outside": [0, 0]}
    (directory.parent / "outside").touch()
    path.write_text(json.dumps(listed))


def _flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def _flip_a_bit(directory, step):
    _flip(_largest(directory / "states" / step))


def _flip_a_bit_of_the_record(directory, step):
    _flip(_largest(directory / "states" / step / "record"))


DAMAGES = [
    _truncate,
    _remove_data,
    _remove_metadata,
    _remove_item,
    _remove_listing,
    _truncate_listing,
    _list_nothing,
    _list_a_file_elsewhere,
    _flip_a_bit,
    _flip_a_bit_of_the_record,
]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda f: f.__name__.strip("_"))
def test_a_damaged_checkpoint_is_passed_over_and_then_replaced(checkpoints, damage):
    directory = _save(checkpoints, [2, 4])
    damage(directory, "4")
    reader = checkpoints()
    assert _bits(reader.restore(_state()).state) == _bits(_state(2.0, 2))
    assert reader.skipped == [4]
    assert _bits(reader.restore(_state()).state) == _bits(_state(2.0, 2))
    assert reader.skipped == [4]
    # The run goes on, and reaches the damaged step again.
    reader.save(4, _state(0.25, 4))
    reader.save(6, _state(6.0, 6))
    reader.close()
    after = checkpoints()
    assert _bits(after.restore(_state()).state) == _bits(_state(6.0, 6))
    assert after.skipped == []
    damage(directory, "6")
    last = checkpoints()
    assert _bits(last.restore(_state()).state) == _bits(_state(0.25, 4))
    assert last.skipped == [6]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda f: f.__name__.strip("_"))
def test_nothing_is_restored_where_every_checkpoint_is_damaged(checkpoints, damage):
    directory = _save(checkpoints, [2, 4])
    damage(directory, "2")
    damage(directory, "4")
    reader = checkpoints()
    assert reader.restore(_state()) is None
    assert reader.skipped == [4, 2]
    reader.save(2, _state(0.5, 2))
    reader.close()
    assert _bits(checkpoints().restore(_state()).state) == _bits(_state(0.5, 2))


def test_saving_before_a_step_that_is_there_is_refused(checkpoints):
    directory = _save(checkpoints, [2, 4])
    writer = checkpoints()
    with pytest.raises(ValueError, match=r"step 3: .* has step 4"):
        writer.save(3, _state())
    with pytest.raises(ValueError, match=r"step 4: .* has step 4"):
        writer.save(4, _state())
    writer.close()
    assert _bits(checkpoints().restore(_state()).state) == _bits(_state(4.0, 4))
    assert json.loads((directory / "states" / "4" / CHECKSUMS).read_text())


def _replace(**fields):
    return {name: v for name, v in (_state() | fields).items() if v is not None}


@pytest.mark.parametrize(
    ("like", "message"),
    [
        (_replace(float32=jnp.zeros((4, 3))), r"float32: expected \(\(4, 3\), .*found"),
        (
            _replace(bfloat16=jnp.zeros((5,))),
            r"bfloat16: expected \(\(5,\), 'float32'\), found \(\(5,\), 'bfloat16'\)",
        ),
        (_replace(bool=None), r"bool: expected None, found \(\(7, 2\), 'bool'\)"),
        (_replace(new=jnp.zeros(3)), r"new: expected \(\(3,\), .*\), found None"),
        (
            _replace(bool=None, mask={"bool": jnp.zeros((7, 2), bool)}),
            r"(?s)bool: expected None.*mask\.bool: expected",
        ),
    ],
    ids=["shape", "dtype", "too few", "too many", "moved"],
)
def test_another_runs_state_is_refused_by_name(checkpoints, like, message):
    _save(checkpoints, [2])
    reader = checkpoints()
    with pytest.raises(ValueError, match=message) as error:
        reader.restore(like)
    assert "uint8" not in str(error.value)
    assert "another run" in str(error.value)


def test_another_optimizer_is_refused_by_name(checkpoints):
    params = {"a": jnp.ones((2, 3))}
    writer = checkpoints()
    writer.save(1, TrainState(jnp.int32(1), params, optax.adam(1e-3).init(params)))
    writer.close()
    like = TrainState(jnp.int32(0), params, optax.sgd(0.1, momentum=0.9).init(params))
    with pytest.raises(ValueError, match=r"(?s)opt_state.*nu\.a.*opt_state.*trace\.a"):
        checkpoints().restore(like)


def test_sharded_arrays_come_back_with_their_shardings(checkpoints):
    mesh = jax.make_mesh((4, 2), ("fsdp", "tensor"), (AxisType.Auto, AxisType.Auto))
    specs = {
        "both": PartitionSpec("fsdp", "tensor"),
        "rows": PartitionSpec(("fsdp", "tensor")),
        "replicated": PartitionSpec(),
    }
    shardings = {name: NamedSharding(mesh, spec) for name, spec in specs.items()}
    values = {
        "both": jax.random.normal(jax.random.key(0), (8, 6)),
        "rows": jnp.arange(16, dtype=jnp.int32),
        "replicated": jnp.ones((3,), jnp.bfloat16),
    }
    state = jax.device_put(values, shardings)
    writer = checkpoints()
    writer.save(1, state)
    writer.close()
    like = jax.tree.map(lambda x, s: jax.device_put(x * 0, s), values, shardings)
    restored = checkpoints().restore(like).state
    assert _bits(restored) == _bits(state)
    for name, sharding in shardings.items():
        assert restored[name].sharding == sharding, name
        assert len(restored[name].sharding.device_set) == 8
    # Onto another layout: what `like` asks for is what comes back.
    other = jax.make_mesh((2, 4), ("fsdp", "tensor"), (AxisType.Auto, AxisType.Auto))
    moved = {name: NamedSharding(other, spec) for name, spec in specs.items()}
    moved["both"] = NamedSharding(other, PartitionSpec("fsdp"))
    abstract = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), values, moved
    )
    onto = checkpoints().restore(abstract).state
    assert _bits(onto) == _bits(state)
    assert all(onto[name].sharding == sharding for name, sharding in moved.items())
    single = jax.device_put(values, jax.devices()[3])
    elsewhere = checkpoints().restore(single).state
    assert _bits(elsewhere) == _bits(state)
    assert elsewhere["both"].sharding == single["both"].sharding


FULL_DISK = textwrap.dedent(
    """
    import errno, os, resource, sys
    from pathlib import Path

    import jax, jax.numpy as jnp

    from geomjax.checkpoints.train_state import TrainCheckpoints

    # As on a full disk, no file can be written beyond this size.
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    checkpoints = TrainCheckpoints(Path(sys.argv[1]))
    noise = jax.random.normal(jax.random.key(0), (256, 1024))
    checkpoints.save(1, {"step": jnp.int32(1), "weight": noise})
    checkpoints.wait()
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))
    where = None
    try:
        where = "save"
        checkpoints.save(2, {"step": jnp.int32(2), "weight": noise + 1.0})
        where = "wait"
        checkpoints.wait()
    except OSError as error:
        assert error.errno == errno.EFBIG, error
        assert "File too large" in str(error), error
        assert sys.argv[1] in str(error), error
    else:
        raise SystemExit("no error")
    checkpoints.close()
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    like = {"step": jnp.int32(0), "weight": noise * 0}
    again = TrainCheckpoints(Path(sys.argv[1]))
    restored = again.restore(like).state
    assert int(restored["step"]) == 1 and again.skipped == []
    assert (restored["weight"] == noise).all()
    # With room again the run goes on from there.
    again.save(2, {"step": jnp.int32(2), "weight": noise + 1.0})
    again.close()
    last = TrainCheckpoints(Path(sys.argv[1]))
    assert int(last.restore(like).state["step"]) == 2
    last.close()
    print("done")
    """
)


def test_a_full_disk_is_an_os_error_and_the_last_checkpoint_survives(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(tmp_path / "checkpoints")],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "done\n"
