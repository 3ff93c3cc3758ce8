"""Judged completions of a suite as JSON lines, in blocks that are redone or whole.

A block is a fixed set of problems with all their samples. It runs from its beginning
to its end in the same programs on the same shapes, and is then appended to the file, so
that a run that was killed resumes at a block's beginning and ends with the same bytes.
Several processes take blocks in turn, each into a file of its own, which are joined in
the end; the bytes are those of one process.
"""

import json
import os
import time
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
from geomjax import hosts
from geomjax.data.answers import Completion, decode_completions
from geomjax.data.batches import ImagesOf
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
      images_of: Reads the images of some problems; None for problems of text.
    """

    examples: Sequence[Example]
    token_ids: Sequence[np.ndarray]
    samples: int
    block: int
    seed: int
    images_of: ImagesOf | None = None

    @property
    def blocks(self) -> range:
        """The first problem of every block."""
        return range(0, len(self.examples), self.block)


def missing_blocks(path: Path, task: Task) -> list[int]:
    """The first problem of every block that is still to be generated.

    To be asked before any process generates: what they have left is joined.

    Args:
      path: The file of the generations.
      task: What is to be generated.

    Raises:
      ValueError: A file is damaged.
    """
    found = hosts.on_main(lambda: sorted(_join(path, task)))
    return [first for first in task.blocks if first not in found]


def generate(
    path: Path,
    task: Task,
    blocks: Sequence[int],
    turn: int,
    sampler: ContinuousSampler,
    tokenizer: PreTrainedTokenizerFast,
    pool: RewardPool,
    on_samples: Callable[[Sequence[Generation]], None],
) -> None:
    """Generates and judges this process's share of the blocks; waits for no other.

    Args:
      path: The file of the generations.
      task: What to generate.
      blocks: First problems of the blocks that all processes generate.
      turn: The process that takes the first one, counted around.
      sampler: Samples completions.
      tokenizer: Its tokenizer.
      pool: Judges them.
      on_samples: Called with each block that this process has made.
    """
    count = hosts.count()
    place = (hosts.index() - turn) % count
    with _part(path, hosts.index()).open("a", encoding="utf-8") as file:
        for first in blocks[place::count]:
            problems = range(first, min(first + task.block, len(task.examples)))
            made = _block(task, problems, sampler, tokenizer, pool)
            file.writelines(each.line() for each in made)
            file.flush()
            os.fsync(file.fileno())
            on_samples(made)


def collect(path: Path, task: Task) -> list[Generation]:
    """All generations, by problem and sample, for process 0; for others none.

    To be asked when every process has generated its share.

    Raises:
      OSError: What another process has written does not appear here.
    """
    hosts.barrier()
    if not hosts.is_main():
        return []
    end = time.monotonic() + hosts.VISIBLE_S
    while len(found := _read(path, task)) < len(task.blocks):
        if time.monotonic() > end:
            raise OSError(
                f"{path.parent}: {len(task.blocks) - len(found)} blocks of another "
                "process do not appear here; all need the same --workdir"
            )
        time.sleep(0.5)
    return [each for _, block in sorted(_join(path, task).items()) for each in block]


def _part(path: Path, index: int) -> Path:
    """Where a process writes; process 0 into the file itself."""
    return path.with_name(f"{path.name}.part{index}") if index else path


def _parts(path: Path) -> list[Path]:
    beside = path.parent.iterdir()
    return sorted(part for part in beside if part.name.startswith(f"{path.name}.part"))


def _read(path: Path, task: Task) -> dict[int, list[Generation]]:
    """The whole blocks in the files of all processes, by first problem."""
    found: dict[int, list[Generation]] = {}
    for file in [path, *_parts(path)]:
        if file.exists():
            found |= _whole_blocks(file, task)
    return found


def _join(path: Path, task: Task) -> dict[int, list[Generation]]:
    """The same, which are then in one file, in order and alone."""
    found = _read(path, task)
    text = "".join(each.line() for _, block in sorted(found.items()) for each in block)
    if text and not (path.exists() and path.read_text(encoding="utf-8") == text):
        temporary = path.with_name(f".{path.name}.tmp")
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    elif not text:
        path.unlink(missing_ok=True)
    for part in _parts(path):
        part.unlink()
    return found


def _whole_blocks(path: Path, task: Task) -> dict[int, list[Generation]]:
    """What earlier processes finished, by first problem."""
    lines = path.read_bytes().split(b"\n")[:-1]
    found = {}
    try:
        while lines:
            first = Generation.read(lines[0]).problem
            size = min(task.block, len(task.examples) - first) * task.samples
            if first % task.block or size < 1:
                raise ValueError(f"problem {first} begins no block")
            block, lines = lines[:size], lines[size:]
            if len(block) == size:
                found[first] = [Generation.read(line) for line in block]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error}); remove it") from None
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
    read = task.images_of
    images_of = (
        None if read is None else lambda rows: read([places[i][0] for i in rows])
    )
    pending: dict[int, tuple[Completed, Completion, Future[Judgement]]] = {}
    for completed in sampler.run(prompts, _keys(task.seed, places), images_of):
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
    hosts.on_main(lambda: _keep_problems(path, examples))


def _keep_problems(path: Path, examples: Sequence[Example]) -> None:
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
