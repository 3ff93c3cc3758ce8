r"""Named datasets: where they are, which columns they have, how a row is read.

What is stated here was taken from public dataset cards and loaders, each named; "not
verified" marks what rests on memory or analogy. The prompt of a set whose own wording
is part of its data (DAPO, SFT sets) is left as it is; others get `BOXED`, the wording
that Qwen's models are evaluated with, or verl's for Geometry3K.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Literal, NamedTuple

from geomjax.data.code_adapters import (
    PROGRAM_WORDING,
    STARTER_WORDING,
    deepcoder_row,
    livecodebench_row,
)
from geomjax.data.image_store import ImageStore, StoredImage
from geomjax.data.images import check_image, image_bytes
from geomjax.data.prompts import Example, Message, check_marks, summarize
from geomjax.data.rows import Row, read_hub, read_local, require_columns

BOXED = r"Please reason step by step, and put your final answer within \boxed{}."
# verl, examples/data_preprocess/geo3k.py.
THINK_THEN_BOXED = (
    "You FIRST think about the reasoning process as an internal monologue and then "
    "provide the final answer. The reasoning process MUST BE enclosed within <think> "
    r"</think> tags. The final answer MUST BE put in \boxed{}."
)
# Part of DAPO's own prompts.
_DAPO_WORDING = (
    "Solve the following math problem step by step. The last line of your response "
    "should be of the form Answer: $Answer (without quotes) where $Answer is the "
    "answer to the problem.",
    'Remember to put your answer on its own line after "Answer:".',
)
# Not part of a problem: left out when prompts are compared (`find_overlap`).
WORDING = (BOXED, THINK_THEN_BOXED, *_DAPO_WORDING, PROGRAM_WORDING, STARTER_WORDING)

Prompt = str | tuple[Message, ...]
_ROLES = {"human": "user", "gpt": "assistant"}


class Adapter(NamedTuple):
    """A named dataset.

    Attributes:
        hub: its name on the Hugging Face hub.
        split: the split that is used.
        columns: those that are read; a dataset may have others.
        convert: a row to prompt and answer.
        task: which kind of reward its answers are for; `conversation` has responses to
            imitate instead.
        config: its configuration on the hub, if it has several.
        files: its files on the hub, if it can only be opened by naming them.
        image_column: the column of its images, a list.
    """

    hub: str
    split: str
    columns: tuple[str, ...]
    convert: Callable[[Row], tuple[Prompt, str]]
    task: Literal["mathematics", "code", "conversation"]
    config: str | None = None
    files: tuple[str, ...] = ()
    image_column: str | None = None


def load_examples(
    adapter: Adapter,
    source: str | Path | None = None,
    *,
    split: str | None = None,
    limit: int | None = None,
) -> list[Example]:
    """Reads a named dataset into examples.

    Args:
        adapter: one of `ADAPTERS`, or your own.
        source: a local file or folder in the dataset's schema; None for the hub.
        split: another split than the adapter's, on the hub.
        limit: read that many rows and no more.

    Returns:
        One example per row, in their order; `line` is the row's number in its file.

    Raises:
        ValueError: if columns are missing, or rows are not as the dataset's are; all
            are collected, with file and row.
    """
    if source is None:
        rows = read_hub(
            adapter.hub,
            config=adapter.config,
            split=split or adapter.split,
            files=adapter.files,
            limit=limit,
        )
    else:
        rows = read_local(source, limit=limit)
    images = () if adapter.image_column is None else (adapter.image_column,)
    require_columns(rows, (*adapter.columns, *images))
    examples: list[Example] = []
    problems: list[str] = []
    store = ImageStore()
    for place, row in rows.rows:
        try:
            prompt, answer = adapter.convert(row)
            folder = Path(place.file).parent if source is not None else None
            found = _images(row, adapter, folder, store)
            check_marks(prompt, len(found))
        except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
            problems.append(f"{place}: {_described(error)}")
            continue
        examples.append(Example(prompt, answer, place.line, found))
    problems = [*rows.problems, *problems]
    if problems:
        raise ValueError(f"data: {rows.source}:\n{summarize(problems)}")
    return examples


def _described(error: Exception) -> str:
    if isinstance(error, KeyError):
        return f"has no field {error}"
    return (
        str(error) if type(error) is ValueError else f"{type(error).__name__}: {error}"
    )


def _images(
    row: Row, adapter: Adapter, folder: Path | None, store: ImageStore
) -> tuple[StoredImage, ...]:
    if adapter.image_column is None:
        return ()
    value = row[adapter.image_column]
    values = value if isinstance(value, list) else [value]
    found = [image_bytes(each, folder) for each in values]
    for image in found:
        check_image(image)
    return tuple(map(store.keep, found))


def _text(row: Row, column: str) -> str:
    value = row[column]
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)  # Answers of contests are stored as either.
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"`{column}` is {value!r:.80}, expected text")
    return value


def _question(
    problem: str, answer: str, wording: str = BOXED, joint: str = "\n"
) -> Callable[[Row], tuple[Prompt, str]]:
    def convert(row: Row) -> tuple[Prompt, str]:
        return f"{_text(row, problem)}{joint}{wording}", _text(row, answer)

    return convert


def _verl(row: Row) -> tuple[Prompt, str]:
    return _messages(row["prompt"], "role", "content"), _text(
        row["reward_model"], "ground_truth"
    )


def _messages(value: list[Row], role: str, content: str) -> tuple[Message, ...]:
    if not value:
        raise ValueError("has no messages")
    return tuple(
        Message(_ROLES[m[role]] if m[role] in _ROLES else m[role], _text(m, content))
        for m in value
    )


def _conversation(column: str, role: str, content: str) -> Callable[[Row], tuple]:
    """All turns but the last are the prompt, the last is the answer."""

    def convert(row: Row) -> tuple[Prompt, str]:
        turns = _messages(row[column], role, content)
        if len(turns) < 2 or turns[-1].role != "assistant":
            raise ValueError("does not end with a reply of the assistant")
        system = row["system"] if "system" in row else None
        head = (Message("system", system),) if system else ()
        return (*head, *turns[:-1]), turns[-1].content

    return convert


_DEEPCODER = "agentica-org/DeepCoder-Preview-Dataset"

ADAPTERS = {
    # Card of the mirrors koajoel/DAPO-Math-17k-dedup and LuyiCui/DAPO-Math-17k: prompt
    # (list of role and content), reward_model (ground_truth, style), data_source,
    # ability, extra_info. The original repeats each problem about a hundred times
    # (1,791,700 rows): see `find_duplicates`.
    "dapo-math-17k": Adapter(
        "BytedTsinghua-SIA/DAPO-Math-17k",
        "train",
        ("prompt", "reward_model"),
        _verl,
        "mathematics",
    ),
    # Card of allenai/Dolci-Instruct-SFT-7B (id, messages, source); that the Think set
    # has `messages` of role and content too is said by users of it. P2 does not say
    # whether it took the 7B or the 32B variant.
    "dolci-think-sft": Adapter(
        "allenai/Dolci-Think-SFT-7B",
        "train",
        ("messages",),
        _conversation("messages", "role", "content"),
        "conversation",
    ),
    # Card of mlabonne/OpenThoughts-79k-filtered, a subset: source, system,
    # conversations (from, value).
    "openthoughts": Adapter(
        "open-thoughts/OpenThoughts-114k",
        "train",
        ("system", "conversations"),
        _conversation("conversations", "from", "value"),
        "conversation",
    ),
    # Card of DedeProGames/OpenThoughts3-20k, a subset: difficulty, source, domain,
    # conversations (from, value).
    "openthoughts3": Adapter(
        "open-thoughts/OpenThoughts3-1.2M",
        "train",
        ("conversations",),
        _conversation("conversations", "from", "value"),
        "conversation",
    ),
    # The hub's listing shows the folders codeforces, lcbv5, primeintellect and taco;
    # DeepCoder trained on the latter three.
    **{
        f"deepcoder-{config}": Adapter(
            _DEEPCODER, split, ("problem", "tests"), deepcoder_row, "code", config
        )
        for config, split in (
            ("lcbv5", "train"),
            ("primeintellect", "train"),
            ("taco", "train"),
            ("codeforces", "test"),
        )
    },
    # verl, examples/data_preprocess/geo3k.py: images, problem (with <image> marks),
    # answer; the wording follows the problem after a space. Splits train and test
    # there; validation (hub listing, not verified).
    "geometry3k": Adapter(
        "hiyouga/geometry3k",
        "train",
        ("problem", "answer"),
        _question("problem", "answer", THINK_THEN_BOXED, " "),
        "mathematics",
        image_column="images",
    ),
    "geo3k": Adapter(
        "hiyouga/geometry3k",
        "test",
        ("problem", "answer"),
        _question("problem", "answer", THINK_THEN_BOXED, " "),
        "mathematics",
        image_column="images",
    ),
    # 30 problems in the split train: Prime Intellect's environment aime2024, lighteval.
    "aime24": Adapter(
        "HuggingFaceH4/aime_2024",
        "train",
        ("problem", "answer"),
        _question("problem", "answer"),
        "mathematics",
    ),
    # id, problem, answer in the split test: several public loaders.
    "aime25": Adapter(
        "math-ai/aime25",
        "test",
        ("problem", "answer"),
        _question("problem", "answer"),
        "mathematics",
    ),
    # id, question, answer, url in the split test, 40 problems: several public loaders.
    "amc23": Adapter(
        "math-ai/amc23",
        "test",
        ("question", "answer"),
        _question("question", "answer"),
        "mathematics",
    ),
    # problem, solution, answer, subject, level, unique_id: several public loaders.
    "math-500": Adapter(
        "HuggingFaceH4/MATH-500",
        "test",
        ("problem", "answer"),
        _question("problem", "answer"),
        "mathematics",
    ),
    # question, answer in the split test, 272 problems: rllm and others. (One loader
    # reads problem and solution; that would be another version.)
    "minerva": Adapter(
        "math-ai/minervamath",
        "test",
        ("question", "answer"),
        _question("question", "answer"),
        "mathematics",
    ),
    # problem, answer in the split test, 100 problems: NeMo-Skills and others.
    "beyond-aime": Adapter(
        "ByteDance-Seed/BeyondAIME",
        "test",
        ("problem", "answer"),
        _question("problem", "answer"),
        "mathematics",
    ),
    # The hub has one file per release, and a loader of its own that joins the first
    # five for release_v5. Not verified: the names of the files.
    "livecodebench-v5": Adapter(
        "livecodebench/code_generation_lite",
        "test",
        (
            "question_content",
            "starter_code",
            "public_test_cases",
            "private_test_cases",
            "metadata",
        ),
        livecodebench_row,
        "code",
        files=("test.jsonl", *(f"test{i}.jsonl" for i in range(2, 6))),
    ),
}
