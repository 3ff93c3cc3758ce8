"""Seconds of one whole distillation step, against TRL's DistillationTrainer.

    python -m experiments.bench_training [--json=FILE]
    python -m experiments.bench_training --peer --peer_python=TRL/bin/python

A step is a rollout, the teacher's scores, the reverse KL over the whole vocabulary, and
an update by AdamW with clipping at a global norm of 1, in float32, at the two sizes of
`experiments.common.benchmarks.SIZES`. Its parts are also timed, each jitted apart.

With `--peer`, TRL's trainer takes the same steps in a process of its own
(`experiments/peers/trl_distillation.py`): same weights, prompts, batch, tokens and
optimizer, every batch sampled anew, reverse KL (TRL's beta = 1). It does so twice: as
it comes, that is with its own defaults for gradient checkpointing and bfloat16, and set
for this machine, with neither. Each says which settings were in force. All take turns,
and warm-up steps do not count. TRL is no dependency of this project; make it an
environment and name that one's interpreter:

    python -m venv TRL
    TRL/bin/pip install torch
    TRL/bin/pip install "trl>=1.16" accelerate datasets transformers

The peak of memory is each process's own, Python and libraries included. Ours is that of
all sizes up to the one it stands beside, and of the parts that are timed apart.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import jax
from absl import flags

from experiments.common import benchmarks, cli
from experiments.common.benchmarks import SIZES, SQUARE, Size
from experiments.common.environment import environment
from geomjax.models import hf
from geomjax.models.load import Loaded, load
from geomjax.objectives.base import Batch
from geomjax.objectives.distill import full_vocabulary
from geomjax.objectives.divergence import reverse_kl
from geomjax.objectives.vocabulary import logits
from geomjax.optim.build import OptimizerSpec, build
from geomjax.train.step import (
    Sampling,
    init_state,
    make_distill_step,
    make_update,
    mini_batch,
    rollout,
)

LEARNING_RATE = 1e-5
PEERS = {"peer_as_it_comes": "default", "peer_set_for_this_machine": "cpu"}
"""Contestants of TRL, with the `--settings` of their processes."""
PEER_SCRIPT = Path(__file__).parent / "peers" / "trl_distillation.py"


class Peer:
    """TRL's trainer in a process of its own, a step at a time."""

    def __init__(self, process: subprocess.Popen[str], log: Path):
        self.process = process
        self.log = log
        started = self.receive()
        self.versions, self.settings = started["versions"], started["settings"]
        self.peak_memory_mib = 0.0

    def receive(self) -> dict[str, Any]:
        """The process's next message.

        Raises:
          ValueError: It has ended; the end of what it printed is shown.
        """
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            tail = "\n".join(self.log.read_text().splitlines()[-15:])
            raise ValueError(
                "the peer's process has ended; --peer_python must be an interpreter "
                f"whose environment has TRL (see this module's docstring):\n{tail}"
            )
        message: dict[str, Any] = json.loads(line)
        return message

    def step(self) -> float:
        """Takes one step and returns its seconds."""
        assert self.process.stdin is not None
        self.process.stdin.write("step\n")
        self.process.stdin.flush()
        report = self.receive()
        self.peak_memory_mib = report["peak_memory_mib"]
        return float(report["seconds"])


