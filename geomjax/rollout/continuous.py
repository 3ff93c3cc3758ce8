"""Sampling many sequences through few rows: who ends makes room for who waits.

A batch that decodes until its longest row has ended spends most of its steps on rows
that ended long ago. Here a host loop runs compiled chunks of a few decoding steps;
between two chunks the rows of ended sequences go to waiting prompts, which are
prefilled in groups of about equal length. Once none waits, the batch itself shrinks.
The cache has as many slots as its longest living sequence needs. Rows, slots and
prompt lengths come from ladders of powers of 2, so that few programs are compiled.

The draw of token t of a sequence depends on its own key and t alone, whichever row it
sits in, so the tokens are those of `geomjax.rollout.sample.sample`, up to the float
rounding of logits in programs of other shapes.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, Int, Int32

from geomjax.data.batches import ImagesOf, pad_prompts
from geomjax.rollout import chunks
from geomjax.rollout.chunks import Drawing, Living
from geomjax.rollout.sample import Rollout, check_sampling
from geomjax.typing import LanguageModel, Params, PRNGKey, SeeingModel

_SLACK = 4
"""Chunks that fit the free slots after the cache was moved."""

_LEAST_ROWS, _LEAST_SLOTS, _LEAST_WIDTH = 8, 128, 16
"""Where the ladders begin: smaller programs would save little, and each is compiled."""

_GROUP = 4
"""Prompts are prefilled by 1, 4, 16, ... at a time: few programs, no row of padding."""


class Completed(NamedTuple):
    """A completion.

    Attributes:
      index: Which of the prompts it completes.
      tokens: Sampled ids, the stop token included.
      log_probs: The log-probability with which each was sampled.
    """

    index: int  # type: ignore[assignment] # hides a method
    tokens: Int32[np.ndarray, "t"]
    log_probs: Float32[np.ndarray, "t"]


class Work(NamedTuple):
    """What was computed, padding and ended rows included.

    Attributes:
      row_steps: Rows times decoding steps: tokens that pass through the blocks.
      slot_reads: Rows times steps times cache slots: pairs that attention scores.
      prompt_tokens: Rows times padded lengths of prefills.
      moved_slots: Rows times slots of the caches that were moved.
    """

    row_steps: int = 0
    slot_reads: int = 0
    prompt_tokens: int = 0
    moved_slots: int = 0

    def plus(self, **more: int) -> "Work":
        """With these added."""
        return Work(**{n: v + more.get(n, 0) for n, v in self._asdict().items()})


class ContinuousSampler:
    """Samples from one model through a fixed number of rows.

    The cache holds at most `rows` times (longest prompt + `max_new_tokens` +
    4 * `chunk_steps`) tokens, and twice that for a moment while it is moved.

    Attributes:
      work: What was computed so far.
    """

    def __init__(
        self,
        model: LanguageModel,
        params: Params,
        drawing: Drawing,
        *,
        rows: int,
        chunk_steps: int = 16,
    ):
        """Casts and unstacks the weights, once.

        Args:
          model: A model whose cache is a `geomjax.models.cache.Cache`. It is a static
            argument of compiled programs, so equal models share them.
          params: Its parameters.
          drawing: How tokens are drawn.
          rows: Sequences decoded at a time; some more where a mesh divides them.
          chunk_steps: Decoding steps between two looks at which rows have ended.

        Raises:
          ValueError: A setting is out of its range.
        """
        check_sampling(drawing.max_new_tokens, drawing.temperature, drawing.top_p)
        if rows < 1 or chunk_steps < 1:
            raise ValueError(
                f"got {rows} rows and {chunk_steps} steps a chunk; expected 1 or more"
            )
        self.work = Work()
        self.model, self.drawing = model, drawing
        self.parts = model.placement.parts("batch")
        self.rows, self.chunk_steps = rows + -rows % self.parts, chunk_steps
        self.params = chunks.prepare(params, model)

    def run(
        self,
        prompts: Sequence[Int32[np.ndarray, "_"]],
        keys: PRNGKey,
        images_of: ImagesOf | None = None,
    ) -> Iterator[Completed]:
        """Completes prompts.

        Args:
          prompts: Token ids without padding.
          keys: One key a prompt; its draws depend on nothing else.
          images_of: Reads the images of some of the prompts; None for text.

        Yields:
          Each completion once, in the order in which they end.

        Raises:
          ValueError: Not one key a prompt, or a prompt is empty.
        """
        if keys.shape != (len(prompts),):
            raise ValueError(f"{len(prompts)} prompts with keys {keys.shape}")
        if not all(len(prompt) for prompt in prompts):
            raise ValueError("a prompt has no token; expected at least one")
        if len(prompts):
            yield from _Queue(self, prompts, keys, images_of).loop()


def sample_continuously(
    model: LanguageModel,
    params: Params,
    tokens: Int[Array, "B P"],
    positions: Int[Array, "B P"],
    segment_ids: Int[Array, "B P"],
    key: PRNGKey,
    *,
    rows: int,
    chunk_steps: int = 16,
    max_new_tokens: int,
    stop_tokens: tuple[int, ...],
    temperature: float,
    pad_token: int = 0,
    top_p: float = 1.0,
) -> Rollout:
    """As `geomjax.rollout.sample.sample`, through `rows` rows; not to be jitted.

    Args:
      model: As for `ContinuousSampler`.
      params: As for `sample`, and so are the arguments not named here.
      tokens: Prompts padded on the left.
      positions: Place of each token in its prompt.
      segment_ids: 1 for prompt tokens, 0 for padding.
      key: Random key of this rollout.
      rows: Sequences decoded at a time.
      chunk_steps: Decoding steps between two looks at which rows have ended.
      max_new_tokens: Most tokens sampled a row.
      stop_tokens: Ids that end a row.
      temperature: Softmax temperature.
      pad_token: Id written after the end of a row.
      top_p: Mass of the nucleus drawn from.

    Returns:
      The rollout of `sample` with the same key.
    """
    drawing = Drawing(max_new_tokens, stop_tokens, temperature, top_p, pad_token)
    sampler = ContinuousSampler(
        model, params, drawing, rows=rows, chunk_steps=chunk_steps
    )
    ids, real = np.asarray(tokens), np.asarray(segment_ids) != 0
    prompts = [row[kept] for row, kept in zip(ids, real, strict=True)]
    batch, width = ids.shape
    shape = (batch, width + max_new_tokens)
    new = {
        "tokens": np.full(shape, pad_token, np.int32),
        "positions": np.zeros(shape, np.int32),
        "segment_ids": np.zeros(shape, np.int32),
        "completion": np.zeros(shape, bool),
        "log_probs": np.zeros(shape, np.float32),
    }
    new["tokens"][:, :width] = ids
    new["positions"][:, :width] = positions
    new["segment_ids"][:, :width] = segment_ids
    for index, drawn, log_probs in sampler.run(prompts, jax.random.split(key, batch)):
        place = np.s_[index, width : width + len(drawn)]
        new["tokens"][place] = drawn
        new["positions"][place] = len(prompts[index]) + np.arange(len(drawn))
        new["segment_ids"][place] = 1
        new["completion"][place] = True
        new["log_probs"][place] = log_probs
    return Rollout(**{name: jnp.asarray(array) for name, array in new.items()})


class _Row:
    """A sequence that is being decoded."""

    def __init__(self, index: int, prompt_length: int, offset: int):
        self.index, self.prompt_length, self.offset = index, prompt_length, offset
        self.tokens: list[int] = []
        self.log_probs: list[float] = []

    @property
    def cached(self) -> int:
        """Tokens in the cache: all but the one drawn last."""
        return self.prompt_length + len(self.tokens) - 1


class _Queue:
    """Prompts on their way through the rows."""

    def __init__(
        self,
        sampler: ContinuousSampler,
        prompts,
        keys: PRNGKey,
        images_of: ImagesOf | None,
    ):
        self.sampler, self.prompts, self.images_of = sampler, prompts, images_of
        self.key_data = np.asarray(jax.random.key_data(keys))
        # Neighbours are prefilled together; of about one length, they pad least.
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        self.waiting = order[::-1]  # Taken from the end, the shortest first.
        self.longest_prompt = max(map(len, prompts))
        self.longest = self.longest_prompt + sampler.drawing.max_new_tokens
        self.rows: list[_Row | None] = [None] * self._rows_for(len(prompts))
        self.length = 1
        self.slots = self._slots_for(self.length)
        self.cache = chunks.empty(
            sampler.params,
            jnp.int32(self.length),
            sampler.model,
            len(self.rows),
            self.slots,
            self.longest,
        )

    def loop(self) -> Iterator[Completed]:
        """Runs until no prompt waits and no row lives."""
        while True:
            while self.waiting and None in self.rows:
                yield from self._admit()
            if not any(self.rows):
                return
            self._make_room()
            yield from self._advance()

    def _admit(self) -> Iterator[Completed]:
        """Prefills waiting prompts into free rows and draws their first tokens."""
        sampler, drawing = self.sampler, self.sampler.drawing
        free = [place for place, row in enumerate(self.rows) if row is None]
        room = min(len(free), len(self.waiting))
        size = sampler.parts
        while _GROUP * size <= room:
            size *= _GROUP
        taken = min(size, room)
        free, indices = free[:taken], [self.waiting.pop() for _ in range(taken)]
        # On a mesh some rows of the program may have to stay empty: copies of the
        # first, for a row that there is not.
        filling = size - taken
        given = [*indices, *indices[:1] * filling]
        width = _ladder(
            max(len(self.prompts[i]) for i in indices),
            self.longest_prompt,
            least=_LEAST_WIDTH,
        )
        if self.length < width:
            self._move(range(len(self.rows)), least=width)
        batch = pad_prompts([self.prompts[i] for i in given], width, drawing.pad_token)
        images, offsets = self._images(given)
        self.cache, *drawn = chunks.admit(
            sampler.params,
            self.cache,
            (
                jnp.asarray(batch.tokens),
                jnp.asarray(batch.positions),
                jnp.asarray(batch.segment_ids),
            ),
            jnp.asarray([*free, *[len(self.rows)] * filling], jnp.int32),
            jnp.asarray(self.key_data[given]),
            images,
            sampler.model,
            drawing,
        )
        sampler.work = sampler.work.plus(prompt_tokens=len(given) * width)
        tokens, log_probs = jax.device_get(drawn)
        for i, (place, index) in enumerate(zip(free, indices, strict=True)):
            length = len(self.prompts[index])
            row = self.rows[place] = _Row(index, length, offsets[i])
            yield from self._take(place, row, tokens[i : i + 1], log_probs[i : i + 1])

    def _images(self, indices: list[int]) -> tuple[Any, list[int]]:
        """The images of prompts, and what they add to the places of later tokens."""
        if self.images_of is None:
            return None, [0] * len(indices)
        model, images = self.sampler.model, self.images_of(indices)
        if not isinstance(model, SeeingModel):
            raise ValueError(
                f"prompts with images, but {type(model).__name__} sees none"
            )
        return images, np.asarray(model.later_offsets(images)).tolist()

    def _make_room(self) -> None:
        """Keeps as few rows as serve once none waits, and free slots for a chunk."""
        living = [place for place, row in enumerate(self.rows) if row is not None]
        count = len(self.rows)
        size = count if self.waiting else min(self._rows_for(len(living)), count)
        if size < count:
            others = [place for place, row in enumerate(self.rows) if row is None]
            self._move([*living, *others][:size])
        elif self.slots - self.length < self.sampler.chunk_steps:
            self._move(range(count))

    def _advance(self) -> Iterator[Completed]:
        """Runs a chunk and collects what it drew."""
        sampler, count = self.sampler, len(self.rows)
        self.cache, drawn = chunks.advance(
            sampler.params,
            self.cache,
            self._living(),
            jnp.int32(sampler.chunk_steps),
            sampler.model,
            sampler.drawing,
            sampler.chunk_steps,
        )
        tokens, log_probs, alive, done = jax.device_get(drawn)
        steps = int(done)
        self.length += steps
        sampler.work = sampler.work.plus(
            row_steps=steps * count, slot_reads=steps * count * self.slots
        )
        for place, row in enumerate(self.rows):
            if row is not None:
                own = alive[:steps, place]
                yield from self._take(
                    place,
                    row,
                    tokens[:steps, place][own],
                    log_probs[:steps, place][own],
                )

    def _living(self) -> Living:
        """What the program needs to know of each row; a free one is at rest."""
        rest = (0, 0, 0, False, np.zeros_like(self.key_data[0]))
        states = [
            rest
            if row is None
            else (
                row.tokens[-1],
                row.cached + row.offset,
                len(row.tokens),
                True,
                self.key_data[row.index],
            )
            for row in self.rows
        ]
        token, position, drawn, alive, key_data = zip(*states, strict=True)
        return Living(
            token=jnp.asarray(token, jnp.int32),
            position=jnp.asarray(position, jnp.int32),
            drawn=jnp.asarray(drawn, jnp.int32),
            alive=jnp.asarray(alive, bool),
            key_data=jnp.asarray(np.stack(key_data)),
        )

    def _take(self, place: int, row: _Row, tokens, log_probs) -> Iterator[Completed]:
        """Adds what was drawn to a row, which is free again if it has ended."""
        drawing = self.sampler.drawing
        row.tokens += tokens.tolist()
        row.log_probs += log_probs.tolist()
        stopped = row.tokens[-1] in drawing.stop_tokens
        if stopped or len(row.tokens) == drawing.max_new_tokens:
            self.rows[place] = None
            yield Completed(
                row.index,
                np.array(row.tokens, np.int32),
                np.array(row.log_probs, np.float32),
            )

    def _move(self, places: Sequence[int], least: int = 1) -> None:
        """Takes these rows and moves their tokens to the front, to `least` or more."""
        self.rows = [self.rows[place] for place in places]
        self.length = max(
            [least, *(row.cached for row in self.rows if row is not None)]
        )
        self.slots = self._slots_for(self.length)
        self.cache = chunks.move(
            self.cache,
            jnp.asarray(places, jnp.int32),
            jnp.int32(self.length),
            self.slots,
            self.sampler.model,
        )
        self.sampler.work = self.sampler.work.plus(
            moved_slots=len(self.rows) * self.slots
        )

    def _slots_for(self, length: int) -> int:
        slack = _SLACK * self.sampler.chunk_steps
        return _ladder(length + slack, self.longest + slack, least=_LEAST_SLOTS)

    def _rows_for(self, count: int) -> int:
        """Rows for so many sequences, as many as a mesh divides."""
        rows = _ladder(count, self.sampler.rows, least=_LEAST_ROWS)
        return min(rows + -rows % self.sampler.parts, self.sampler.rows)


def _ladder(size: int, most: int, *, least: int) -> int:
    """The least power of 2 that holds `size`, between `least` and `most`."""
    return min(max(least, 1 << (size - 1).bit_length()), most)
