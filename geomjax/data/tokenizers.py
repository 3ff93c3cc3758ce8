"""Tokenizers of checkpoints: loading, comparing, sizes and stop tokens."""

import json
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast


def load_tokenizer(source: str | Path) -> PreTrainedTokenizerFast:
    """Loads a tokenizer from a checkpoint directory, or by its hub name.

    No code that comes with a checkpoint is ever executed. What splits a text is its
    tokenizer.json: transformers' classes for a family, which `AutoTokenizer` chooses by
    name, keep the vocabulary and bring their own way of splitting, so that other ids
    come out where a checkpoint's differs.

    Args:
        source: a directory, or a name such as `Qwen/Qwen3-1.7B`.

    Returns:
        A fast tokenizer (one of the `tokenizers` library).

    Raises:
        ValueError: if there is no such directory or name, if its files are damaged, or
            if the tokenizer would need code of its own.
    """
    directory = Path(source)
    if directory.is_dir():
        _check_files(directory)
    elif directory.exists() or _looks_like_path(source):
        raise ValueError(f"tokenizer: {source} is not a directory")
    try:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"tokenizer: {source} cannot be loaded; expected a directory with a "
            "tokenizer.json, or a name on a hub that can be reached. transformers "
            f"says: {error}"
        ) from error
    if _own_code(tokenizer.init_kwargs):
        raise ValueError(_own_code_message(source, tokenizer.init_kwargs))
    return tokenizer


def tokenizer_size(tokenizer: PreTrainedTokenizerFast) -> int:
    """One more than the largest token id.

    Checkpoints pad their embeddings beyond it (to 151,936 or 152,064 rows for one and
    the same Qwen vocabulary); losses and samplers use the first rows alone.
    """
    return max(tokenizer.get_vocab().values()) + 1


def stop_token_ids(
    tokenizer: PreTrainedTokenizerFast, directory: str | Path | None = None
) -> tuple[int, ...]:
    """The token ids that end a completion, in increasing order.

    Args:
        tokenizer: its end-of-sequence token is one of them.
        directory: a checkpoint directory, or None; those in its generation_config.json
            are the others, if it has one.

    Raises:
        ValueError: if there are none, or if the file is damaged or names an id that
            the tokenizer has not.
    """
    stops = set() if tokenizer.eos_token_id is None else {tokenizer.eos_token_id}
    path = None if directory is None else Path(directory) / "generation_config.json"
    if path is not None and path.is_file():
        listed = _read_object(path).get("eos_token_id")
        listed = listed if isinstance(listed, list) else [listed]
        size = tokenizer_size(tokenizer)
        for stop in listed:
            if stop is None:
                continue
            if not isinstance(stop, int) or not 0 <= stop < size:
                raise ValueError(
                    f"{path}: eos_token_id holds {stop!r}, expected ids from 0 to "
                    f"{size - 1}"
                )
            stops.add(stop)
    if not stops:
        raise ValueError(
            "stop tokens: the tokenizer has no eos_token, and no generation_config.json"
            " names one; set eos_token in tokenizer_config.json"
        )
    return tuple(sorted(stops))


def _looks_like_path(source: str | Path) -> bool:
    return isinstance(source, Path) or (
        source.startswith(("/", ".", "~")) or source.count("/") > 1
    )


def _check_files(directory: Path) -> None:
    for name in ("config.json", "tokenizer_config.json"):
        path = directory / name
        config = _read_object(path) if path.is_file() else {}
        if _own_code(config):
            raise ValueError(_own_code_message(path, config))
    path = directory / "tokenizer.json"
    if not path.is_file():
        # Beside a model's config.json transformers would make an empty tokenizer.
        raise ValueError(
            f"tokenizer: {directory} has no tokenizer.json; copy it from the model's "
            "origin, or convert with AutoTokenizer and save_pretrained"
        )
    missing = {"model", "added_tokens"} - set(_read_object(path))
    if missing:
        raise ValueError(f"{path}: has no {sorted(missing)}, not a tokenizer")


def _own_code(config: dict[str, Any]) -> Any:
    """The classes outside transformers that a config names for its tokenizer."""
    classes = config.get("auto_map")
    return classes.get("AutoTokenizer") if isinstance(classes, dict) else classes


def _own_code_message(source: str | Path, config: dict[str, Any]) -> str:
    return (
        f"{source}: auto_map names {_own_code(config)} as the tokenizer's class, code "
        "of the checkpoint's own, which is not executed here; use a checkpoint whose "
        "tokenizer.json is complete, with auto_map removed"
    )


def _read_object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: is not JSON, perhaps truncated: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: holds a {type(value).__name__}, expected an object")
    return value
