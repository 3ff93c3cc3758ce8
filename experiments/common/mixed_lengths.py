"""Rollouts of mixed lengths: the plain loop against continuous sampling.

Completions of a random model end by a law of our choice: `Ending` gives the stop token
the chance, at each place, with which a log-normal length ends there. Everything else is
sampled as ever, so both contestants draw the same tokens, which is checked.
"""

import dataclasses
import statistics
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.common import benchmarks
from experiments.common.benchmarks import Size
from geomjax.data.batches import pad_prompts
from geomjax.models.decoder import Decoder
from geomjax.models.load import make_decoder
from geomjax.rollout.chunks import Drawing
from geomjax.rollout.continuous import ContinuousSampler, Work
from geomjax.rollout.sample import sample

BATCHES = 4
"""Batches of the plain loop; the other contestant has their prompts in one queue."""

TURNS = 3
"""How often each of the two is timed, in turn."""

PROMPT_TOKENS = (8, 64)
"""Shortest and longest prompt, uniformly mixed."""


class Law(NamedTuple):
    """Lengths of sequences, prompt included: log-normal, cut at a limit.

    Attributes:
      median: In tokens.
      sigma: Standard deviation of the logarithm.
      limit: Most new tokens.
    """

    median: float
    sigma: float
    limit: int


LAWS = {"long tail": Law(96, 0.7, 448), "often cut": Law(192, 0.7, 256)}
"""Ours: hardly any runs to the limit in the first; in the second, a quarter does."""


@dataclasses.dataclass(frozen=True)
class Ending:
    """A decoder whose sequences end by a law; implements `LanguageModel`.

    Hidden states get one more entry, the logit of the stop token, and the head one more
    column that reads it.
    """

    model: Decoder
    stop: int
    median: float
    sigma: float

    dtype = property(lambda self: self.model.dtype)
    precision = property(lambda self: self.model.precision)
    placement = property(lambda self: self.model.placement)
    vocab_size = property(lambda self: self.model.vocab_size)

    def unembedding(self, params):
        """The head `[V, D + 1]`, whose stop token reads the last entry alone."""
        head = self.model.unembedding(params).at[self.stop].set(0)
        column = jnp.zeros((head.shape[0], 1), head.dtype).at[self.stop].set(1)
        return jnp.concatenate([head, column], axis=1)

    def split_layers(self, params):
        """As the decoder's."""
        return self.model.split_layers(params)

    def prefill(self, params, tokens, positions, segment_ids, cache_length, last=None):
        """As the decoder's, with the logit."""
        hidden, cache = self.model.prefill(
            params, tokens, positions, segment_ids, cache_length, last
        )
        return self._with_logit(hidden, positions[:, -hidden.shape[1] :]), cache

    def decode(self, params, token, position, segment_id, cache):
        """As the decoder's, with the logit."""
        hidden, cache = self.model.decode(params, token, position, segment_id, cache)
        return self._with_logit(hidden, position), cache

    def apply(self, params, tokens, positions, segment_ids, last=None):
        """As the decoder's, with the logit."""
        hidden = self.model.apply(params, tokens, positions, segment_ids, last)
        return self._with_logit(hidden, positions[:, -hidden.shape[1] :]), None

    def _with_logit(self, hidden, position):
        length = position.astype(jnp.float32) + 1.0

        def log_survival(n):
            place = (jnp.log(n) - np.log(self.median)) / self.sigma
            return jax.scipy.stats.norm.logsf(place)

        hazard = -jnp.expm1(log_survival(length + 1.0) - log_survival(length))
        odds = jnp.log(hazard) - jnp.log1p(-hazard)
        # The others' logits are about standard normal: each weighs e^(1/2).
        others = np.log(self.vocab_size - 1) + 0.5
        return jnp.concatenate([hidden, (odds + others)[..., None]], axis=-1)


class Contest(NamedTuple):
    """Both contestants on the same prompts and keys, ready to run.

    Attributes:
      plain: Runs the plain loop batch by batch; returns tokens and completion masks.
      continuous: Runs the queue; returns the completions and the work counted.
      plain_work: From the lengths, what the plain loop computes.
    """

    plain: Any
    continuous: Any
    plain_work: Any


