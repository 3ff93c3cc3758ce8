"""The collectives of a compiled program, read from its text.

`compiled.as_text()` is XLA's program for one device after partitioning. A loop's body
is written there once, however often it runs, and a collective that runs beside other
work is written several times, with one channel. Both are undone here.
"""

import math
import re
from collections import Counter
from typing import Any, NamedTuple

KINDS = (
    "all-gather",
    "all-reduce",
    "all-to-all",
    "collective-broadcast",
    "collective-permute",
    "ragged-all-to-all",
    "reduce-scatter",
)
"""The operations of XLA that move data between devices."""

_BITS = {"pred": 8, "s4": 4, "u4": 4, "bf16": 16, "c64": 64, "c128": 128}
_HEADER = re.compile(r"(ENTRY )?%(\S+) \(.*\) -> .*\{$")
_INSTRUCTION = re.compile(
    rf"(?:ROOT )?%(\S+) = (.*?) ({'|'.join(KINDS)})(-start)?\((.*)"
)
_WHILE = re.compile(r" while\(.*condition=%([^\s,]+), body=%([^\s,]+)")
_CALLS = re.compile(
    r"(?:calls|to_apply|called_computations|branch_computations"
    r"|true_computation|false_computation)=(\{[^}]*\}|%[^\s,]+)"
)
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_CONSTANT = re.compile(r"= [su]\d+\[\]\S* constant\((\d+)\)")
_COMPARED = re.compile(r" compare\(%([^\s,]+), %[^\s,]+\), direction=LT")
_ELEMENT = re.compile(r" get-tuple-element\(%[^\s,)]+\), index=(\d+)")
_ADDED = re.compile(r" add\(%([^\s,]+), %([^\s,)]+)\)")
_ARRAY = re.compile(r"([a-z]+\d*\w*)\[([\d,]*)\]")
_CHANNEL = re.compile(r"channel_id=(\d+)")
_OP_NAME = re.compile(r'op_name="([^"]*)"')
_MESH_GROUPS = re.compile(
    r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(.*?\)(?= \{))? \{([^}]*)\}"
)
_IOTA_GROUPS = re.compile(r"replica_groups=\[\d+,(\d+)\]<=")
_LISTED_GROUPS = re.compile(r"replica_groups=\{\{([\d,]*)\}")


class Collective(NamedTuple):
    """One array that a program moves between devices.

    A combined collective moves several arrays and is listed once for each.

    Attributes:
      kind: One of `KINDS`.
      dtype: As XLA spells it: f32, bf16, s32, pred.
      shape: Of the whole array on one device: the output of a gather, what a
        reduce-scatter sums, and otherwise what goes in, which is as large as what
        comes out.
      bytes: Its size.
      group_size: Devices that exchange it with each other.
      trip_count: How often it runs, the product over the loops around it. That of a
        loop whose end depends on data is the largest constant of its condition, so the
        most that it can be; None where no constant is found.
      loops: Names of the loops around it, outermost first.
      op_name: Scopes and primitive of the JAX program that it comes from.
    """

    kind: str
    dtype: str
    shape: tuple[int, ...]
    bytes: int
    group_size: int
    trip_count: int | None
    loops: tuple[str, ...]
    op_name: str

    @property
    def sent_bytes(self) -> float:
        """What one device sends each time, if the devices of a group form a ring.

        An all-reduce is a reduce-scatter and a gather: `2 b (g - 1) / g` of b bytes
        among g devices. The others but a permutation send `b (g - 1) / g`.
        """
        if self.kind in ("collective-permute", "collective-broadcast"):
            return float(self.bytes)
        passes = 2 if self.kind == "all-reduce" else 1
        return passes * self.bytes * (self.group_size - 1) / self.group_size


class _Place(NamedTuple):
    """How often a computation runs, and in which loops."""

    trip_count: int | None
    loops: tuple[str, ...]


def collectives(text: str) -> list[Collective]:
    """The collectives of a compiled program.

    Args:
      text: `jax.stages.Compiled.as_text()`, of any backend.

    Returns:
      One entry for each array moved, in the order of the text.

    Raises:
      ValueError: The text has no entry computation: it is no compiled program.
    """
    computations, entry = _computations(text)
    devices = _devices(text)
    places = _places(computations, entry)
    found: list[Collective] = []
    seen: set[Any] = set()
    for name, lines in computations.items():
        if name not in places:
            continue
        here: Counter[Any] = Counter()
        for line in lines:
            match = _INSTRUCTION.match(line)
            if match is None:
                continue
            read = _read(line, match, name, places[name], devices)
            channel = _CHANNEL.search(line)
            if channel is not None:
                # Those that a `shard_map` asks for may all have one channel; what is
                # written again is so in another computation.
                what = tuple((c.kind, c.dtype, c.shape, c.op_name) for c in read)
                same = channel[1], what
                here[same] += 1
                if (same, here[same]) in seen:
                    continue
                seen.add((same, here[same]))
            found += read
    return found


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    """The lines of each computation by its name, and the name of the entry."""
    computations: dict[str, list[str]] = {}
    entry, lines = None, []
    for raw in text.splitlines():
        header = None if raw.startswith(" ") else _HEADER.match(raw)
        if header is not None:
            lines = computations.setdefault(header[2], [])
            entry = header[2] if header[1] else entry
        elif raw.startswith(" "):
            lines.append(raw.strip())
    if entry is None:
        raise ValueError(
            "the text has no ENTRY computation; pass compiled.as_text(), not the text "
            "of a lowered program"
        )
    return computations, entry


