"""Checks of the settings that all experiments on rollouts have."""

import math
from collections.abc import Sequence

import ml_collections

COUNTS = (
    "num_steps",
    "evaluate_every",
    "save_every",
    "prompts_per_step",
    "samples_per_prompt",
    "mini_batches",
    "micro_batches",
    "max_prompt_tokens",
    "max_new_tokens",
    "evaluation_batch",
)
"""Settings that are whole numbers above 0."""


def find_problems(config: ml_collections.ConfigDict) -> list[str]:
    """What is out of range among the shared settings, a line each."""
    problems = [
        f"{name} is {config[name]!r}; expected a whole number above 0"
        for name in COUNTS
        if type(config[name]) is not int or config[name] < 1
    ]
    if not problems:
        problems += _splits(config)
    seeds = tuple(config.seeds)
    if not seeds or len(set(seeds)) < len(seeds):
        problems.append(f"seeds are {seeds}; expected at least one, each once")
    if config.overlong not in ("error", "drop"):
        problems.append(f"overlong is {config.overlong!r}; expected error or drop")
    if config.data.thinking not in ("default", "on", "off"):
        problems.append(
            f"data.thinking is {config.data.thinking!r}; expected default, on or off"
        )
    if not 0 < config.temperature < math.inf:
        problems.append(f"temperature is {config.temperature}; expected above 0")
    return problems


def refuse(problems: Sequence[str]) -> None:
    """Raises ValueError with every problem, where there are any."""
    if problems:
        raise ValueError("the configuration:\n  " + "\n  ".join(problems))


def _splits(config: ml_collections.ConfigDict) -> list[str]:
    parts = config.mini_batches * config.micro_batches
    rows = config.prompts_per_step * config.samples_per_prompt
    if config.prompts_per_step % config.mini_batches:
        return [
            f"{config.prompts_per_step} prompts_per_step cannot be split into "
            f"{config.mini_batches} mini_batches; the samples of a prompt belong to "
            "one update"
        ]
    if rows % parts:
        return [
            f"{rows} sequences a step (prompts_per_step x samples_per_prompt) cannot "
            f"be split into {parts} equal parts (mini_batches x micro_batches)"
        ]
    return []