def contest(size: Size, law: Law, *, seed: int = 0) -> Contest:
    """Sets up both contestants.

    Args:
      size: Model and rows of a batch.
      law: How long completions are.
      seed: Of weights, prompts and draws.

    Returns:
      The contest.
    """
    config = size.config()
    marks = benchmarks.tokenizer()
    model = Ending(
        make_decoder(config, config.vocab_size),
        marks.eos_token_id,
        law.median,
        law.sigma,
    )
    params = model.model.init(jax.random.key(seed))
    generator = np.random.default_rng(seed)
    low, high = PROMPT_TOKENS
    prompts = [
        generator.integers(4, config.vocab_size, length).astype(np.int32)
        for length in generator.integers(low, high + 1, BATCHES * size.batch)
    ]
    keys = jax.random.split(jax.random.key(seed + 1), BATCHES)
    batches = [
        jax.device_put(
            pad_prompts(
                prompts[i * size.batch : (i + 1) * size.batch], high, marks.pad_token_id
            )
        )
        for i in range(BATCHES)
    ]
    stops = (marks.eos_token_id,)
    loop = jax.jit(
        lambda params, batch, key: sample(
            model,
            params,
            batch.tokens,
            batch.positions,
            batch.segment_ids,
            key,
            max_new_tokens=law.limit,
            stop_tokens=stops,
            temperature=1.0,
            pad_token=marks.pad_token_id,
        )
    )

    def plain():
        return [
            loop(params, batch, key) for batch, key in zip(batches, keys, strict=True)
        ]

    every_key = jax.vmap(lambda key: jax.random.split(key, size.batch))(keys)
    drawing = Drawing(law.limit, stops, 1.0, pad_token=marks.pad_token_id)

    def continuous():
        sampler = ContinuousSampler(model, params, drawing, rows=size.batch)
        return list(sampler.run(prompts, every_key.reshape(-1))), sampler.work

    def plain_work(lengths):
        steps = sum(int(own.max()) - 1 for own in lengths.reshape(BATCHES, -1))
        rows, slots = size.batch, high + law.limit
        return Work(steps * rows, steps * rows * slots, BATCHES * rows * high, 0)

    return Contest(plain, continuous, plain_work)


def measure(size: Size, law: Law) -> dict[str, Any]:
    """Runs both contestants in turn and compares tokens, work and time.

    Args:
      size: Model and rows of a batch.
      law: How long completions are.

    Returns:
      Seconds, the ratio, lengths, counts of both, and how many sequences are equal.
    """
    match = contest(size, law)
    runs = {
        "plain": benchmarks.timed(match.plain),
        "continuous": benchmarks.timed(lambda: match.continuous()[0] and ()),
    }
    rollouts = match.plain()
    tokens = np.concatenate([np.asarray(r.tokens) for r in rollouts])
    masks = np.concatenate([np.asarray(r.completion) for r in rollouts])
    completed, work = match.continuous()
    equal = sum(
        np.array_equal(c.tokens, tokens[c.index][masks[c.index]]) for c in completed
    )
    lengths = masks.sum(axis=1)
    plain_work = match.plain_work(lengths)
    # Both have run before, and for seconds: no further call that does not count.
    times = [{name: run() for name, run in runs.items()} for _ in range(TURNS)]
    seconds = {name: statistics.median(turn[name] for turn in times) for name in runs}
    drawn = int(lengths.sum())
    return {
        "law": law._asdict(),
        "sequences": len(lengths),
        "equal_sequences": int(equal),
        "lengths": {
            "mean": float(lengths.mean()),
            "median": float(np.median(lengths)),
            "longest": int(lengths.max()),
            "at_limit": float((lengths == law.limit).mean()),
        },
        "seconds": seconds,
        "tokens_per_s": {name: drawn / value for name, value in seconds.items()},
        "ratio": seconds["plain"] / seconds["continuous"],
        "needed_row_steps": drawn - len(lengths),
        "work": {"plain": plain_work._asdict(), "continuous": work._asdict()},
        "row_step_ratio": plain_work.row_steps / work.row_steps,
        "slot_read_ratio": plain_work.slot_reads / work.slot_reads,
    }


def print_figures(name: str, figures: dict[str, Any]) -> None:
    """Prints what was measured of one law."""
    lengths, work = figures["lengths"], figures["work"]
    print(
        f"\n{name}: {figures['sequences']} completions, mean {lengths['mean']:.0f} "
        f"tokens, median {lengths['median']:.0f}, longest {lengths['longest']}, "
        f"{lengths['at_limit']:.0%} at the limit of {figures['law']['limit']}; "
        f"{figures['equal_sequences']} of them equal in both"
    )
    for who in ("plain", "continuous"):
        counts = work[who]
        print(
            f"  {who:12} {figures['seconds'][who]:8.2f} s "
            f"{figures['tokens_per_s'][who]:9,.0f} tokens/s "
            f"{counts['row_steps']:9,} row steps {counts['slot_reads']:13,} slot reads "
            f"{counts['prompt_tokens']:8,} prompt tokens"
        )
    print(
        f"  {'ratio':12} {figures['ratio']:.2f} in time, "
        f"{figures['row_step_ratio']:.2f} in row steps, "
        f"{figures['slot_read_ratio']:.2f} in slot reads; the tokens alone need "
        f"{figures['needed_row_steps']:,} row steps"
    )
