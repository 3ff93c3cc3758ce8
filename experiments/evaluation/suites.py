"""Suites by name: the named datasets, the tiny world's test split, files of one's own.

A suite is asked for as `NAME`, read from the hub or its cache, or as `NAME=PATH`, read
from a local file or folder in the schema of that dataset. `tiny-world` is the bundled
test split, and `prompts=FILE` a JSONL file of {prompt, answer}.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from experiments.common.world import TINY_WORLD
from geomjax.data.adapters import ADAPTERS, load_examples
from geomjax.data.prompts import Example, read_prompts
from geomjax.data.splits import split_examples

REWARDS = {
    "mathematics": "geomjax.rewards.mathematics:mathematics",
    "code": "geomjax.rewards.code:code",
}
"""The reward of each kind of answers that can be judged."""

EXACT = "geomjax.rewards.exact:exact"
TINY, OWN = "tiny-world", "prompts"


class Suite(NamedTuple):
    """Problems and what judges their answers.

    Attributes:
      name: Its name, fit for a file.
      examples: The problems, in their order.
      reward: Import path of the reward.
      source: The local file or folder that it was read from, None for the hub.
    """

    name: str
    examples: list[Example]
    reward: str
    source: Path | None


def read_suites(asked: str, *, reward: str = "", limit: int = 0) -> list[Suite]:
    """Reads the suites of a comma-separated list.

    Args:
      asked: Such as `aime24,math-500=FILE.jsonl,tiny-world`.
      reward: Import path of the reward of all of them; empty for each suite's own.
      limit: Read so many problems of each; 0 for all.

    Returns:
      The suites, in the order asked for.

    Raises:
      ValueError: An unknown suite, one that cannot be judged, one named twice, or data
        that is not as the dataset's is.
    """
    names = [part.strip() for part in asked.split(",") if part.strip()]
    bare = [name.partition("=")[0] for name in names]
    twice = sorted({name for name in bare if bare.count(name) > 1})
    if not names or twice:
        raise ValueError(
            f"--suite={asked}: expected suites, each once; twice: {twice or 'none'}"
        )
    suites = [_read(*name.partition("=")[::2], limit) for name in names]
    return [suite._replace(reward=reward or suite.reward) for suite in suites]


def _read(name: str, path: str, limit: int) -> Suite:
    source = Path(path) if path else None
    if name == TINY:
        source = source or TINY_WORLD
        examples = tiny_world_test(source)[: limit or None]
        return Suite(name, examples, EXACT, source / "prompts.jsonl")
    if name == OWN:
        if source is None:
            raise ValueError(f"suite {OWN}: name its file, {OWN}=FILE.jsonl")
        examples = read_prompts(source, require_answers=True, limit=limit or None)
        return Suite(name, examples, EXACT, source)
    if name not in ADAPTERS:
        known = ", ".join(n for n, a in ADAPTERS.items() if a.task in REWARDS)
        raise ValueError(
            f"unknown suite {name!r}; known: {known}, {TINY}, {OWN}=FILE. A local copy "
            "is given as NAME=PATH"
        )
    adapter = ADAPTERS[name]
    if adapter.task not in REWARDS:
        raise ValueError(f"suite {name}: its rows hold no answers to judge by")
    examples = load_examples(adapter, source, limit=limit or None)
    if not examples:
        raise ValueError(f"suite {name}: {source or adapter.hub} holds no problem")
    return Suite(name, examples, REWARDS[adapter.task], source)


def tiny_world_test(folder: Path) -> list[Example]:
    """The problems that the tiny world's checkpoints were not trained on."""
    config = json.loads((folder / "recipe.json").read_text())["config"]
    return split_examples(
        read_prompts(folder / "prompts.jsonl", require_answers=True),
        validation=config["num_validation"],
        test=config["num_test"],
    ).test


def problem_record(index: int, example: Example) -> Mapping[str, Any]:
    """A problem as the run's folder keeps it, its images by their hashes."""
    prompt = example.prompt
    if not isinstance(prompt, str):
        prompt = [message._asdict() for message in prompt]  # type: ignore[assignment]
    images = [image.digest for image in example.images]
    return {
        "problem": index,
        "line": example.line,
        "prompt": prompt,
        "answer": example.answer,
        **({"images": images} if images else {}),
    }
