"""Prompts and answers from a JSONL file."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from geomjax.data.image_store import ImageStore, StoredImage
from geomjax.data.images import check_image, image_bytes
from geomjax.data.placeholders import IMAGE_MARK

MAX_PROBLEMS_SHOWN = 10
THINKING_START = "<think>"
"""Opens a train of thought; some chat templates end the prompt with it."""


class Message(NamedTuple):
    """One turn of a conversation."""

    role: str
    content: str


class Example(NamedTuple):
    """A prompt, as plain text or as a conversation, and where it was read.

    `images` are those that the prompt refers to, in their order. `thinking` says
    whether the prompt, as it was encoded, ends by opening a train of thought
    (`THINKING_START`), so that the completion begins inside it.
    """

    prompt: str | tuple[Message, ...]
    answer: str | None
    line: int
    images: tuple[StoredImage, ...] = ()
    thinking: bool = False


def read_prompts(
    path: str | Path, *, require_answers: bool = False, limit: int | None = None
) -> list[Example]:
    """Reads prompts from a file with one JSON object a line (JSONL, UTF-8).

    An object has `prompt`, a string or a list of `{"role": ..., "content": ...}`
    messages, and optionally `answer`, a string, and `images`, a list of paths within
    the file's folder, one for each mark `<image>` of the prompt. Other fields are
    ignored, and so are blank lines. All problems are collected and raised at once.

    Args:
        path: the file.
        require_answers: whether a prompt without an answer is a problem.
        limit: read that many prompts and no more, nor their images.

    Returns:
        One example per line, in the order of the file, duplicates included
        (`geomjax.data.overlap.find_duplicates` finds them).

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file holds no prompt, or any line is not as above; the
            message names the file and the first lines in question.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"prompts: no file {path}; expected a JSONL file, each line an object "
            'such as {"prompt": "1+1=", "answer": "2"}'
        )
    examples: list[Example] = []
    problems: list[str] = []
    store = ImageStore()
    with path.open("rb") as file:
        # Lines are split as bytes: str.splitlines also splits at separators such as
        # U+2028, which JSON allows inside a string.
        for line, raw in enumerate(file, start=1):
            if line == 1:
                raw = raw.removeprefix(b"\xef\xbb\xbf")
            if not raw.strip():
                continue
            if len(examples) + len(problems) == limit:
                break
            try:
                examples.append(
                    _parse_line(raw, line, require_answers, path.parent, store)
                )
            except ValueError as error:
                problems.append(f"line {line}: {error}")
    if problems:
        raise ValueError(f"prompts: {path}:\n{summarize(problems)}")
    if not examples:
        raise ValueError(f"prompts: {path} holds no prompt; expected at least one line")
    return examples


def summarize(problems: Sequence[str]) -> str:
    """Joins the first problems, one a line, and says how many more there are."""
    shown = [f"  {problem}" for problem in problems[:MAX_PROBLEMS_SHOWN]]
    if len(problems) > MAX_PROBLEMS_SHOWN:
        shown.append(f"  and {len(problems) - MAX_PROBLEMS_SHOWN} more")
    return "\n".join(shown)


def _parse_line(
    raw: bytes, line: int, require_answer: bool, folder: Path, store: ImageStore
) -> Example:
    try:
        record = json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(
            f"is not UTF-8 (byte {error.start}: {raw[error.start]:#04x}); "
            "save the file as UTF-8"
        ) from error
    except json.JSONDecodeError as error:
        raise ValueError(f"is not JSON ({error.msg}, column {error.colno})") from error
    except RecursionError as error:
        raise ValueError("is not usable JSON (nested too deeply)") from error
    if not isinstance(record, dict):
        raise ValueError(f"is {_describe(record)}, expected an object with `prompt`")
    if "prompt" not in record:
        raise ValueError(f"has no `prompt`, only the fields {sorted(record)}")
    answer = record.get("answer")
    if answer is None and require_answer:
        raise ValueError("has no `answer`, which measuring accuracy needs")
    if answer is not None:
        _check_text("answer", answer)
    prompt = parse_prompt(record["prompt"])
    images = _images(record.get("images"), prompt, folder, store)
    return Example(prompt, answer, line, images)


def _images(
    paths: Any, prompt: str | tuple[Message, ...], folder: Path, store: ImageStore
) -> tuple[StoredImage, ...]:
    """The images of a prompt, checked."""
    if paths is None:
        return ()
    if not isinstance(paths, list):
        raise ValueError(f"`images` is {_describe(paths)}, expected a list of paths")
    found = []
    for path in paths:
        _check_text("images", path)
        found.append(image_bytes(path, folder))
        check_image(found[-1])
    check_marks(prompt, len(found))
    return tuple(map(store.keep, found))


def check_marks(prompt: str | tuple[Message, ...], images: int) -> None:
    """Raises ValueError unless a prompt has a mark `<image>` for each of its images."""
    text = prompt if isinstance(prompt, str) else "".join(m.content for m in prompt)
    marks = text.count(IMAGE_MARK)
    if images and marks != images:
        raise ValueError(f"has {images} images and {marks} {IMAGE_MARK} marks")


def parse_prompt(prompt: Any) -> str | tuple[Message, ...]:
    """A prompt as it stands in a row: a text, or a list of `role` and `content`.

    Raises:
        ValueError: if it is anything else, or empty.
    """
    if isinstance(prompt, list):
        if not prompt:
            raise ValueError("`prompt` is an empty list, expected messages")
        return tuple(_parse_message(i, message) for i, message in enumerate(prompt))
    _check_text("prompt", prompt)
    if not prompt:
        raise ValueError("`prompt` is empty")
    return prompt


def _parse_message(i: int, message: Any) -> Message:
    # A field that is not known here (a tool call, an image) would be lost in silence.
    if not isinstance(message, dict) or set(message) != {"role", "content"}:
        raise ValueError(
            f"`prompt[{i}]` is {_describe(message)}, expected an object with the "
            "fields `role` and `content` alone"
        )
    _check_text(f"prompt[{i}].role", message["role"])
    _check_text(f"prompt[{i}].content", message["content"])
    return Message(message["role"], message["content"])


def _check_text(field: str, value: Any) -> None:
    if not isinstance(value, str):
        raise ValueError(f"`{field}` is {_describe(value)}, expected a string")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"`{field}` holds an unpaired surrogate (character {error.start}), which "
            "is not text"
        ) from error


def _describe(value: Any) -> str:
    """The JSON type of a value, with its fields if it is an object."""
    if isinstance(value, dict):
        return f"an object with the fields {sorted(value)}"
    names = {
        str: "a string",
        list: "a list",
        bool: "a boolean",
        int: "a number",
        float: "a number",
    }
    return names[type(value)] if value is not None else "null"
