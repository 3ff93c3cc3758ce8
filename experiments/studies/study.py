"""Runs of a study in one world, sharing compiled programs between them."""

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax

from experiments.common.compilations import compiled
from experiments.common.evaluation import make_evaluate
from experiments.common.outcome import (
    FINISHED,
    SNAPSHOTS,
    Outcome,
    finish,
    read_outcome,
)
from experiments.common.tracking import tracked
from experiments.common.workdir import resolved
from experiments.common.world import World
from experiments.studies.forms import is_form, is_privileged, make_form
from experiments.studies.rate import require_proportional, with_rate
from experiments.studies.run import FLOAT32, IMITATED, KINDS, STORED, Run
from experiments.studies.sequences import Drawn, Sequences
from geomjax import hosts
from geomjax.checkpoints import SafetensorsSource, write_safetensors
from geomjax.models import hf
from geomjax.models.load import Loaded, load
from geomjax.objectives.base import Objective
from geomjax.objectives.sft import cross_entropy
from geomjax.objectives.surrogate import Clip, policy_gradient
from geomjax.optim.bfloat16 import stored_bfloat16
from geomjax.optim.build import OptimizerSpec, build
from geomjax.rewards.judge import Judge
from geomjax.rollout.sample import Rollout
from geomjax.train.evaluate import Evaluate
from geomjax.train.layout import state_layout
from geomjax.train.learn import (
    Controls,
    PolicyExtras,
    Prepare,
    imitate,
    make_learn,
    policy_signal,
)
from geomjax.train.loop import Schedule
from geomjax.train.loop import run as run_loop
from geomjax.train.step import Step, TrainState, init_state
from geomjax.typing import Params, PRNGKey


class Start(NamedTuple):
    """Where a run starts.

    Attributes:
      params: Parameters, float32, on the host or laid out as the runs'.
      basis: As in `project_updates`, None for all directions.
      mask: As in `coordinate_mask`, a mask for each parameter; None for all
        coordinates. Of a basis and a mask, one stands alone.
      teacher: Parameters of another teacher of the same shapes; None for the world's.
      probe: Figures of the parameters, added to every evaluation.
    """

    params: Params
    basis: Any = None
    mask: Any = None
    teacher: Params | None = None
    probe: Evaluate | None = None


class _Source(NamedTuple):
    """Draws, keys of draws and of chosen tokens, and controls, on the device."""

    draw: Callable[[Params, int, PRNGKey], Drawn]
    keys: tuple[PRNGKey, ...]
    controls: Controls


