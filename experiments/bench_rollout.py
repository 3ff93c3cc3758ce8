"""Sampled tokens per second, against transformers' `generate` and the machine's floor.

    python -m experiments.bench_rollout [--peer] [--json=FILE]
    python -m experiments.bench_rollout --mixed-lengths [--json=FILE]

Samples from random Qwen3 models at two sizes (`experiments.common.benchmarks.SIZES`),
in float32 at temperature 1, a fixed number of tokens for every row. With `--peer`, also
with `generate` of transformers, which needs PyTorch: the same weights from one folder,
the same prompts and token counts, as many threads as there are cores, the two taking
turns in one run. `generate` is called as it comes: its default cache, uncompiled; only
sampling from the full distribution, `min_new_tokens` and inference mode are asked for.

The floor is the time that the rollout's multiplications and additions alone take
(`rollout_operations` states the formula) at the rate of a large square float32 product,
measured in the same run. Rates at the shapes of prefill and decoding are printed too:
with few rows the same products run slower, which is part of the distance to the floor.

With `--mixed-lengths`: completions of many lengths, through the plain loop and through
continuous sampling, in seconds and counted work (`experiments.common.mixed_lengths`).
"""

import importlib.util
import os
import tempfile
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from transformers import AutoModelForCausalLM

from experiments.common import benchmarks, cli, mixed_lengths
from experiments.common.benchmarks import SIZES, SQUARE, Size
from experiments.common.environment import environment
from geomjax.data.batches import PromptBatch
from geomjax.models.load import Loaded, load
from geomjax.objectives.vocabulary import logits
from geomjax.train.step import Sampling, rollout

Run = Callable[[], Any]


def main() -> None:
    """Measures both sizes, or mixed lengths, and prints a table."""
    if flags.FLAGS["mixed-lengths"].value:
        measure_mixed_lengths()
        return
    peer = flags.FLAGS.peer
    record: dict[str, Any] = {"sizes": {}, "environment": environment()}
    if peer:
        record["environment"] |= peer_versions()
    for name, size in SIZES.items():
        figures = record["sizes"][name] = measure(size, peer=peer)
        print_figures(name, size, figures)
    benchmarks.write_json(record)


def measure_mixed_lengths() -> None:
    """Measures every law of lengths at the larger size."""
    record: dict[str, Any] = {"mixed_lengths": {}, "environment": environment()}
    for name, law in mixed_lengths.LAWS.items():
        figures = mixed_lengths.measure(SIZES["small"], law)
        record["mixed_lengths"][name] = figures
        mixed_lengths.print_figures(name, figures)
        benchmarks.write_json(record)


def peer_versions() -> dict[str, str]:
    """Versions of the peer's packages.

    Raises:
      ValueError: PyTorch is not installed.
    """
    if importlib.util.find_spec("torch") is None:
        raise ValueError(
            "--peer runs transformers' generate, which needs PyTorch; install the "
            'parity extra: pip install "geomjax[parity]"'
        )
    return {name: metadata.version(name) for name in ("torch", "transformers")}


def measure(size: Size, *, peer: bool) -> dict[str, Any]:
    """Measures one size.

    Args:
      size: Model and batch.
      peer: Whether to measure `generate` too.

    Returns:
      Seconds, tokens per second, and the floor; with a peer also the ratio.
    """
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder)
        benchmarks.write_checkpoint(directory, size, seed=0)
        loaded, prompts = load(directory), benchmarks.prompt_batch(size)
        runs = {"ours": benchmarks.timed(our_rollout(loaded, prompts, size))}
        if peer:
            runs["peer"] = benchmarks.timed(
                transformers_generate(directory, loaded, prompts, size)
            )
    first_call = runs["ours"]()
    seconds = benchmarks.interleaved(runs, turns=size.turns, calls=size.calls)
    rates = benchmarks.matmul_rates(size)
    operations = benchmarks.rollout_operations(size)
    floor = operations / rates["square"]
    tokens = size.batch * size.new_tokens
    figures = {
        "seconds": seconds,
        "tokens_per_s": {name: tokens / value for name, value in seconds.items()},
        "first_call_s": first_call,
        "operations": operations,
        "matmul_rate": rates,
        "floor_s": floor,
        "times_floor": seconds["ours"] / floor,
    }
    if peer:
        figures["ratio"] = seconds["peer"] / seconds["ours"]
    return figures


