"""Rows of a dataset: from local JSONL, Parquet or Arrow files, or from the hub."""

import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from geomjax.data.prompts import summarize

Row = dict[str, Any]
SUFFIXES = (".jsonl", ".parquet", ".arrow")


class Place(NamedTuple):
    """Where a row was read: a file or a dataset, and the row's number from 1."""

    file: str
    line: int

    def __str__(self) -> str:
        return f"{self.file}, row {self.line}"


_BATCH = 16
"""Rows of a table that are Python objects at a time."""


class Rows(NamedTuple):
    """The rows of a dataset in their order, each with its place.

    They are read as they are taken: a few, or a row group of Parquet. Columns that
    hold images are given as stored, undecoded. Rows that are damaged, or whose fields
    are not those of the first, are passed over and described in `problems`, which is
    whole when the last row has been taken.
    """

    source: str
    columns: tuple[str, ...]
    rows: Iterator[tuple[Place, Row]]
    problems: list[str]


def read_local(path: str | Path, *, limit: int | None = None) -> Rows:
    """Reads a file, or all files of a folder in the order of their names.

    Args:
        path: a `.jsonl`, `.parquet` or `.arrow` file, or a folder with such files at
            any depth.
        limit: read that many rows and no more.

    Returns:
        The rows; in JSONL, blank lines are passed over and count as lines.

    Raises:
        FileNotFoundError: if there is no such file, or the folder holds none.
        ValueError: if there is no row; the message says what is wrong with each.
    """
    path = Path(path)
    files = sorted(p for p in path.rglob("*") if p.suffix in SUFFIXES)
    files = [path] if path.is_file() else files
    if not files or files[0].suffix not in SUFFIXES:
        raise FileNotFoundError(
            f"data: {path} is no {', '.join(SUFFIXES)} file and no folder that holds "
            "one"
        )
    problems: list[str] = []

    def each() -> Iterator[tuple[Place, Row]]:
        for file in files:
            read = _read_jsonl if file.suffix == ".jsonl" else _read_table
            yield from read(file, problems)

    return _checked(str(path), itertools.islice(each(), limit), problems)


def read_hub(
    name: str,
    *,
    config: str | None = None,
    split: str,
    files: Sequence[str] = (),
    limit: int | None = None,
) -> Rows:
    """Reads a dataset of the Hugging Face hub, or of its cache.

    No code that comes with a dataset is executed.

    Args:
        name: such as `HuggingFaceH4/MATH-500`.
        config: one of the dataset's configurations, if it has several.
        split: one of its splits.
        files: JSONL files of its repository to read, for a dataset that can only be
            opened by code of its own; `config` is then not used.
        limit: read that many rows and no more.

    Raises:
        ImportError: if the package `datasets` is missing.
        ValueError: if the dataset cannot be had, saying how to use local files.
    """
    try:
        import datasets
        from datasets.exceptions import DatasetsError
    except ImportError as error:
        raise ImportError(
            f"data: {name} needs the package datasets; install it with "
            "`pip install 'geomjax[data]'`, or give a local file"
        ) from error
    cut = split if limit is None else f"{split}[:{limit}]"
    try:
        if files:
            urls = [f"hf://datasets/{name}/{file}" for file in files]
            cut = cut.replace(split, "train", 1)  # The name that plain files get.
            data = datasets.load_dataset("json", data_files=urls, split=cut)
        else:
            data = datasets.load_dataset(name, config, split=cut)
    # ConnectionError and FileNotFoundError are OSErrors; a split that does not exist
    # is a ValueError.
    except (OSError, ValueError, DatasetsError) as error:
        raise ValueError(
            f"data: {name} (config {config}, split {split}) cannot be read from the "
            f"hub or its cache: {type(error).__name__}: {error}\nWhere the hub cannot "
            f"be reached, fetch it elsewhere (`hf download --repo-type dataset {name}`)"
            f" and give the path of the files ({', '.join(SUFFIXES)}) or their folder "
            "as the source"
        ) from error
    # As Arrow, so that images come as bytes and are not decoded unasked. The library
    # maps its files into memory, and a batch is a view of them.
    batches = data.with_format("arrow").iter(batch_size=_BATCH)
    return _checked(name, _placed(f"{name}[{split}]", batches), [])


def require_columns(rows: Rows, columns: Sequence[str]) -> None:
    """Raises ValueError, naming the columns found, unless all of these are there."""
    missing = [column for column in columns if column not in rows.columns]
    if missing:
        raise ValueError(
            f"data: {rows.source} has no column {', '.join(missing)}; it has "
            f"{', '.join(rows.columns)}; expected {', '.join(columns)}"
        )


def _checked(
    source: str, rows: Iterator[tuple[Place, Row]], problems: list[str]
) -> Rows:
    first = next(rows, None)
    if first is None:
        problems = problems or ["holds no row; expected at least one"]
        raise ValueError(f"data: {source}:\n{summarize(problems)}")
    columns = tuple(first[1])

    def each() -> Iterator[tuple[Place, Row]]:
        for place, row in itertools.chain([first], rows):
            if set(row) == set(columns):
                yield place, row
            else:
                problems.append(
                    f"{place} has the fields {sorted(row)}, the first row "
                    f"{sorted(columns)}"
                )

    return Rows(source, columns, each(), problems)


def _placed(name: str, tables: Iterable[Any]) -> Iterator[tuple[Place, Row]]:
    """The rows of tables or record batches that follow each other, some at a time."""
    line = 0
    for table in tables:
        for start in range(0, len(table), _BATCH):
            for row in table.slice(start, _BATCH).to_pylist():
                line += 1
                yield Place(name, line), row


def _read_jsonl(path: Path, problems: list[str]) -> Iterator[tuple[Place, Row]]:
    with path.open("rb") as file:
        for line, raw in enumerate(file, start=1):
            raw = raw.removeprefix(b"\xef\xbb\xbf") if line == 1 else raw
            if not raw.strip():
                continue
            place = Place(str(path), line)
            try:
                row = json.loads(raw.decode("utf-8"))
            except (ValueError, RecursionError) as error:
                problems.append(f"{place} is not JSON in UTF-8: {error}")
                continue
            if not isinstance(row, dict):
                problems.append(
                    f"{place} is a {type(row).__name__}, expected an object"
                )
                continue
            yield place, row


def _read_table(path: Path, problems: list[str]) -> Iterator[tuple[Place, Row]]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise ImportError(
            f"data: {path} needs the package pyarrow; install it with "
            "`pip install 'geomjax[data]'`, or convert the file to JSONL"
        ) from error
    try:
        if path.suffix == ".parquet":
            with pq.ParquetFile(path) as file:
                yield from _placed(str(path), _read_parquet(pa, file))
        else:
            with pa.memory_map(str(path)) as file:
                yield from _placed(str(path), _read_arrow(pa, file))
    except (pa.ArrowException, OSError) as error:
        problems.append(f"{path} cannot be read: {error}")


def _read_parquet(pa: Any, file: Any) -> Iterator[Any]:
    """Batches, group by group: over all at once the reader keeps what it has read."""
    for group in range(file.num_row_groups):
        yield from file.iter_batches(_BATCH, row_groups=[group], use_threads=False)
        pa.default_memory_pool().release_unused()


def _read_arrow(pa: Any, file: Any) -> Iterator[Any]:
    """Batches of either form of Arrow file: `datasets` writes the stream form."""
    try:
        reader = pa.ipc.open_file(file)
    except pa.ArrowInvalid:
        file.seek(0)
        yield from pa.ipc.open_stream(file)
        return
    for index in range(reader.num_record_batches):
        yield reader.get_batch(index)