class Study:
    """Trains runs, and keeps their snapshots.

    Of several processes all take part in every run; process 0 writes.
    """

    def __init__(
        self,
        config: ml_collections.ConfigDict,
        world: World,
        workdir: Path,
        judge: Judge,
    ):
        self.config, self.world, self.workdir = config, world, workdir
        self._judge = judge
        self._whole = world.student.model.placement.sharding()
        self.roles = hf.roles(world.student.model.config)
        if ":" in config.optimizer.transform:  # Not one of ours, which all are.
            require_proportional(
                lambda rate: build(self._spec(rate), self.roles), world.student.params
            )
        self.snapshots = snapshot_steps(config)
        self._evaluate = make_evaluate(config, world, judge)
        self._sequences = Sequences(config, world, judge)
        self._programs: dict[tuple[str, str, str], Step] = {}
        self._sources: dict[Run, _Source] = {}
        self._seconds: dict[str, float] = {}

    def train(
        self,
        run: Run,
        start: Start,
        on_step: Callable[[int, dict[str, float]], None] = lambda step, values: None,
    ) -> Outcome:
        """Runs, resumes or reads back one run.

        Raises:
          NonFiniteError: It diverged.
          ValueError: An unknown kind or storage, or controls out of range.
        """
        directory = self.workdir / run.folder
        outcome = read_outcome(directory, run.learning_rate, run.seed)
        if outcome is None:
            self._train(directory, run, start, on_step)
            outcome = read_outcome(directory, run.learning_rate, run.seed)
            assert outcome is not None
        self._seconds[run.folder] = outcome.seconds
        return outcome

    def snapshot(self, outcome: Outcome, step: int) -> Path:
        """Folder of the float32 parameters that a run had after so many steps."""
        return outcome.directory / SNAPSHOTS / f"step_{step:06d}"

    def snapshot_params(self, outcome: Outcome, step: int) -> Params:
        """Those parameters, of a run that has ended; on the host."""
        hosts.await_file(outcome.directory / FINISHED)
        source = SafetensorsSource(self.snapshot(outcome, step))
        config = self.world.student.model.config
        return hf.from_hf({name: source.read(name) for name in source.keys()}, config)

    def placed(self, params: Params) -> Params:
        """Parameters where those of the runs lie: on the mesh, if there is one."""
        if self._whole is None:
            return params
        student = self.world.student.params
        return hosts.put(params, jax.tree.map(lambda leaf: leaf.sharding, student))

    def on_one_device(self) -> "Study":
        """The same study in one process without a mesh; itself if it is that.

        For what takes one sequence at a time, which a mesh cannot split. Student and
        teacher are read again, each whole onto this process's first device.
        """
        if self._whole is None:
            return self

        def alone(loaded: Loaded) -> Loaded:
            model = loaded.model
            assert loaded.directory is not None
            return load(
                loaded.directory, vocab_size=model.vocab_size, dtype=model.dtype
            )

        world = self.world._replace(
            student=alone(self.world.student), teacher=alone(self.world.teacher)
        )
        return Study(self.config, world, self.workdir, self._judge)

    def seconds(self) -> float:
        """How long all runs trained that were asked for, those read back included."""
        return sum(self._seconds.values())

    def compilations(self) -> dict[str, int]:
        """How often each program was compiled, by name.

        Raises:
          RuntimeError: One was compiled twice: two arms differ in what they should not.
        """
        counts = {f"draw {n}": c for n, c in self._sequences.compilations().items()}
        for (kind, held, stored), program in self._programs.items():
            name = f"learn {kind}" + (f", {held}" if held else "")
            name += "" if stored == FLOAT32 else f", stored by {stored} rounding"
            counts[name] = compiled(program)
        twice = {name: count for name, count in counts.items() if count > 1}
        if twice:
            raise RuntimeError(f"programs that were compiled more than once: {twice}")
        return counts

    def _train(
        self,
        directory: Path,
        run: Run,
        start: Start,
        on_step: Callable[[int, dict[str, float]], None],
    ) -> None:
        run.controls.check()
        started, waited_s = time.monotonic(), self._sequences.waited_s
        params = self.placed(start.params)
        tx = self._transform(run, start)
        layout = state_layout(params, tx)
        learn = self._program(run, tx, start, layout)
        context = self.context(run.kind, start)
        self._source(run)  # Before the loop, which lets nothing move unasked.

        def advance(state: TrainState, index: int):
            step = index + run.first_step
            if step in self.snapshots and step > run.first_step:
                self._save(directory, step, state.params)
            sequences, extras = self.draw(run, state.params, step)
            return learn(state, context, sequences, extras)

        schedule = Schedule(
            self.config.num_steps - run.first_step,
            self.config.evaluate_every,
            self.config.save_every,
        )
        state = init_state(params, tx, layout)
        del params
        evaluate = self._evaluate
        if start.probe is not None:
            evaluate = _both(self._evaluate, start.probe)
        with self._tracked(directory, run) as wrap:
            state = run_loop(
                directory, state, advance, evaluate, schedule, wrap(on_step)
            )
        params = hosts.fetch(state.params)
        self._save(directory, self.config.num_steps, params)
        finish(
            directory,
            params,
            self.world.student.model.config,
            trained=_trained_share(start.mask),
            mask_threshold=None,
            seconds=time.monotonic() - started,
            input_wait_s=self._sequences.waited_s - waited_s,
        )

    def _tracked(self, directory: Path, run: Run) -> AbstractContextManager[Any]:
        """Sends a run's metrics to the tracker asked for, named as its folder."""
        return tracked(
            self.config.tracker,
            directory,
            project=self.workdir.absolute().name,
            run=run.folder.removeprefix("arms/").replace("/", "-"),
            config=resolved(self.config),
        )

    def _save(self, directory: Path, step: int, params: Params) -> None:
        folder = directory / SNAPSHOTS / f"step_{step:06d}"
        config = self.world.student.model.config
        params = hosts.fetch(params)

        def write() -> None:
            write_safetensors(folder, hf.to_hf(params, config))

        hosts.on_main(write)

    def _transform(self, run: Run, start: Start) -> optax.GradientTransformation:
        """The optimizer of a run; what is rounded must be the whole update."""
        if run.stored not in STORED:
            raise ValueError(f"stored {run.stored!r}; known: {', '.join(STORED)}")
        if run.stored != FLOAT32 and start.basis is not None:
            raise ValueError(
                f"run {run.arm}: a basis and {run.stored} rounding exclude each other; "
                "rounded parameters would leave its subspace"
            )
        tx = with_rate(
            run.learning_rate,
            build(self._spec(), self.roles, mask=start.mask, basis=start.basis),
        )
        if run.stored == FLOAT32:
            return tx
        return stored_bfloat16(run.stored, tx, seed=run.seed)

    def _program(
        self, run: Run, tx: Any, start: Start, layout: TrainState | None
    ) -> Step:
        imitates = run.kind in IMITATED
        masked = "masked" if start.mask is not None else ""
        held = "constrained" if start.basis is not None else masked
        key = ("imitate" if imitates else run.kind, held, run.stored)
        if key not in self._programs:
            objective, prepare = self.loss(run.kind)
            self._programs[key] = make_learn(
                objective,
                tx,
                prepare,
                self.world.sampling,
                mini_batches=self.config.mini_batches,
                micro_batches=self.config.micro_batches,
                layout=layout,
            )
        return self._programs[key]

    def loss(self, kind: str) -> tuple[Objective, Prepare]:
        """The objective of a kind of run, and what prepares its rollouts.

        Raises:
          ValueError: An unknown kind.
        """
        student, sampling = self.world.student.model, self.world.sampling
        if is_form(kind):
            slots = self._sequences.privileged_slots if is_privileged(kind) else 0
            teacher = self.world.teacher.model
            form = make_form(kind, student, teacher, sampling.temperature, slots)
            return form, imitate
        if kind not in KINDS:
            raise ValueError(f"kind {kind!r}; known: {', '.join(KINDS)}")
        if kind in IMITATED:
            return cross_entropy(student), imitate
        judge = self.world.teacher.model if _needs_teacher(kind) else None
        # P2 clips the ratio to the teacher's draws at 1.0 instead.
        clip = Clip(1.0, 1.0) if kind == "foreign" else Clip(*self.config.ratio_clip)
        return (
            policy_gradient(student, temperature=sampling.temperature, clip=clip),
            policy_signal(student, judge, sampling, on_policy=kind != "foreign"),
        )

    def context(self, kind: str, start: Start | None = None) -> Params:
        """Parameters of what a run learns from; none if that is no model.

        Args:
          kind: Its kind.
          start: May name another teacher than the world's.
        """
        if is_privileged(kind):
            return self.world.student.params
        if not _needs_teacher(kind):
            return {}
        if start is None or start.teacher is None:
            return self.world.teacher.params
        return start.teacher

    def draw(self, run: Run, params: Params, step: int) -> tuple[Rollout, Any]:
        """The sequences of a step of a run, and what `prepare` takes beside them."""
        source = self._source(run)
        index = hosts.put(np.uint32(step), self._whole)
        draw_key, token_key = (jax.random.fold_in(k, index) for k in source.keys)
        rollout, rewards, known = source.draw(params, step, draw_key)
        if run.kind in IMITATED:
            return rollout, ()
        return rollout, PolicyExtras(rewards, source.controls, token_key, known)

    def _source(self, run: Run) -> "_Source":
        """What a run draws from, made once: in a step nothing may move unasked."""
        if run not in self._sources:
            keys = tuple(jax.random.split(jax.random.key(run.seed)))
            controls = jax.tree.map(jnp.asarray, run.controls)
            self._sources[run] = _Source(
                self._sequences.make(run.kind, run.seed),
                *hosts.put((keys, controls), self._whole),
            )
        return self._sources[run]

    def _spec(self, rate: float = 1.0) -> OptimizerSpec:
        optimizer = self.config.optimizer
        return OptimizerSpec(
            name=optimizer.transform,
            learning_rate=rate,  # `with_rate` scales it.
            clip_norm=optimizer.clip_norm or None,
            kwargs=optimizer.options.to_dict(),
        )


def _both(first: Evaluate, second: Evaluate) -> Evaluate:
    return lambda params: {**first(params), **second(params)}


def _trained_share(mask: Any) -> float:
    leaves = jax.tree.leaves(mask)
    if not leaves:
        return 1.0
    return sum(int(np.sum(leaf)) for leaf in leaves) / sum(leaf.size for leaf in leaves)


def _needs_teacher(kind: str) -> bool:
    return kind in ("distill", "foreign") or is_form(kind)


def snapshot_steps(config: ml_collections.ConfigDict) -> tuple[int, ...]:
    """Steps at which parameters are kept, from `snapshot_shares` of the run.

    The last step is always one.

    Raises:
      ValueError: A share outside (0, 1].
    """
    shares: Sequence[float] = tuple(config.snapshot_shares)
    if any(not 0 < share <= 1 for share in shares):
        raise ValueError(f"snapshot_shares are {shares}; expected above 0, at most 1")
    steps = {max(1, round(share * config.num_steps)) for share in shares}
    return tuple(sorted(steps | {config.num_steps}))