@contextmanager
def running_peer(
    python: str, folder: Path, size: Size, settings: str
) -> Iterator[Peer]:
    """Runs TRL on the checkpoints `student` and `teacher` in `folder`.

    Args:
      python: Interpreter of an environment with TRL.
      folder: The checkpoints; prompts and the peer's log are written there.
      size: Model and batch.
      settings: A value of `PEERS`.
    """
    (folder / "prompts.json").write_text(json.dumps(benchmarks.prompt_texts(size)))
    arguments = {
        "student": folder / "student",
        "teacher": folder / "teacher",
        "prompts": folder / "prompts.json",
        "new_tokens": size.new_tokens,
        "learning_rate": LEARNING_RATE,
        "settings": settings,
    }
    log = folder / f"peer_{settings}.log"
    with (
        log.open("w") as errors,
        subprocess.Popen(
            [python, str(PEER_SCRIPT), *(f"--{k}={v}" for k, v in arguments.items())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        ) as process,
    ):
        try:
            yield Peer(process, log)
        finally:
            process.kill()


def main() -> None:
    """Measures both sizes and prints a table."""
    python = flags.FLAGS.peer_python if flags.FLAGS.peer else None
    record: dict[str, Any] = {"sizes": {}, "environment": environment()}
    for name, size in SIZES.items():
        figures = record["sizes"][name] = measure(size, peer_python=python)
        print_figures(name, size, figures)
    benchmarks.write_json(record)


def measure(size: Size, *, peer_python: str | None) -> dict[str, Any]:
    """Measures one size.

    Args:
      size: Model and batch.
      peer_python: Interpreter of an environment with TRL, or None for no peer.

    Returns:
      Seconds of a step and of its parts, peak memories, and the floor; with a peer also
      its versions and settings, and a ratio for each of `PEERS`.

    Raises:
      ValueError: The peer does not run.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for seed, role in enumerate(("student", "teacher")):
            (folder / role).mkdir()
            benchmarks.write_checkpoint(folder / role, size, seed)
        student, teacher = load(folder / "student"), load(folder / "teacher")
        ours = contestants(student, teacher, size)
        step = benchmarks.timed(ours.pop("step"))
        first_call = step()
        runs, peers = {"ours": step}, {}
        with ExitStack() as stack:
            for contestant, settings in PEERS.items():
                if not peer_python:
                    continue
                running = running_peer(peer_python, folder, size, settings)
                peers[contestant] = stack.enter_context(running)
                runs[contestant] = peers[contestant].step
                peers[contestant].step()
            seconds = benchmarks.interleaved(runs, turns=size.turns, calls=size.calls)
            memory = {"ours": benchmarks.peak_memory_mib()} | {
                contestant: peer.peak_memory_mib for contestant, peer in peers.items()
            }
    parts = {name: benchmarks.timed(part) for name, part in ours.items()}
    for part in parts.values():
        part()
    rate = benchmarks.matmul_rate(SQUARE, SQUARE, SQUARE)
    operations = benchmarks.step_operations(size)
    floor = operations / rate
    figures = {
        "seconds": seconds,
        "parts_s": benchmarks.interleaved(parts, turns=size.turns, calls=size.calls),
        "first_call_s": first_call,
        "peak_memory_mib": memory,
        "operations": operations,
        "matmul_rate": {"square": rate},
        "floor_s": floor,
        "times_floor": seconds["ours"] / floor,
        "peers": {
            contestant: {"versions": peer.versions, "settings": peer.settings}
            for contestant, peer in peers.items()
        },
        "ratio": {name: seconds[name] / seconds["ours"] for name in peers},
    }
    return figures


def contestants(
    student: Loaded, teacher: Loaded, size: Size
) -> dict[str, Callable[[], Any]]:
    """The whole step, and its parts jitted apart, as functions without arguments."""
    sampling = Sampling(
        samples_per_prompt=1,
        max_new_tokens=size.new_tokens,
        temperature=1.0,
        stop_tokens=(),
        pad_token=0,
    )
    spec = OptimizerSpec(name="adamw", learning_rate=LEARNING_RATE, clip_norm=1.0)
    tx = build(spec, hf.roles(student.model.config))
    objective = full_vocabulary(
        student.model, teacher.model, reverse_kl, temperature=1.0
    )
    step = make_distill_step(student.model, objective, tx, sampling, mini_batches=1)
    prompts = jax.device_put(benchmarks.prompt_batch(size))
    keys = iter(jax.random.split(jax.random.key(0), 10_000))
    state = init_state(student.params, tx)

    def whole() -> Any:
        nonlocal state
        state, metrics = step(state, teacher.params, prompts, next(keys))
        return state, metrics

    def score(params: Any, batch: Batch) -> Any:
        hidden = teacher.model.apply(
            params, batch.tokens, batch.positions, batch.segment_ids
        )
        head = teacher.model.unembedding(params)
        flat = hidden.reshape(-1, hidden.shape[-1])
        return jax.nn.log_softmax(logits(teacher.model, head, flat, 1.0))

    jitted_rollout = jax.jit(
        lambda params, key: rollout(student.model, params, prompts, key, sampling)
    )
    jitted_score = jax.jit(score)
    update = jax.jit(make_update(objective, tx, micro_batches=1))
    batch = mini_batch(jitted_rollout(student.params, next(keys)), size.new_tokens)
    opt_state = tx.init(student.params)
    return {
        "step": whole,
        "rollout": lambda: jitted_rollout(student.params, next(keys)),
        "teacher scoring": lambda: jitted_score(teacher.params, batch),
        "update, scoring included": lambda: update(
            student.params, opt_state, teacher.params, batch
        ),
    }


def print_figures(name: str, size: Size, figures: dict[str, Any]) -> None:
    """Prints what was measured at one size."""
    print(
        f"\n{name}: width {size.hidden_size}, {size.num_layers} layers, batch "
        f"{size.batch}, prompt {size.prompt_tokens}, {size.new_tokens} new tokens"
    )
    labels = {"ours": "geomjax step"}
    for who, peer in figures["peers"].items():
        how = who.removeprefix("peer_").replace("_", " ")
        labels[who] = f"TRL {peer['versions']['trl']} {how}"
    for who, label in labels.items():
        print(
            f"  {label:34} {1e3 * figures['seconds'][who]:9.1f} ms  peak memory "
            f"{figures['peak_memory_mib'][who]:6,.0f} MiB"
        )
        if who in figures["peers"]:
            settings = figures["peers"][who]["settings"].items()
            print("    " + ", ".join(f"{name}={value}" for name, value in settings))
            print(f"    we are {figures['ratio'][who]:.1f} times faster")
    for part, seconds in figures["parts_s"].items():
        print(f"  {'  ' + part:34} {1e3 * seconds:9.1f} ms")
    print(f"  {'first call (compiles)':34} {figures['first_call_s']:9.1f} s")
    print(
        f"  {'floor':34} {1e3 * figures['floor_s']:9.1f} ms: "
        f"{figures['operations'] / 1e9:.2f} GFLOP at the {SQUARE} square's "
        f"{figures['matmul_rate']['square'] / 1e9:.0f} GFLOP/s; we take "
        f"{figures['times_floor']:.1f} times that"
    )


if __name__ == "__main__":
    benchmarks.define_flags()
    flags.DEFINE_string(
        "peer_python", sys.executable, "Interpreter of an environment with TRL."
    )
    cli.main(main, cache=False)
