"""Judged completions of a suite as JSON lines, in blocks that are redone or whole.

A block is a fixed set of problems with all their samples. It runs from its beginning
to its end in the same programs on the same shapes, and is then appended to the file, so
that a run that was killed resumes at a block's beginning and ends with the same bytes.
"""

import json
import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from transformers import PreTrainedTokenizerFast

from experiments.common.workdir import WorkdirError
from experiments.evaluation.suites import problem_record
from geomjax.data.answers import Completion, decode_completions
from geomjax.data.prompts import Example
from geomjax.evaluation.summary import Sample
from geomjax.rewards.contract import Judgement
from geomjax.rewards.pool import RewardPool
from geomjax.rollout.continuous import Completed, ContinuousSampler


class Generation(NamedTuple):
    """A judged completion.

    Attributes:
      problem: Index of its problem in the suite.
      sample: Its number among the samples of the problem.
      text: The completion, without its stop token.
      judged: What the reward says, its length and end.
    """

    problem: int
    sample: int
    text: str
    judged: Sample

    def line(self) -> str:
        """As a line of the file."""
        record = {
            "problem": self.problem,
            "sample": self.sample,
            "tokens": self.judged.tokens,
            "stopped": self.judged.stopped,
            **self.judged.judgement._asdict(),
            "completion": self.text,
        }
        return json.dumps(record) + "\n"

    @classmethod
    def read(cls, line: bytes) -> "Generation":
        """From a line of the file."""
        record = json.loads(line)
        judgement = Judgement(**{name: record[name] for name in Judgement._fields})
        judged = Sample(judgement, record["tokens"], record["stopped"])
        return cls(record["problem"], record["sample"], record["completion"], judged)


class Task(NamedTuple):
    """What is to be generated of one suite.

    Attributes:
      examples: Its problems.
      token_ids: Their prompts.
      samples: Completions of each.
      block: Problems in a block.
      seed: Seed of the draws: those of a sample depend on seed, problem and number.
    """

    examples: Sequence[Example]
    token_ids: Sequence[np.ndarray]
    samples: int
    block: int
    seed: int


def generate(
    path: Path,
    task: Task,
    sampler: ContinuousSampler,
    tokenizer: PreTrainedTokenizerFast,
    pool: RewardPool,
    on_samples: Callable[[Sequence[Generation]], None],
) -> list[Generation]:
    """Generates and judges what the file does not hold yet.

    Args:
      path: The file of the generations.
      task: What to generate.
      sampler: Samples completions.
      tokenizer: Its tokenizer.
      pool: Judges them.
      on_samples: Called with each block, those found in the file too.

    Returns:
      All generations, by problem and sample.

    Raises:
      ValueError: The file is damaged.
    """
    size = task.block * task.samples
    total = len(task.examples) * task.samples
    found = _whole_blocks(path, size, total)
    for start in range(0, len(found), size):
        on_samples(found[start : start + size])
    with path.open("a", encoding="utf-8") as file:
        for first in range(len(found) // task.samples, len(task.examples), task.block):
            problems = range(first, min(first + task.block, len(task.examples)))
            made = _block(task, problems, sampler, tokenizer, pool)
            file.writelines(each.line() for each in made)
            file.flush()
            os.fsync(file.fileno())
            found += made
            on_samples(made)
    return found


def _whole_blocks(path: Path, size: int, total: int) -> list[Generation]:
    """What earlier processes finished; the rest of the file is cut off."""
    if not path.exists():
        return []
    data = path.read_bytes()
    lines = data.split(b"\n")[:-1]
    whole = len(lines) if len(lines) == total else len(lines) // size * size
    kept = lines[:whole]
    try:
        found = [Generation.read(line) for line in kept]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error}); remove it") from None
    with path.open("r+b") as file:
        file.truncate(sum(len(line) + 1 for line in kept))
    return found


def _block(
    task: Task,
    problems: range,
    sampler: ContinuousSampler,
    tokenizer: PreTrainedTokenizerFast,
    pool: RewardPool,
) -> list[Generation]:
    places = [(p, sample) for p in problems for sample in range(task.samples)]
    prompts = [task.token_ids[problem] for problem, _ in places]
    pending: dict[int, tuple[Completed, Completion, Future[Judgement]]] = {}
    for completed in sampler.run(prompts, _keys(task.seed, places)):
        (text,) = decode_completions(
            completed.tokens[None], tokenizer, sampler.drawing.stop_tokens
        )
        example = task.examples[places[completed.index][0]]
        # Judged while the next ones are sampled.
        (future,) = pool.submit([example], [text.text])
        pending[completed.index] = completed, text, future
    made = []
    for index, (problem, number) in enumerate(places):
        completed, text, future = pending.pop(index)
        judged = Sample(future.result(), len(completed.tokens), text.stopped)
        made.append(Generation(problem, number, text.text, judged))
    return made


def _keys(seed: int, places: Sequence[tuple[int, int]]) -> jax.Array:
    """A key a sample, whichever other samples there are."""
    problem, number = jnp.asarray(places, jnp.uint32).T
    fold = jax.vmap(jax.random.fold_in, (None, 0))
    return jax.vmap(jax.random.fold_in)(fold(jax.random.key(seed), problem), number)


def keep_problems(path: Path, examples: Sequence[Example]) -> None:
    """Writes the problems beside their generations, or finds them unchanged.

    Raises:
      WorkdirError: The run was begun with other problems.
    """
    text = "".join(
        json.dumps(problem_record(i, example)) + "\n"
        for i, example in enumerate(examples)
    )
    if not path.exists():
        temporary = path.with_name(f".{path.name}.tmp")
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    elif path.read_text(encoding="utf-8") != text:
        raise WorkdirError(
            f"{path}: the suite's problems have changed since the run was begun; "
            "choose another --workdir"
        )


def by_problem(generations: Sequence[Generation], count: int) -> list[list[Any]]:
    """The judged samples of each problem."""
    groups: list[list[Any]] = [[] for _ in range(count)]
    for generation in generations:
        groups[generation.problem].append(generation.judged)
    return groups
