"""The pickles inside PyTorch checkpoints, read as data: nothing is imported or called.

A pickle is a program for a stack machine whose instructions may import and call any
function. This reader runs the few instructions that `torch.save` writes for weights;
where they ask for a call, it notes down what would have been called, as a `Call`. A
name outside PyTorch's own is refused.
"""

import io
import pickletools
import re
from collections.abc import Callable
from typing import Any, NamedTuple

from geomjax.checkpoints.errors import CheckpointError

# What weights may name: containers, storages, dtypes, the functions that rebuild
# tensors, and the classes that describe a shard. Even these are never looked up.
_ALLOWED = re.compile(
    r"collections\.OrderedDict"
    r"|torch\.(\w+Storage|storage\.\w+Storage|Size|device|Tensor|nn\.parameter\.\w+)"
    r"|torch\.(bfloat16|float\d\w*|u?int\d+|bits\w+|q\w+\d|complex\d+|bool)"
    r"|torch\._utils\._rebuild_\w+|torch\._tensor\._rebuild_from_type_v2"
    r"|torch\.serialization\._get_layout"
    r"|torch\.distributed\.(tensor|_tensor|device_mesh|_mesh_layout|_shard)\.[\w.]+"
)


class Global(NamedTuple):
    """A class or function that the pickle names: `module.name`, never imported."""

    name: str


class Storage(NamedTuple):
    """A tensor's storage, named by the pickle and lying outside it.

    Attributes:
        kind: the storage class, which gives the element type.
        key: the name of the file that holds its bytes.
        numel: its number of elements.
    """

    kind: str
    key: str
    numel: int


class Call:
    """A call that was noted down instead of made.

    Attributes:
        name: what would have been called, as `module.name`.
        args: its arguments.
        state: the attributes that would have been set on the result.
        items: the items that would have been put into the result, a mapping.
    """

    __slots__ = ("args", "items", "name", "state")

    def __init__(self, name: str, args: tuple[Any, ...]):
        self.name = name
        self.args = args
        self.state: Any = None
        self.items: dict[Any, Any] = {}


def attributes(state: Any) -> dict[Any, Any]:
    """The attributes that a pickled object's state sets, those of slots included.

    Args:
        state: a `Call`'s state, or that `Call`.

    Returns:
        Attribute name to value; empty for anything that sets none.
    """
    if isinstance(state, Call):
        state = state.state
    merged: dict[Any, Any] = {}
    for part in state if isinstance(state, tuple) else (state,):
        if isinstance(part, dict):
            merged.update(part)
    return merged


class _PickleError(Exception):
    """What stops the machine; turned into a `CheckpointError` with the file's name."""


def read_pickle(content: bytes, where: object) -> Any:
    """Reads a pickle as data.

    Args:
        content: the pickle.
        where: what errors call it.

    Returns:
        Its value: None, numbers, strings, tuples, lists and dicts as they are; `Global`
        and `Call` for what it would import and call; `Storage` for tensor storages.

    Raises:
        CheckpointError: the pickle is damaged, names something that weights have no use
            for, or uses an instruction that `torch.save` does not write for weights.
    """
    machine = _Machine(content)
    try:
        value = machine.run()
    except _PickleError as error:
        raise CheckpointError(where, [str(error)]) from None
    except (ValueError, IndexError, TypeError, OverflowError) as error:
        raise CheckpointError(where, [f"damaged pickle: {error}"]) from None
    if machine.refused:
        names = ", ".join(machine.refused)
        raise CheckpointError(
            where,
            [
                f"the pickle carries code: it would import {names}. Nothing was run. "
                "Weights need none of this; ask for safetensors files"
            ],
        )
    return value


