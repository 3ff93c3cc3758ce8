"""Tokens per second of forward, prefill and decode passes, against transformers.

    python -m experiments.bench_model [--checkpoint=DIR] [--peer] [--json=FILE]

At batch 8, on a random Qwen3 model (`SHAPE`) or on the checkpoint that is named, all in
one dtype:

    forward   logits of every token of whole sequences
    prefill   the same sequences into a cache, logits of the last token
    decode    32 tokens more, one at a time, each the likeliest

With `--peer`, also transformers' model of the same class, which needs PyTorch: the same
weights from one folder and the same tokens, as many threads as there are cores (or the
GPU, where JAX too has one), the two taking turns in one run.

The time to compile a training step (cross-entropy, AdamW, recomputed blocks) of a model
as deep as Qwen3-8B is measured apart, from shapes alone: `--compile_layers=0` leaves it
out.
"""

import dataclasses
import inspect
import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import flags

from experiments.bench_rollout import peer_versions
from experiments.common import benchmarks, cli
from experiments.common.environment import environment
from geomjax.checkpoints.writer import write_safetensors
from geomjax.models.config import DecoderConfig
from geomjax.models.decoder import Decoder
from geomjax.models.load import (
    Loaded,
    checkpoint_directory,
    load,
    make_decoder,
    new_config_json,
    stored_tensors,
)
from geomjax.objectives.base import Batch
from geomjax.objectives.sft import cross_entropy
from geomjax.train.step import make_update

SHAPE = DecoderConfig(
    architecture="Qwen3ForCausalLM",
    vocab_size=4096,
    hidden_size=512,
    intermediate_size=1536,
    num_layers=8,
    num_heads=8,
    num_kv_heads=4,
    head_dim=64,
    rms_norm_eps=1e-6,
    rope_theta=1e6,
    tie_word_embeddings=False,
    max_position_embeddings=4096,
)
"""The model that is measured where no checkpoint is named: 38 million parameters."""


class Work(NamedTuple):
    """What each pass is given.

    Attributes:
      batch: Rows.
      prompt_tokens: Tokens of each.
      new_tokens: Tokens decoded a row.
      turns: Times that each contestant has its turn.
      calls: Timed calls a turn.
    """

    batch: int = 8
    prompt_tokens: int = 128
    new_tokens: int = 32
    turns: int = 4
    calls: int = 2


def define_flags() -> None:
    """Defines the flags; not at import: experiments can be imported together."""
    benchmarks.define_flags()
    flags.adopt_module_key_flags(benchmarks)
    flags.DEFINE_string("checkpoint", "", "Folder, or name on the hub; a random model.")
    flags.DEFINE_enum(
        "dtype", "float32", ["float32", "bfloat16"], "Of parameters and compute."
    )
    flags.DEFINE_integer(
        "compile_layers", 36, "Depth of the compiled step; 0 for none."
    )


def main() -> None:
    """Measures what the flags ask for and prints it."""
    values = flags.FLAGS
    record: dict[str, Any] = {"environment": environment()}
    if values.peer:
        record["environment"] |= peer_versions()
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder)
        if values.checkpoint:
            directory = checkpoint_directory(values.checkpoint)
        else:
            write_random(directory, SHAPE)
        record |= measure(directory, Work(), values.dtype, peer=values.peer)
    print_figures(record)
    if values.compile_layers:
        seconds = compile_seconds(values.compile_layers)
        record["compile_s"] = {str(values.compile_layers): seconds}
        print(f"compile a step of {values.compile_layers} layers: {seconds:.1f} s")
    benchmarks.write_json(record)


def write_random(directory: Path, config: DecoderConfig) -> None:
    """Writes a random float32 checkpoint."""
    model = make_decoder(config, config.vocab_size)
    params = model.init(jax.random.key(0))
    write_safetensors(directory, stored_tensors(params, model, np.float32))
    (directory / "config.json").write_text(json.dumps(new_config_json(model)))


def measure(directory: Path, work: Work, dtype: str, *, peer: bool) -> dict[str, Any]:
    """Measures the three passes.

    Args:
      directory: The checkpoint.
      work: Batch and lengths.
      dtype: Name of the dtype of parameters and compute.
      peer: Whether to measure transformers too.

    Returns:
      Seconds and tokens per second by pass and contestant; with a peer the ratios.
    """
    loaded = load(directory, param_dtype=jnp.dtype(dtype), dtype=jnp.dtype(dtype))
    generator = np.random.default_rng(0)
    shape = work.batch, work.prompt_tokens
    tokens = generator.integers(0, loaded.model.vocab_size, shape).astype(np.int32)
    contestants = {"ours": our_passes(loaded, tokens, work.new_tokens)}
    if peer:
        contestants["peer"] = peer_passes(directory, tokens, work.new_tokens, dtype)
    figures: dict[str, Any] = {"seconds": {}, "tokens_per_s": {}, "ratio": {}}
    for name in contestants["ours"]:
        runs = {
            who: benchmarks.timed(passes[name]) for who, passes in contestants.items()
        }
        for run in runs.values():
            run()  # Compiles, or warms up.
        seconds = benchmarks.interleaved(runs, turns=work.turns, calls=work.calls)
        count = work.new_tokens if name == "decode" else work.prompt_tokens
        rows = work.batch * count
        figures["seconds"][name] = seconds
        figures["tokens_per_s"][name] = {who: rows / s for who, s in seconds.items()}
        if peer:
            figures["ratio"][name] = seconds["peer"] / seconds["ours"]
    return figures


