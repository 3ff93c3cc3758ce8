"""Parts that several configurations share."""

from typing import Any


def data() -> dict[str, Any]:
    """How `prompts` is read, and what is put in front of each prompt."""
    return {
        # For what is not a named data set: its columns, and on the hub its split and
        # configuration. An empty answer_column: there are no answers.
        "prompt_column": "prompt",
        "answer_column": "answer",
        "split": "train",
        "hub_config": "",
        "limit": 0,  # Rows to read; 0 for all.
        # Whether plain text becomes a user's turn in the tokenizer's chat template. A
        # system prompt, or worked examples (a file or set as `prompts` is), do so too.
        "chat": False,
        "system": "",
        "shots": "",
        # on, off, or default: the template's own choice (`enable_thinking`).
        "thinking": "default",
        # Repeated prompts, and those that share 13 words in a row with a problem of
        # these sets (NAME or NAME=PATH), are always counted; here they are removed.
        "remove_duplicates": False,
        "evaluation_sets": (),
        "remove_overlap": False,
    }


def reward() -> dict[str, Any]:
    """What judges completions."""
    return {
        # exact, math, choice, code, layout, or package.module:function.
        "name": "exact",
        "workers": 2,
        "timeout_s": 10.0,
        "settings": {},  # Keyword arguments of the reward.
    }