class _Machine:
    """The stack machine of the pickle format, for the instructions of weights."""

    def __init__(self, content: bytes):
        self._stream = io.BytesIO(content)
        self._stack: list[Any] = []
        self._marks: list[list[Any]] = []
        self._memo: dict[int, Any] = {}
        self.refused: dict[str, None] = {}

    def run(self) -> Any:
        while True:
            code = self._stream.read(1)
            if not code:
                raise _PickleError("truncated pickle: it has no end")
            instruction = _INSTRUCTIONS.get(code)
            if instruction is None:
                raise _PickleError(
                    f"the pickle uses instruction {code!r} at byte "
                    f"{self._stream.tell() - 1}, which weights have no use for"
                )
            read_argument, action = instruction
            argument = None if read_argument is None else read_argument(self._stream)
            if code == b".":
                return self._pop()
            action(self, argument)

    def _pop(self) -> Any:
        if not self._stack:
            raise _PickleError("damaged pickle: it takes from an empty stack")
        return self._stack.pop()

    def _top(self) -> Any:
        if not self._stack:
            raise _PickleError("damaged pickle: it looks at an empty stack")
        return self._stack[-1]

    def _pop_mark(self) -> list[Any]:
        if not self._marks:
            raise _PickleError("damaged pickle: a mark is missing")
        items = self._stack
        self._stack = self._marks.pop()
        return items

    def push(self, value: Any) -> None:
        self._stack.append(value)

    def mark(self, _: None) -> None:
        self._marks.append(self._stack)
        self._stack = []

    def pop(self, _: None) -> None:
        self._pop()

    def nothing(self, _: Any) -> None:
        """Protocol and framing say nothing about the value."""

    def put(self, index: int) -> None:
        self._memo[index] = self._top()

    def memoize(self, _: None) -> None:
        self._memo[len(self._memo)] = self._top()

    def get(self, index: int) -> None:
        if index not in self._memo:
            raise _PickleError(f"damaged pickle: nothing was stored under {index}")
        self.push(self._memo[index])

    def tuple_of(self, count: int) -> None:
        items = [self._pop() for _ in range(count)]
        self.push(tuple(reversed(items)))

    def tuple_from_mark(self, _: None) -> None:
        items = self._pop_mark()
        self.push(tuple(items))

    def append(self, _: None) -> None:
        item = self._pop()
        self._extend([item])

    def appends(self, _: None) -> None:
        self._extend(self._pop_mark())

    def _extend(self, items: list[Any]) -> None:
        target = self._top()
        if not isinstance(target, list):
            raise _PickleError("damaged pickle: it appends to something not a list")
        target.extend(items)

    def set_item(self, _: None) -> None:
        value, key = self._pop(), self._pop()
        self._update([key, value])

    def set_items(self, _: None) -> None:
        self._update(self._pop_mark())

    def _update(self, items: list[Any]) -> None:
        target = self._top()
        table = target.items if isinstance(target, Call) else target
        if not isinstance(table, dict) or len(items) % 2:
            raise _PickleError("damaged pickle: it sets items of something not a dict")
        for key, value in zip(items[::2], items[1::2], strict=True):
            # Nothing deeper, whose hash could take for ever.
            if not isinstance(key, (str, int, float, bytes, type(None))):
                raise _PickleError(
                    f"a dict has a key of type {type(key).__name__}; expected names"
                )
            if key in table:
                raise _PickleError(f"{key!r}: named twice")
            table[key] = value

    def name_global(self, _: None) -> None:
        # Read here: the reader of pickletools would resolve escapes, as no pickle does.
        lines = [self._stream.readline() for _ in range(2)]
        if not all(line.endswith(b"\n") for line in lines):
            raise _PickleError("truncated pickle: a name has no end")
        self._push_global(".".join(line[:-1].decode() for line in lines))

    def name_stacked_global(self, _: None) -> None:
        name, module = self._pop(), self._pop()
        if not isinstance(name, str) or not isinstance(module, str):
            raise _PickleError("damaged pickle: a global's name is not a string")
        self._push_global(f"{module}.{name}")

    def _push_global(self, name: str) -> None:
        if not _ALLOWED.fullmatch(name):
            self.refused[repr(name)] = None
        self.push(Global(name))

    def call(self, _: None) -> None:
        args, function = self._pop(), self._pop()
        if not isinstance(function, Global) or not isinstance(args, tuple):
            raise _PickleError("damaged pickle: it calls something not a function")
        self.push(Call(function.name, args))

    def build(self, _: None) -> None:
        state = self._pop()
        target = self._top()
        if not isinstance(target, Call):
            raise _PickleError("damaged pickle: it gives attributes to a plain value")
        target.state = state

    def persistent(self, _: None) -> None:
        match self._pop():
            case ("storage", Global(kind), str(key), str(), int(numel), *_):
                self.push(Storage(kind, key, numel))
            case _:
                raise _PickleError(
                    "the pickle refers to something outside it that is not a storage"
                )


def _instructions() -> dict[bytes, tuple[Callable[[Any], Any] | None, Any]]:
    """The instructions that are run: opcode to the reader of its argument and action.

    Protocol 2 is what `torch.save` writes; the rest is its counterpart in protocol 4.
    """
    constants = {
        "NONE": lambda: None,
        "NEWTRUE": lambda: True,
        "NEWFALSE": lambda: False,
        "EMPTY_TUPLE": tuple,
        "EMPTY_LIST": list,
        "EMPTY_DICT": dict,
    }
    actions: dict[str, Any] = {
        name: lambda machine, _, make=make: machine.push(make())
        for name, make in constants.items()
    }
    for name in (
        *("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT"),
        *("BINUNICODE", "SHORT_BINUNICODE", "SHORT_BINBYTES", "BINBYTES"),
    ):
        actions[name] = _Machine.push
    for count in (1, 2, 3):
        actions[f"TUPLE{count}"] = lambda machine, _, n=count: machine.tuple_of(n)
    actions |= {
        "PROTO": _Machine.nothing,
        "FRAME": _Machine.nothing,
        "STOP": _Machine.nothing,
        "MARK": _Machine.mark,
        "POP": _Machine.pop,
        "BINPUT": _Machine.put,
        "LONG_BINPUT": _Machine.put,
        "MEMOIZE": _Machine.memoize,
        "BINGET": _Machine.get,
        "LONG_BINGET": _Machine.get,
        "TUPLE": _Machine.tuple_from_mark,
        "APPEND": _Machine.append,
        "APPENDS": _Machine.appends,
        "SETITEM": _Machine.set_item,
        "SETITEMS": _Machine.set_items,
        "GLOBAL": _Machine.name_global,
        "STACK_GLOBAL": _Machine.name_stacked_global,
        "REDUCE": _Machine.call,
        "NEWOBJ": _Machine.call,
        "BUILD": _Machine.build,
        "BINPERSID": _Machine.persistent,
    }
    table = {
        op.code.encode("latin-1"): (
            None if op.arg is None else op.arg.reader,
            actions[op.name],
        )
        for op in pickletools.opcodes
        if op.name in actions
    }
    return table | {b"c": (None, _Machine.name_global)}


_INSTRUCTIONS = _instructions()