Pass = Callable[[], Any]


def our_passes(loaded: Loaded, tokens: np.ndarray, new_tokens: int) -> dict[str, Pass]:
    """The three passes by geomjax, jitted."""
    model, params = loaded
    batch, length = tokens.shape
    positions = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), tokens.shape)
    inputs = jnp.asarray(tokens), positions, jnp.ones(tokens.shape, jnp.int32)
    split = jax.jit(model.split_layers)(params)

    def logits(params, hidden):
        head = model.unembedding(params).astype(model.dtype)
        return jnp.einsum("...d,vd->...v", hidden, head, precision=model.precision)

    @jax.jit
    def forward(params):
        return logits(params, model.apply(params, *inputs))

    @jax.jit
    def prefill(params):
        hidden, cache = model.prefill(params, *inputs, length + new_tokens, last=1)
        return logits(params, hidden[:, -1]), cache

    @jax.jit
    def decode(params, token, cache):
        def body(carry, place):
            token, cache = carry
            position = jnp.full(batch, place, jnp.int32)
            ones = jnp.ones(batch, jnp.int32)
            hidden, cache = model.decode(params, token, position, ones, cache)
            token = jnp.argmax(logits(params, hidden), axis=-1).astype(jnp.int32)
            return (token, cache), token

        places = length + jnp.arange(new_tokens, dtype=jnp.int32)
        return jax.lax.scan(body, (token, cache), places)[1]

    first, cache = prefill(split)
    token = jnp.argmax(first, axis=-1).astype(jnp.int32)
    return {
        "forward": lambda: forward(split),
        "prefill": lambda: prefill(split),
        "decode": lambda: decode(split, token, cache),
    }


def peer_passes(
    directory: Path, tokens: np.ndarray, new_tokens: int, dtype: str
) -> dict[str, Pass]:
    """The three passes by transformers, on the GPU where JAX has one too.

    Raises:
      ValueError: JAX has a GPU and PyTorch has not, so that the two cannot compare.
    """
    import torch

    from experiments.peers.transformers_logits import model_class

    torch.set_num_threads(os.cpu_count() or 1)
    on_gpu = jax.default_backend() == "gpu"
    if on_gpu and not torch.cuda.is_available():
        raise ValueError("JAX computes on a GPU and PyTorch cannot; install its CUDA")
    device = "cuda" if on_gpu else "cpu"
    found = model_class(directory)
    if found is None:
        raise ValueError(f"{directory}: transformers has no class of this architecture")
    model = found.from_pretrained(
        directory, dtype=getattr(torch, dtype), trust_remote_code=False
    )
    model = model.to(device).eval()
    inputs = torch.tensor(tokens, dtype=torch.long, device=device)
    length = tokens.shape[1]

    def finished(out: Any) -> Any:
        if on_gpu:
            torch.cuda.synchronize()
        return out

    @torch.inference_mode()
    def forward() -> Any:
        return finished(model(inputs, use_cache=False).logits)

    @torch.inference_mode()
    def prefill() -> Any:
        return finished(model(inputs, use_cache=True, logits_to_keep=1))

    first = prefill()
    # Its name from transformers 5.24 on, and the one before.
    forward_takes = inspect.signature(model.forward).parameters
    name = "cache" if "cache" in forward_takes else "past_key_values"
    cache = first[name]

    @torch.inference_mode()
    def decode() -> Any:
        if cache.get_seq_length() > length:
            cache.crop(length - cache.get_seq_length())
        token = first.logits[:, -1:].argmax(-1)
        chosen = []
        for _ in range(new_tokens):
            out = model(token, use_cache=True, **{name: cache})
            token = out.logits[:, -1:].argmax(-1)
            chosen.append(token)
        return finished(torch.cat(chosen, dim=1))

    return {"forward": forward, "prefill": prefill, "decode": decode}


def compile_seconds(num_layers: int) -> float:
    """Seconds to compile one training step of Qwen3-8B's width at this depth.

    Nothing is allocated: the step is compiled from shapes, for 4 rows of 512 tokens.
    """
    config = dataclasses.replace(
        SHAPE,
        vocab_size=151_936,
        hidden_size=4096,
        intermediate_size=12_288,
        num_layers=num_layers,
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
    )
    model = Decoder(config, config.vocab_size, remat=True)
    tx = optax.adamw(1e-6)
    update = make_update(cross_entropy(model), tx, micro_batches=1)
    integers: Any = jax.ShapeDtypeStruct((4, 512), jnp.int32)
    floats: Any = jax.ShapeDtypeStruct((4, 512), jnp.float32)
    batch = Batch(integers, integers, integers, floats, floats)
    state = jax.eval_shape(tx.init, model.shapes)
    start = time.perf_counter()
    jax.jit(update, donate_argnums=(0, 1)).lower(
        model.shapes, state, {}, batch
    ).compile()
    return time.perf_counter() - start


def print_figures(figures: dict[str, Any]) -> None:
    """Prints a line for each pass."""
    for name, rates in figures["tokens_per_s"].items():
        line = f"{name:8} {rates['ours']:10,.0f} tokens/s"
        if "peer" in rates:
            ratio = figures["ratio"][name]
            line += f"   transformers {rates['peer']:10,.0f}   {ratio:5.2f} times"
        print(line)


if __name__ == "__main__":
    cli.main(main, define_flags, cache=False)