def _places(computations: dict[str, list[str]], entry: str) -> dict[str, _Place]:
    """Where each computation that the entry reaches runs most often."""
    places: dict[str, _Place] = {}
    open_ = [(entry, _Place(1, ()))]
    while open_:
        name, place = open_.pop()
        known = places.get(name)
        if known is not None and (known.trip_count or 0) >= (place.trip_count or 0):
            continue
        places[name] = place
        for line in computations.get(name, ()):
            loop = _WHILE.search(line)
            if loop is not None:
                count = _trip_count(line, computations, loop[1], loop[2])
                inside = place.trip_count
                inside = None if inside is None or count is None else inside * count
                label = line.split(" = ")[0].removeprefix("ROOT ").removeprefix("%")
                there = _Place(inside, (*place.loops, label))
                open_ += [(loop[1], there), (loop[2], there)]
            for called in _CALLS.findall(line):
                names = called.strip("{}").replace("%", "").split(",")
                open_ += [(other.strip(), place) for other in names]
    return places


def _trip_count(
    line: str, computations: dict[str, list[str]], condition: str, body: str
) -> int | None:
    known = _TRIPS.search(line)
    if known is not None:
        return int(known[1])
    lines = list(computations.get(condition, ()))
    for called in _CALLS.findall("\n".join(lines)):
        lines += computations.get(called.strip("{}%"), ())
    constants = [int(value) for value in _CONSTANT.findall("\n".join(lines))]
    if not constants:
        return None
    step = _step(computations[condition], computations.get(body, []))
    return -(-max(constants) // step)


def _step(condition: list[str], body: list[str]) -> int:
    """What a loop adds to its counter each time: 2 where the compiler unrolled it."""
    compared = _COMPARED.search("\n".join(condition))
    tests, does = _definitions(condition), _definitions(body)
    counter = _ELEMENT.search(tests.get(compared[1], "")) if compared else None
    returned = next((line for line in body if line.startswith("ROOT ")), "")
    results = re.findall(r"%([^\s,)]+)", returned.partition(" tuple(")[2])
    if counter is None or int(counter[1]) >= len(results):
        return 1
    added = _ADDED.search(does.get(results[int(counter[1])], ""))
    if added is None:
        return 1
    for one, other in ((added[1], added[2]), (added[2], added[1])):
        start = _ELEMENT.search(does.get(one, ""))
        amount = _CONSTANT.search(does.get(other, ""))
        if start is not None and start[1] == counter[1] and amount is not None:
            return max(1, int(amount[1]))
    return 1


def _definitions(lines: list[str]) -> dict[str, str]:
    """The line of each value of a computation, by its name."""
    named = (line.removeprefix("ROOT ").partition(" = ") for line in lines)
    return {name.removeprefix("%"): f" = {value}" for name, _, value in named}


def _read(
    line: str, match: re.Match[str], computation: str, place: _Place, devices: int
) -> list[Collective]:
    """The arrays of one collective instruction."""
    result, kind, started = match[2], match[3], match[4]
    arrays = [(m[1], _shape(m[2])) for m in _ARRAY.finditer(result)]
    if started and kind in ("all-gather", "collective-permute", "all-to-all"):
        # A start returns what goes in, what comes out, and sometimes its flags.
        arrays = [array for array in arrays if array[0] != "u32" or array[1]]
        arrays = arrays[len(arrays) // 2 :]
    group = _group_size(line, devices)
    scatters = kind == "reduce-scatter"
    # The TPU compiler writes a reduce-scatter as a computation of this name.
    kind = "reduce-scatter" if computation.startswith("all-reduce-scatter") else kind
    op_name = _OP_NAME.search(line)
    out = []
    for dtype, shape in arrays:
        if scatters:
            axis = int(line.split("dimensions={")[1].split("}")[0])
            shape = (*shape[:axis], shape[axis] * group, *shape[axis + 1 :])
        out.append(
            Collective(
                kind=kind,
                dtype=dtype,
                shape=shape,
                bytes=math.prod(shape) * _bits(dtype) // 8,
                group_size=group,
                trip_count=place.trip_count,
                loops=place.loops,
                op_name="" if op_name is None else op_name[1],
            )
        )
    return out


def _shape(text: str) -> tuple[int, ...]:
    return tuple(int(size) for size in text.split(",") if size)


def _bits(dtype: str) -> int:
    """Bits of an element; XLA names most types by them: f32, s8, f8e4m3fn."""
    if dtype in _BITS:
        return _BITS[dtype]
    match = re.match(r"[a-z]+(\d+)", dtype)
    if match is None:
        raise ValueError(f"{dtype!r} is no element type of XLA")
    return int(match[1])


def _group_size(line: str, devices: int) -> int:
    """Devices of one group, in each of the forms in which XLA writes them."""
    groups = _MESH_GROUPS.search(line)
    if groups is not None:
        sizes = dict(re.findall(r"'([^']+)'=(\d+)", groups[1]))
        parts = re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", groups[2])
        return math.prod(int(part or sizes[axis]) for axis, part in parts)
    iota = _IOTA_GROUPS.search(line)
    if iota is not None:
        return int(iota[1])
    listed = _LISTED_GROUPS.search(line)
    return devices if listed is None else len(listed[1].split(","))


def _devices(text: str) -> int:
    partitions = re.search(r"num_partitions=(\d+)", text)
    return 1 if partitions is None else int(partitions[1])
