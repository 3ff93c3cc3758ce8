"""Host memory while a checkpoint is read onto a mesh, against its bound.

    python -m experiments.bench_loading [--gigabytes=2] [--mesh=fsdp=8] [--json=FILE]

writes a random bfloat16 checkpoint of Qwen3's shapes in files of `--shard_megabytes`,
and reads it in a process of its own, whose CPU stands for as many devices as the mesh
has. What that process holds at its peak, beyond what it held before and what its
devices hold in the end, is the cost of reading. It should stay within the largest
stacked parameter and one file of the checkpoint, whose pages are mapped. The exit
status is 2 where it does not.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import ml_dtypes
import numpy as np
from absl import flags

from experiments.common import cli
from experiments.common.environment import environment
from geomjax.checkpoints.writer import write_safetensors
from geomjax.models import hf
from geomjax.models.config import DecoderConfig
from geomjax.models.decoder import Decoder
from geomjax.models.load import make_decoder, new_config_json

EXCEEDED_STATUS = 2
SLACK = 64 << 20
"""Bytes that the allocator, threads and compiled copies may take besides."""

CHILD = """
import json, sys
from pathlib import Path
import jax
import ml_dtypes
from experiments.bench_loading import status
from geomjax.meshes import Placement, mesh_from_string
from geomjax.models.load import load
placement = Placement(mesh_from_string(sys.argv[2]))
jax.block_until_ready(jax.device_put(0.0))
Path("/proc/self/clear_refs").write_text("5")  # The peak begins anew.
before = status("VmRSS")
loaded = load(sys.argv[1], placement=placement, param_dtype=ml_dtypes.bfloat16)
peak = status("VmHWM")
shards = [s for x in jax.tree.leaves(loaded.params) for s in x.addressable_shards]
print(json.dumps([before, peak, sum(s.data.nbytes for s in shards)]))
"""


class Figures(NamedTuple):
    """What reading took, in bytes.

    Attributes:
      checkpoint: Size of the tensors.
      devices: What the devices hold in the end, copies included.
      peak: Most that the process held beyond what it held before.
      extra: Of that, what the devices do not hold.
      bound: The largest stacked parameter and the largest file.
    """

    checkpoint: int
    devices: int
    peak: int
    extra: int
    bound: int

    @property
    def within(self) -> bool:
        """Whether the bound holds."""
        return self.extra <= self.bound + SLACK


def define_flags() -> None:
    """Defines the flags; not at import: experiments can be imported together."""
    flags.DEFINE_float("gigabytes", 2.0, "Size of the checkpoint.", lower_bound=0.01)
    flags.DEFINE_integer("shard_megabytes", 500, "Size of its files.", lower_bound=1)
    flags.DEFINE_string("mesh", "fsdp=8", "Axes and sizes, as everywhere.")
    flags.DEFINE_string("json", "", "File to write the figures to.")


def main() -> None:
    """Measures what the flags ask for and prints it."""
    values = flags.FLAGS
    config = sized(values.gigabytes)
    figures = measure(config, values.mesh, values.shard_megabytes << 20)
    for name, count in figures._asdict().items():
        print(f"{name:10} {count / 1e9:6.2f} GB")
    print("within the bound" if figures.within else "ABOVE THE BOUND")
    if values.json:
        record = {"figures": figures._asdict(), "environment": environment()}
        Path(values.json).write_text(json.dumps(record, indent=2) + "\n")
    if not figures.within:
        sys.exit(EXCEEDED_STATUS)


def sized(gigabytes: float) -> DecoderConfig:
    """A Qwen3 whose bfloat16 tensors have about this size, a third in embeddings."""
    width = 1024 if gigabytes >= 1 else 256
    parameters = gigabytes * 1e9 / 2
    layer = 2 * 3 * width**2 + 3 * 3 * width**2
    return DecoderConfig(
        architecture="Qwen3ForCausalLM",
        vocab_size=max(round(parameters / 6 / width) // 64, 1) * 64,
        hidden_size=width,
        intermediate_size=3 * width,
        num_layers=max(round(parameters * 2 / 3 / layer), 1),
        num_heads=2 * width // 128,
        num_kv_heads=width // 128,
        head_dim=128,
        rms_norm_eps=1e-6,
        rope_theta=1e6,
        tie_word_embeddings=False,
        max_position_embeddings=4096,
    )


def measure(config: DecoderConfig, mesh: str, shard_bytes: int) -> Figures:
    """Writes a checkpoint and reads it in a process of its own.

    Args:
      config: Its shapes.
      mesh: Where to read it.
      shard_bytes: Size of its files.

    Returns:
      The figures.

    Raises:
      ValueError: The process failed; says how.
    """
    model = make_decoder(config, config.vocab_size)
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder)
        write_safetensors(directory, random_tensors(model), max_shard_bytes=shard_bytes)
        (directory / "config.json").write_text(json.dumps(new_config_json(model)))
        largest = max(path.stat().st_size for path in directory.glob("*.safetensors"))
        before, peak, devices = _in_child(directory, mesh)
    sizes = [2 * leaf.size for leaf in jax.tree.leaves(model.shapes)]
    return Figures(
        checkpoint=sum(sizes),
        devices=devices,
        peak=peak - before,
        extra=peak - before - devices,
        bound=max(sizes) + largest,
    )


def random_tensors(model: Decoder) -> Iterator[tuple[str, np.ndarray]]:
    """Tensors of a checkpoint, one at a time; one block of random numbers, repeated."""
    block = np.random.default_rng(0).standard_normal(1 << 20).astype(ml_dtypes.bfloat16)
    for rule in hf.rules(model.config):
        shape = hf.leaf(model.shapes, rule.path).shape[rule.role.stack_depth :]
        for name in rule.names(model.config):
            yield name, np.resize(block, shape)


def status(field: str) -> int:
    """A field of this process's account in /proc, in bytes."""
    text = Path("/proc/self/status").read_text()
    found = re.search(rf"^{field}:\s+(\d+) kB$", text, re.M)
    if found is None:
        raise ValueError(f"/proc/self/status has no {field}; this needs Linux")
    return int(found[1]) * 1024


def _in_child(directory: Path, mesh: str) -> tuple[int, int, int]:
    """Resident memory before and at the peak, and the devices' bytes."""
    count = np.prod([int(size) for size in re.findall(r"=(\d+)", mesh)], dtype=int)
    given = {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={count}",
    }
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(directory), mesh],
        env=os.environ | given,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise ValueError(f"reading failed:\n{done.stderr[-2000:]}")
    found: Any = json.loads(done.stdout.splitlines()[-1])
    before, peak, devices = found
    return before, peak, devices


if __name__ == "__main__":
    cli.main(main, define_flags)
