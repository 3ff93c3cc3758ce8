"""Where examples come from: files, named data sets, the hub; by one short text."""

from pathlib import Path
from typing import NamedTuple

from geomjax.data.adapters import ADAPTERS, Adapter, load_examples
from geomjax.data.prompts import Example, parse_prompt, read_prompts, summarize
from geomjax.data.rows import SUFFIXES, Row


class Columns(NamedTuple):
    """How a data set that is not a named one is read.

    Attributes:
      prompt: Column of the prompt: a text, or a list of `role` and `content`.
      answer: Column of the answer: a text or a whole number; "" for none.
      split: Split on the hub.
      config: Configuration on the hub, "" for its default.
    """

    prompt: str = "prompt"
    answer: str = "answer"
    split: str = "train"
    config: str = ""


DEFAULT_COLUMNS = Columns()


def read_source(
    source: str,
    *,
    columns: Columns = DEFAULT_COLUMNS,
    limit: int | None = None,
    require_answers: bool = False,
) -> list[Example]:
    """Reads the examples that a text names.

    Args:
      source: One of
        `PATH`: a JSONL, Parquet or Arrow file, or a folder of them;
        `NAME`: a named data set of `ADAPTERS`, such as `dapo-math-17k`, from the hub;
        `NAME=PATH`: the same in local files, in the schema that the hub has;
        `OWNER/NAME`: any other data set of the hub.
      columns: How the first and the last of these are read.
      limit: Reads that many rows and no more.
      require_answers: Whether an example without an answer is an error.

    Returns:
      One example a row, in their order.

    Raises:
      FileNotFoundError: It is none of these.
      ValueError: Rows or columns are not as expected, or the hub cannot be reached.
    """
    examples = _read(source, columns, limit, require_answers)
    bare = [f"line {each.line}" for each in examples if each.answer is None]
    if require_answers and bare:
        raise ValueError(
            f"prompts: {source}: {len(bare)} examples have no answer, which measuring "
            f"accuracy needs:\n{summarize(bare)}"
        )
    return examples


def _read(
    source: str, columns: Columns, limit: int | None, require_answers: bool
) -> list[Example]:
    name, marked, place = source.partition("=")
    if marked and name in ADAPTERS:
        return load_examples(ADAPTERS[name], place, limit=limit)
    if source in ADAPTERS:
        return load_examples(ADAPTERS[source], limit=limit)
    path = Path(source)
    if path.suffix == ".jsonl" and columns == DEFAULT_COLUMNS:
        return read_prompts(path, require_answers=require_answers, limit=limit)
    if path.exists():
        return load_examples(_adapter(source, columns), path, limit=limit)
    if source.count("/") == 1 and path.suffix not in SUFFIXES and source[0] not in "./":
        return load_examples(_adapter(source, columns), limit=limit)
    raise FileNotFoundError(
        f"prompts: {source!r} is no file or folder ({', '.join(SUFFIXES)}), no data "
        "set of the hub (OWNER/NAME) and no named one. For NAME or NAME=PATH: "
        f"{', '.join(ADAPTERS)}"
    )


def _adapter(source: str, columns: Columns) -> Adapter:
    def convert(row: Row):
        answer = row[columns.answer] if columns.answer else None
        if isinstance(answer, int) and not isinstance(answer, bool):
            answer = str(answer)
        if answer is not None and not isinstance(answer, str):
            raise ValueError(f"`{columns.answer}` is {answer!r:.80}, expected text")
        return parse_prompt(row[columns.prompt]), answer

    wanted = (columns.prompt, columns.answer)
    return Adapter(
        hub=source,
        split=columns.split,
        columns=tuple(column for column in wanted if column),
        convert=convert,
        task="mathematics",
        config=columns.config or None,
    )
