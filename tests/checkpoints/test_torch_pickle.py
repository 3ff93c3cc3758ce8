"""Pickles are read as data: faithful on weights, and deaf to everything else."""

import os
import pickle
import pickletools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch_format import call, dump

from geomjax.checkpoints import CheckpointError
from geomjax.checkpoints.torch_pickle import Call, Global, Storage, read_pickle


def _plain(value):
    """Calls as tuples, so that values compare."""
    match value:
        case Call():
            return ("call", value.name, *map(_plain, (value.args, value.items)))
        case tuple() if type(value) is tuple:
            return tuple(map(_plain, value))
        case list():
            return list(map(_plain, value))
        case dict():
            return {key: _plain(item) for key, item in value.items()}
    return value


_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False)
    | st.text()
    | st.builds(Storage, st.just("torch.FloatStorage"), st.text(), st.integers(0, 9)),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=4).map(tuple)
        | st.dictionaries(st.text(), inner, max_size=4)
        | st.builds(
            lambda args, items: call("collections.OrderedDict", *args, items=items),
            st.lists(inner, max_size=2),
            st.dictionaries(st.text(), inner, max_size=2),
        )
    ),
    max_leaves=20,
)


@given(_VALUES)
def test_what_is_written_is_read(value):
    assert _plain(read_pickle(dump(value), "test")) == _plain(value)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_python_s_own_pickles_of_plain_data_are_read(protocol):
    value = {"a": [1, 2.5, None, True, (), ("x", -7, 2**40)], "b": {"c": b"raw"}}
    if protocol == 2:
        value["b"] = {"c": "text"}  # Protocol 2 writes bytes as a call of a codec.
    assert read_pickle(pickle.dumps(value, protocol), "test") == value


class _Shell:
    def __reduce__(self):
        return os.system, ("touch /tmp/geomjax_pickle_was_run",)


class _Evaluated:
    def __reduce__(self):
        return eval, ("__import__('os').abort()",)


class _Imported:
    def __reduce__(self):
        return __import__, ("antigravity",)


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize(
    ("payload", "name"),
    [
        (_Shell(), "posix.system"),
        (_Evaluated(), r"(builtins|__builtin__)\.eval"),
        (_Imported(), r"(builtins|__builtin__)\.__import__"),
        (os.path.join, "posixpath.join"),
    ],
)
def test_code_is_refused_by_name_and_not_run(monkeypatch, payload, name, protocol):
    def fail(*_):
        raise AssertionError("the pickle was run")

    content = pickle.dumps({"weight": payload}, protocol)
    monkeypatch.setattr(os, "system", fail)
    with pytest.raises(CheckpointError, match=f"carries code: .*'{name}'"):
        read_pickle(content, "evil.bin")


def test_all_refused_names_are_listed_at_once():
    value = [Global("posix.system"), Global("torch.load"), Global("torch.Size")]
    with pytest.raises(CheckpointError) as caught:
        read_pickle(dump(value), "evil.bin")
    assert "'posix.system', 'torch.load'. " in str(caught.value)


@pytest.mark.parametrize(
    "name",
    [
        "torch.load",
        "torch.hub.load",
        "torch.ops.load_library",
        "torch.utils.cpp_extension.load",
        "torch.distributed.rpc.api.remote",
        "torch.jit._script.script",
        "torch._utils.exec",
        "collections.OrderedDict.pop",
        "numpy.load",
    ],
)
def test_other_functions_of_the_same_packages_are_refused(name):
    with pytest.raises(CheckpointError, match="carries code"):
        read_pickle(dump(call(name)), "evil.bin")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "no end"),
        (b"\x80\x02", "no end"),
        (b".", "empty stack"),
        (b"t.", "a mark is missing"),
        (b"h\x05.", "nothing was stored under 5"),
        (b"NN\x85R.", "not a function"),
        (b"(i__builtin__\neval\n.", "instruction b'i'"),
        (b"\x82\x01.", "instruction b'\\x82'"),
        (b"NNb.", "attributes to a plain value"),
        (b"NNs.", "empty stack"),
        (b"NNNs.", "not a dict"),
        (b"N(Ne.", "not a list"),
        (b"}(Nu.", "not a dict"),
        (b"}))s.", "a key of type tuple"),
        (b"}(X\x01\x00\x00\x00aNX\x01\x00\x00\x00aNu.", "'a': named twice"),
        (b"X\xff\xff\xff\xffabc.", "damaged pickle"),
        (b"NQ.", "not a storage"),
        (b"NN\x93.", "not a string"),
        (b"cnot ascii \xff\nx\n.", "damaged pickle"),
    ],
)
def test_damaged_pickles_are_refused(content, message):
    with pytest.raises(CheckpointError, match="file.bin") as caught:
        read_pickle(content, "file.bin")
    assert message in str(caught.value)


def test_a_pickle_of_nested_doubling_is_read_in_little_time():
    # ((x, x), (x, x)) and so on: 2^200 leaves if anything walked or hashed it.
    content = b")" + b"q\x00h\x00\x86q\x00" * 200 + b"."
    read_pickle(content, "file.bin")
    key = b"}" + content[:-1] + b"Ns."
    with pytest.raises(CheckpointError, match="a key of type tuple"):
        read_pickle(key, "file.bin")


@settings(max_examples=500, deadline=None)
@given(st.binary(max_size=60))
def test_random_bytes_never_break_the_reader(content):
    try:
        read_pickle(content, "fuzz")
    except CheckpointError:
        pass


_OPCODES = [op.code.encode("latin-1") for op in pickletools.opcodes]


@settings(max_examples=500, deadline=None)
@given(st.lists(st.sampled_from(_OPCODES) | st.binary(max_size=2), max_size=30))
def test_random_programs_never_break_the_reader(parts):
    try:
        read_pickle(b"".join(parts) + b".", "fuzz")
    except CheckpointError:
        pass


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 10**6), st.integers(0, 255))
def test_mutated_pickles_never_break_the_reader(position, value):
    content = bytearray(
        dump(
            call(
                "collections.OrderedDict",
                items={
                    "w": call(
                        "torch._utils._rebuild_tensor_v2",
                        Storage("torch.FloatStorage", "0", 6),
                        0,
                        (2, 3),
                        (3, 1),
                    )
                },
            )
        )
    )
    content[position % len(content)] = value
    try:
        read_pickle(bytes(content), "fuzz")
    except CheckpointError:
        pass