def our_rollout(loaded: Loaded, prompts: PromptBatch, size: Size) -> Run:
    """One jitted rollout, as a training step holds it."""
    sampling = Sampling(
        samples_per_prompt=1,
        max_new_tokens=size.new_tokens,
        temperature=1.0,
        stop_tokens=(),
        pad_token=0,
    )
    jitted = jax.jit(
        lambda params, prompts, key: rollout(
            loaded.model, params, prompts, key, sampling
        )
    )
    keys = iter(jax.random.split(jax.random.key(0), 10_000))
    on_device = jax.device_put(prompts)
    return lambda: jitted(loaded.params, on_device, next(keys))


def transformers_generate(
    directory: Path, loaded: Loaded, prompts: PromptBatch, size: Size
) -> Run:
    """`generate` of the model in `directory`, after a check that it is ours.

    Raises:
      ValueError: Its logits are not ours.
    """
    import torch

    torch.set_num_threads(os.cpu_count() or 1)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    tokens = torch.tensor(np.asarray(prompts.tokens), dtype=torch.long)
    with torch.inference_mode():
        theirs = model(tokens).logits.numpy()
    decoder, params = loaded
    own_ids, positions, segment_ids = map(jnp.asarray, prompts[:3])
    hidden = decoder.apply(params, own_ids, positions, segment_ids)
    flat = hidden.reshape(-1, hidden.shape[-1])
    ours = logits(decoder, decoder.unembedding(params), flat, 1.0)
    difference = np.abs(np.asarray(ours) - theirs.reshape(ours.shape)).max()
    if not difference < 1e-3:
        raise ValueError(
            f"logits differ from those of transformers by {difference}: the two "
            "contestants do not run the same model"
        )

    @torch.inference_mode()
    def generate() -> Any:
        return model.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            min_new_tokens=size.new_tokens,
            max_new_tokens=size.new_tokens,
        )

    return generate


def print_figures(name: str, size: Size, figures: dict[str, Any]) -> None:
    """Prints what was measured at one size."""
    print(
        f"\n{name}: width {size.hidden_size}, {size.num_layers} layers, batch "
        f"{size.batch}, prompt {size.prompt_tokens}, {size.new_tokens} new tokens"
    )
    for who, label in (("ours", "geomjax"), ("peer", "transformers generate")):
        if who in figures["seconds"]:
            rate, seconds = figures["tokens_per_s"][who], figures["seconds"][who]
            print(f"  {label:24} {rate:9,.0f} tokens/s  {1e3 * seconds:9.2f} ms")
    if "ratio" in figures:
        print(f"  {'ratio':24} {figures['ratio']:9.1f} times faster")
    print(f"  {'first call (compiles)':24} {figures['first_call_s']:9.2f} s")
    print(
        f"  {'floor':24} {1e3 * figures['floor_s']:9.2f} ms: "
        f"{figures['operations'] / 1e9:.2f} GFLOP at the rate of the {SQUARE} square; "
        f"we take {figures['times_floor']:.1f} times that"
    )
    for shape, rate in figures["matmul_rate"].items():
        print(f"  {'product ' + shape:24} {rate / 1e9:9.0f} GFLOP/s")


if __name__ == "__main__":
    benchmarks.define_flags()
    flags.DEFINE_bool("mixed-lengths", False, "Measure completions of many lengths.")
    cli.main(main, cache=False)
