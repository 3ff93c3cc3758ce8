"""What a step of each kind of run learns from, as a function of seed and step."""

import re
import time
from collections.abc import Callable
from functools import cached_property, partial
from typing import Any, NamedTuple

import jax
import ml_collections
import numpy as np

from experiments.common.compilations import compiled
from experiments.common.world import World
from experiments.studies.forms import is_privileged
from geomjax import hosts
from geomjax.data.answers import decode_completions
from geomjax.data.batches import PromptBatch, batch_index, longest, pad_prompts
from geomjax.data.prompts import Example
from geomjax.data.spread import spread
from geomjax.data.supervised import pad_responses
from geomjax.rewards.contract import SILENT
from geomjax.rewards.judge import Judge
from geomjax.rewards.tokens import pad_answers, token_match
from geomjax.rollout.sample import Rollout
from geomjax.train.learn import jit_rows, make_draw
from geomjax.train.privileged import join_views
from geomjax.typing import Params, PRNGKey


class Drawn(NamedTuple):
    """Sequences of one step, the reward of each, and which rewards are known.

    `known` is None where all are.
    """

    rollout: Rollout
    rewards: jax.Array
    known: jax.Array | None = None


class Sequences:
    """Draws sequences from student, teacher and data set, all of one shape.

    On a mesh they lie over the devices of all processes, split by sequence.

    Attributes:
      waited_s: Seconds in which draws waited for their prompts, which are read as they
        are needed and not ahead.
    """

    def __init__(self, config: ml_collections.ConfigDict, world: World, judge: Judge):
        self._config, self._world, self._judge = config, world, judge
        self.waited_s = 0.0
        self._student = make_draw(world.student.model, world.sampling)
        # Models of one configuration share the program.
        same = world.teacher.model == world.student.model
        self._teacher = (
            self._student if same else make_draw(world.teacher.model, world.sampling)
        )
        place, start = world.student.model.placement, world.prompt_length
        self._lie = spread(self._rows, place)
        last = world.sampling.max_new_tokens
        self._join = jit_rows(partial(join_views, last=last), place)
        self._match = jit_rows(lambda x, y: token_match(x[:, start:], y), place)
        stop = world.sampling.stop_tokens[0]
        self._answers = [
            np.array([*_encode(world, example.answer or ""), stop], np.int32)
            for example in world.train.examples
        ]
        # Compared token for token by the reward `exact` alone; others read texts.
        self._padded = (
            pad_answers(
                self._answers, world.sampling.max_new_tokens, world.sampling.pad_token
            )
            if config.reward.name == "exact"
            else None
        )

    def compilations(self) -> dict[str, int]:
        """How often the draws were compiled."""
        draws: dict[str, Callable] = {
            "student": self._student,
            "teacher": self._teacher,
            "privileged": self._join,
        }
        sizes = {name: compiled(draw) for name, draw in draws.items()}
        return {name: size for name, size in sizes.items() if size}

    def make(self, kind: str, seed: int) -> Callable[[Params, int, PRNGKey], Drawn]:
        """`(student_params, step, key)` to the sequences of a step."""
        if kind == "responses":
            batch_at, _ = self._world.train_batches(self._rows, seed)
            return partial(self._responses, self._timed(batch_at))
        foreign = kind in ("foreign", "teacher_samples")
        privileged = is_privileged(kind)
        count = self._config.prompts_per_step
        batch_at, batches = self._world.train_batches(count, seed)
        batch_at = self._timed(batch_at)
        size = len(self._world.train.token_ids)

        def drawn(params: Params, step: int, key: PRNGKey) -> Drawn:
            prompts = batches.put(batch_at(step))
            if foreign:
                rollout = self._teacher(self._world.teacher.params, prompts, key)
            else:
                rollout = self._student(params, prompts, key)
            index = batch_index(step, seed=seed, batch_size=count, size=size)
            rewards, known = self._rewards(rollout, index)
            if privileged:
                rollout = self._join(rollout, self._privileged_batch(index))
            return Drawn(rollout, rewards, known)

        return drawn

    def _timed(
        self, batch_at: Callable[[int], PromptBatch]
    ) -> Callable[[int], PromptBatch]:
        def timed(step: int) -> PromptBatch:
            start = time.perf_counter()
            batch = batch_at(step)
            self.waited_s += time.perf_counter() - start
            return batch

        return timed

    @cached_property
    def _privileged(self) -> list[np.ndarray]:
        """Every prompt as a reader with privileged information has it.

        Raises:
          ValueError: There is no template, or a prompt is no plain text.
        """
        template = self._config.get("privileged", "")
        examples = self._world.train.examples
        if not template:
            raise ValueError("privileged is empty; expected such as {answer}={prompt}")
        if not all(isinstance(example.prompt, str) for example in examples):
            raise ValueError("privileged: prompts are conversations, not plain text")
        return [
            np.array(_encode(self._world, _filled(template, example)), np.int32)
            for example in examples
        ]

    @property
    def privileged_slots(self) -> int:
        """Slots of the privileged view of a row."""
        return longest(self._privileged) + self._world.sampling.max_new_tokens

    def _privileged_batch(self, index: np.ndarray) -> PromptBatch:
        rows = np.repeat(index, self._world.sampling.samples_per_prompt)
        return self._lie.put(
            pad_prompts(
                [self._privileged[i] for i in rows],
                longest(self._privileged),
                self._world.sampling.pad_token,
            )
        )

    def _rewards(
        self, rollout: Rollout, index: np.ndarray
    ) -> tuple[jax.Array, jax.Array | None]:
        """Rewards of a rollout, of tokens on the device or of texts in process 0.

        Beside them which are known: a text's may not be, a token's always is (None).
        """
        rows = np.repeat(index, self._world.sampling.samples_per_prompt)
        if self._padded is not None:
            return self._match(rollout.tokens, self._lie.put(self._padded[rows])), None
        completions = hosts.fetch(rollout.tokens)[:, self._world.prompt_length :]
        # One process judges: another's clock might judge otherwise.
        scores = hosts.on_main(lambda: self._scores(completions, rows))
        known = np.array([score is not None for score in scores])
        rewards = np.array([score or 0.0 for score in scores], np.float32)
        return self._lie.put(rewards), self._lie.put(known)

    def _scores(self, completions: np.ndarray, rows: np.ndarray) -> list[float | None]:
        """One a text; None where the reward says nothing of it.

        A completion that was cut off scores 0, whatever it is judged to be.
        """
        stops = self._world.sampling.stop_tokens
        texts = decode_completions(completions, self._world.tokenizer, stops)
        examples = [self._world.train.examples[i] for i in rows]
        judged = self._judge(examples, [text.text for text in texts])
        return [
            (None if judgement.status in SILENT else judgement.score)
            if text.stopped
            else 0.0
            for text, judgement in zip(texts, judged, strict=True)
        ]

    @property
    def _rows(self) -> int:
        return self._config.prompts_per_step * self._config.samples_per_prompt

    def _responses(
        self, batch_at: Callable, params: Params, step: int, key: PRNGKey
    ) -> Drawn:
        """Right answers of as many prompts as a rollout has rows."""
        del params, key
        batch = batch_at(step)
        index = batch.index
        padded = pad_responses(
            [self._world.train.token_ids[i] for i in index],
            [self._answers[i] for i in index],
            prompt_length=self._world.prompt_length,
            response_length=self._world.sampling.max_new_tokens,
            pad_id=self._world.sampling.pad_token,
        )
        log_probs = np.zeros(padded.tokens.shape, np.float32)
        rewards = np.ones(len(index), np.float32)
        parts: Any = (*padded, log_probs, batch.images, rewards)
        *arrays, rewards = self._lie.put(parts)
        return Drawn(Rollout(*arrays), rewards)


def _filled(template: str, example: Example) -> str:
    """The template with a problem's text in it, braces of the texts left alone."""
    parts = {"answer": example.answer or "", "prompt": str(example.prompt)}
    return re.sub(r"\{(answer|prompt)\}", lambda match: parts[match[1]], template)


def _encode(world: World, text: str) -> list[int]:
    return world.tokenizer.encode(text, add_special_tokens=False)
