"""Strict parsing of the safetensors header.

A safetensors file is an unsigned little-endian 64-bit length N, N bytes of JSON, and
the data. The JSON maps each name to `{"dtype", "shape", "data_offsets": [begin, end]}`,
with offsets from the start of the data; together the tensors must cover the data
exactly once.
"""

import json
import math
from typing import Any, NamedTuple

import numpy as np

from geomjax.checkpoints.dtypes import BFLOAT16
from geomjax.checkpoints.errors import CheckpointError
from geomjax.checkpoints.mapped_file import MappedFile

MAX_HEADER_BYTES = 100_000_000
"""The format's own limit on the length of a header."""

FLOATING_DTYPES: dict[str, np.dtype] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": BFLOAT16,
}
"""Dtypes that are read, by the format's name for them."""

# Every dtype of the format, so that the layout of the tensors left out is checked too.
_BITS = {name: 8 * dtype.itemsize for name, dtype in FLOATING_DTYPES.items()} | {
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "F8_E5M2": 8,
    "F8_E4M3": 8,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "BOOL": 8,
    "U8": 8,
    "I8": 8,
    "U16": 16,
    "I16": 16,
    "U32": 32,
    "I32": 32,
    "U64": 64,
    "I64": 64,
    "C64": 64,
}
_FIELDS = {"dtype", "shape", "data_offsets"}
_MAX_DIMS = 32
_MAX_BYTES = 2**63 - 1


class Entry(NamedTuple):
    """Where one tensor lies in a file, in bytes from the start of the file."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def read_header(file: MappedFile) -> dict[str, Entry]:
    """The tensors of a safetensors file, checked to tile its data exactly.

    Args:
        file: the mapped file.

    Returns:
        Name to `Entry`, in the header's order.

    Raises:
        CheckpointError: every problem found in the header, with the tensors' names.
    """
    if file.size < 8:
        raise CheckpointError(
            file.path,
            [f"truncated: {file.size} bytes, but the header's length alone takes 8"],
        )
    length = int.from_bytes(file.bytes(0, 8), "little")
    if length > MAX_HEADER_BYTES:
        raise CheckpointError(
            file.path,
            [
                f"the header claims {length} bytes; the format allows "
                f"{MAX_HEADER_BYTES}. Is this a safetensors file?"
            ],
        )
    if length > file.size - 8:
        raise CheckpointError(
            file.path,
            [
                f"truncated: the header claims {length} bytes, but only "
                f"{file.size - 8} follow"
            ],
        )
    problems: list[str] = []
    table = _parse_json(file.bytes(8, length), problems)
    entries: dict[str, Entry] = {}
    for name, fields in table:
        if name == "__metadata__":
            problems += _metadata_problems(fields)
        elif name in entries:
            problems.append(f"{name!r}: named twice in the header")
        elif (entry := _parse_entry(name, fields, problems)) is not None:
            entries[name] = entry
    if not problems:
        problems += _tiling_problems(entries, file.size - 8 - length)
    if problems:
        raise CheckpointError(file.path, problems)
    start = 8 + length
    return {
        name: entry._replace(begin=start + entry.begin, end=start + entry.end)
        for name, entry in entries.items()
    }


def _parse_json(raw: bytes, problems: list[str]) -> list[tuple[str, Any]]:
    """The header's pairs, repeated names included."""
    if not raw.startswith(b"{"):
        problems.append("the header is not a JSON object")
        return []
    try:
        # Pairs instead of dicts, so that repeated names and fields can be seen.
        pairs = json.loads(raw.decode("utf-8"), object_pairs_hook=_Pairs)
    except (ValueError, RecursionError) as error:
        problems.append(f"the header is not valid JSON: {error}")
        return []
    return list(pairs)


class _Pairs(tuple):
    """A JSON object as its pairs; told from a JSON array, which is a list."""

    __slots__ = ()


def _metadata_problems(fields: Any) -> list[str]:
    if isinstance(fields, _Pairs) and all(isinstance(v, str) for _, v in fields):
        return []
    return ["'__metadata__': must map strings to strings"]


def _parse_entry(name: str, fields: Any, problems: list[str]) -> Entry | None:
    """One tensor's entry, or None after saying what is wrong with it."""
    if (
        not isinstance(fields, _Pairs)
        or len(fields) != 3
        or dict(fields).keys() != (_FIELDS)
    ):
        problems.append(f"{name!r}: must have dtype, shape and data_offsets, each once")
        return None
    values = dict(fields)
    dtype, shape, offsets = (
        values["dtype"],
        values["shape"],
        values["data_offsets"],
    )
    if not isinstance(dtype, str) or dtype not in _BITS:
        problems.append(f"{name!r}: unknown dtype {dtype!r}")
        return None
    if not _is_counts(shape) or len(shape) > _MAX_DIMS:
        problems.append(
            f"{name!r}: shape must be at most {_MAX_DIMS} non-negative integers"
        )
        return None
    if not _is_counts(offsets) or len(offsets) != 2:
        problems.append(f"{name!r}: data_offsets must be two non-negative integers")
        return None
    begin, end = offsets
    # Empty tensors too must have a shape that fits an address, or NumPy refuses it.
    if math.prod(max(dim, 1) for dim in shape) * 8 > _MAX_BYTES:
        problems.append(f"{name!r}: shape {shape} is too large")
        return None
    bits = math.prod(shape) * _BITS[dtype]
    if bits % 8 or end - begin != bits // 8:
        problems.append(
            f"{name!r}: {dtype} of shape {shape} takes {bits / 8:g} bytes, but its "
            f"offsets [{begin}, {end}] span {end - begin}"
        )
        return None
    return Entry(dtype, tuple(shape), begin, end)


def _is_counts(value: Any) -> bool:
    return isinstance(value, list) and all(
        type(item) is int and 0 <= item <= _MAX_BYTES for item in value
    )


def _tiling_problems(entries: dict[str, Entry], data_bytes: int) -> list[str]:
    """What keeps the tensors from covering the data exactly once."""
    problems = []
    position, previous = 0, "the header"
    for name, entry in sorted(entries.items(), key=lambda item: item[1][2:]):
        if entry.begin < position:
            problems.append(
                f"{name!r}: begins at byte {entry.begin} of the data and overlaps "
                f"{previous}, which ends at {position}"
            )
        elif entry.begin > position:
            problems.append(
                f"{name!r}: a hole of {entry.begin - position} bytes before it, "
                f"after {previous}"
            )
        if entry.end > data_bytes:
            problems.append(
                f"{name!r}: runs to byte {entry.end} of the data, but the file holds "
                f"{data_bytes} (truncated?)"
            )
        position, previous = max(position, entry.end), repr(name)
    if position < data_bytes:
        problems.append(f"{data_bytes - position} bytes after the last tensor")
    return problems
