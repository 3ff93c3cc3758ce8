"""Runs of the arms in one world."""

import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import ml_dtypes
import numpy as np
from tqdm import tqdm

from experiments.ablation.arms import MASKS, Arm
from experiments.ablation.work import step_work
from experiments.common.arm_geometry import CONVERT
from experiments.common.compilations import compiled
from experiments.common.evaluation import (
    make_evaluate,
    make_split_accuracy,
    mean_score,
)
from experiments.common.outcome import Outcome, finish, read_outcome
from experiments.common.read_mask import nowhere, read_mask
from experiments.common.tracking import tracked
from experiments.common.workdir import claimed_hash, resolved
from experiments.common.world import World
from geomjax import hosts
from geomjax.data.pipeline import Pipeline
from geomjax.models import hf
from geomjax.objectives import divergence
from geomjax.objectives.base import Objective
from geomjax.objectives.distill import full_vocabulary, sampled_token
from geomjax.optim.build import OptimizerSpec, build
from geomjax.optim.freeze import frozen_paths
from geomjax.optim.given_rate import given_rate
from geomjax.optim.mask_file import save_mask
from geomjax.optim.mask_select import (
    matched_random_mask,
    random_mask,
    threshold_mask,
    top_fraction_mask,
)
from geomjax.optim.roles import path_of
from geomjax.rewards.judge import Judge
from geomjax.train.layout import state_layout
from geomjax.train.loop import Schedule, run
from geomjax.train.profile import parse_steps
from geomjax.train.step import Step, TrainState, init_state, make_distill_step
from geomjax.typing import Params

DIVERGENCES = ("reverse_kl", "forward_kl", "jsd")
OBJECTIVES = ("sampled_token", *DIVERGENCES)
FREE = frozenset(
    {"save_every", "keep_checkpoints", "profile_steps", "export_masters", "tracker"}
)
"""Settings that no result depends on."""


class Mask(NamedTuple):
    """What a masked run trains.

    Attributes:
      tree: Booleans shaped as the parameters, None for frozen ones.
      threshold: The smallest score selected, where scores were compared.
    """

    tree: Any
    threshold: float | None


def make_objective(config: ml_collections.ConfigDict, world: World) -> Objective:
    """The training objective by name.

    Raises:
      ValueError: An unknown name.
    """
    models = world.student.model, world.teacher.model
    temperature = config.temperature
    if config.objective == "sampled_token":
        return sampled_token(*models, temperature=temperature, clip=config.ratio_clip)
    if config.objective == "jsd":
        chosen = divergence.jsd(config.jsd_beta)
    elif config.objective in DIVERGENCES:
        chosen = getattr(divergence, config.objective)
    else:
        raise ValueError(
            f"objective {config.objective!r}; known: {', '.join(OBJECTIVES)}"
        )
    return full_vocabulary(*models, chosen, temperature=temperature)


class Runner:
    """Runs arms in one world, sharing compiled programs between them."""

    def __init__(
        self,
        config: ml_collections.ConfigDict,
        world: World,
        workdir: Path,
        judge: Judge,
    ):
        self.config, self.world, self.workdir = config, world, workdir
        self._judge = judge
        self.roles = hf.roles(world.student.model.config)
        self.schedule = Schedule(
            config.num_steps,
            config.evaluate_every,
            config.save_every,
            config.keep_checkpoints,
            parse_steps(config.profile_steps),
        )
        self._objective = make_objective(config, world)
        self._steps: dict[str, Step] = {}
        self._evaluate = make_evaluate(config, world, judge)
        self._work = step_work(world, config.prompts_per_step)

    def check(self, arms: list[Arm]) -> None:
        """Finds what would stop a later arm before the first one runs.

        Raises:
          ValueError: An unknown optimizer or keyword, a bad schedule, a mask file that
            does not fit, or patterns of frozen parameters that match nothing.
        """
        frozen_paths(self.world.student.params, tuple(self.config.frozen))
        for arm in arms:
            for rate in arm.learning_rates:
                build(self._spec(arm, rate), self.roles)
            if arm.mask not in MASKS:
                self._read_mask(arm.mask)

    def skip_reason(self, arm: Arm) -> str | None:
        """Why an arm cannot be run in this world, or None."""
        if arm.mask != "teacher":
            return None
        teacher = self.world.teacher.params
        shapes = [
            jax.tree.map(jnp.shape, params)
            for params in (self.world.student.params, teacher)
        ]
        if shapes[0] != shapes[1]:
            return "the teacher's parameters have other shapes than the student's"
        threshold = self.config.mask_threshold
        if threshold > 0:
            if any(leaf.any() for leaf in jax.tree.leaves(self._above(teacher))):
                return None
            return (
                "the teacher differs from the student nowhere by more than the "
                f"mask_threshold {threshold:g}"
            )
        leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(self.delta(teacher))]
        size = sum(leaf.size for leaf in leaves)
        share = sum(int(np.count_nonzero(leaf)) for leaf in leaves) / size
        if share < self.config.mask_density:
            return (
                f"the teacher differs from the student in {share:.1%} of the "
                f"coordinates, fewer than the mask_density {self.config.mask_density}"
            )
        return None

    def directory(self, arm: Arm, rate: float, seed: int) -> Path:
        """Folder of one run."""
        return self.workdir / "arms" / arm.name / f"lr_{rate:g}" / f"seed_{seed}"

    def run(
        self,
        arm: Arm,
        rate: float,
        seed: int,
        own: Outcome | None,
        on_step: Callable[[int, dict[str, float]], None],
    ) -> Outcome:
        """Runs, resumes or reads back one run.

        Args:
          arm: The arm.
          rate: The learning rate.
          seed: Seed of prompts, draws and random masks.
          own: The reported run of the `adamw` arm with this seed, for masks made of it.
          on_step: Called after each step, for progress.

        Returns:
          The finished run.

        Raises:
          NonFiniteError: It diverged.
        """
        directory = self.directory(arm, rate, seed)
        outcome = read_outcome(directory, rate, seed)
        if outcome is None:
            self._train(directory, arm, rate, seed, own, on_step)
            outcome = read_outcome(directory, rate, seed)
            assert outcome is not None
        return outcome

    def _train(
        self,
        directory: Path,
        arm: Arm,
        rate: float,
        seed: int,
        own: Outcome | None,
        on_step: Callable[[int, dict[str, float]], None],
    ) -> None:
        config, world = self.config, self.world
        started = time.monotonic()
        mask = self._mask(arm, seed, own)
        tx = given_rate(
            self._spec(arm, rate), self.roles, None if mask is None else mask.tree
        )
        layout = state_layout(world.student.params, tx)
        step = self._step(arm, tx, mask, layout)
        batch_at, batches = world.train_batches(config.prompts_per_step, seed)
        whole = world.student.model.placement.sharding()
        key, given = hosts.put((jax.random.key(seed), np.float32(rate)), whole)

        def advance(state, index):
            batch = batches.put(prompts.at(index))
            draw = jax.random.fold_in(key, hosts.put(np.uint32(index), whole))
            return step(state, world.teacher.params, batch, draw, learning_rate=given)

        state = init_state(world.student.params, tx, layout)
        with Pipeline(batch_at) as prompts, self._tracked(directory) as wrap:
            state = run(
                directory,
                state,
                advance,
                self._evaluate,
                self.schedule,
                wrap(on_step),
                config_hash=claimed_hash(self.workdir, FREE),
                data=prompts,
                work=self._work,
                tell=tqdm.write,
            )
        threshold = None if mask is None else mask.threshold
        trained = self._trained_share(mask)
        if mask is not None:
            self._save_mask(directory / "mask.safetensors", mask, arm, seed)
        finish(
            directory,
            state.params,
            world.student.model.config,
            trained=trained,
            mask_threshold=threshold,
            seconds=time.monotonic() - started,
            input_wait_s=prompts.wait.total_s,
        )

    def _step(
        self, arm: Arm, tx: Any, mask: Mask | None, layout: TrainState | None
    ) -> Step:
        """The program of an optimizer, masked or not: rates and masks are its data."""
        name = arm.optimizer + ("" if mask is None else ", masked")
        if name not in self._steps:
            self._steps[name] = make_distill_step(
                self.world.student.model,
                self._objective,
                tx,
                self.world.sampling,
                mini_batches=self.config.mini_batches,
                micro_batches=self.config.micro_batches,
                layout=layout,
            )
        return self._steps[name]

    def compilations(self) -> dict[str, int]:
        """How often each optimizer's step was compiled in this process."""
        return {f"step {name}": compiled(step) for name, step in self._steps.items()}

    def _tracked(self, directory: Path) -> AbstractContextManager[Any]:
        """Sends a run's metrics to the tracker asked for, named as its folder."""
        name = directory.relative_to(self.workdir / "arms").as_posix()
        return tracked(
            self.config.tracker,
            directory,
            project=self.workdir.absolute().name,
            run=name.replace("/", "-"),
            config=resolved(self.config),
        )

    def teacher_accuracy(self) -> float:
        """The teacher's mean greedy score on the test split."""
        teacher = self.world.teacher
        accuracy = make_split_accuracy(
            self.config, self.world, "test", teacher.model, self._judge
        )
        return mean_score(accuracy(teacher.params))

    def delta(self, params: Params) -> Params:
        """The update from the anchor that masks are made of, frozen ones as None.

        That of the float32 masters; where there is a `mask_threshold`, that of bfloat16
        checkpoints, subtracted in bfloat16: P1's masks are what its sparsity leaves.
        """
        new, old = hosts.fetch((params, self.world.student.params))
        convert = CONVERT["stored" if self.config.mask_threshold > 0 else "master"]

        def subtract(a, b):
            return convert(np.asarray(a)) - convert(np.asarray(b))

        return self._trainable(jax.tree.map(subtract, new, old))

    def _above(self, params: Params) -> Any:
        """Where `delta` exceeds the threshold, rounded as the public script does."""
        threshold = float(ml_dtypes.bfloat16(self.config.mask_threshold))
        return threshold_mask(self.delta(params), threshold)

    def _trainable(self, tree: Params) -> Params:
        frozen = frozen_paths(self.world.student.params, tuple(self.config.frozen))
        return jax.tree_util.tree_map_with_path(
            lambda path, leaf: None if path_of(path) in frozen else leaf, tree
        )

    def _trained_share(self, mask: Mask | None) -> float:
        """Share of all coordinates, frozen ones included, that a run trains."""
        size = sum(leaf.size for leaf in jax.tree.leaves(self.world.student.params))
        if mask is not None:
            return sum(int(leaf.sum()) for leaf in jax.tree.leaves(mask.tree)) / size
        trainable = jax.tree.leaves(self._trainable(self.world.student.params))
        return sum(leaf.size for leaf in trainable) / size

    def _spec(self, arm: Arm, rate: float) -> OptimizerSpec:
        config = self.config
        optimizer = config.optimizers[arm.optimizer]
        return OptimizerSpec(
            name=optimizer.transform,
            learning_rate=rate,
            schedule=config.schedule,
            warmup_steps=config.warmup_steps,
            total_steps=config.num_steps * config.mini_batches,
            clip_norm=optimizer.clip_norm or None,
            frozen=tuple(config.frozen),
            kwargs=optimizer.options.to_dict(),
        )

    def _mask(self, arm: Arm, seed: int, own: Outcome | None) -> Mask | None:
        """The mask of one run, as P1 defines it, by threshold or by density.

        By threshold, `random` takes as many coordinates as the own mask, as in P1.
        """
        density, threshold = self.config.mask_density, self.config.mask_threshold

        def moved(params: Params) -> Mask:
            if threshold > 0:
                selected = self._above(params)
                _require_some(selected, f"arm {arm.name}: mask_threshold {threshold:g}")
                return Mask(selected, threshold)
            scores = jax.tree.map(np.abs, self.delta(params))
            selected = top_fraction_mask(scores, density)
            if selected.threshold == 0:
                raise ValueError(
                    f"arm {arm.name}: fewer than mask_density {density} of the "
                    "coordinates moved at all; lower it, or set mask_threshold"
                )
            return Mask(selected.mask, selected.threshold)

        if arm.mask == "none":
            return None
        if arm.mask not in MASKS:
            return self._read_mask(arm.mask)
        if arm.mask == "teacher":
            return moved(self.world.teacher.params)
        key = jax.random.fold_in(jax.random.key(seed), MASKS.index(arm.mask))
        if arm.mask == "random" and not threshold:
            trainable = self._trainable(self.world.student.params)
            return Mask(random_mask(key, trainable, density), None)
        if own is None:
            raise ValueError(f"arm {arm.name} needs a run of the arm 'adamw'")
        mask = moved(own.params(self.world.student.model.config))
        if arm.mask == "own":
            return mask
        if arm.mask == "random":
            return Mask(random_mask(key, mask.tree, _density(mask.tree)), None)
        return Mask(matched_random_mask(key, mask.tree, self.roles), None)

    def _read_mask(self, path: str) -> Mask:
        """A mask file, its frozen parameters as None.

        Raises:
          CheckpointError: It is damaged, or its tensors are not the student's.
          ValueError: It selects nothing that is trained.
        """
        student = self.world.student
        tree = self._trainable(read_mask(path, student.params, student.model.config))
        _require_some(tree, f"mask file {path}")
        return Mask(tree, None)

    def _save_mask(self, path: Path, mask: Mask, arm: Arm, seed: int) -> None:
        full = jax.tree.map(
            lambda m, none: none if m is None else np.asarray(m),
            mask.tree,
            nowhere(self.world.student.params),
            is_leaf=lambda m: m is None,
        )
        tensors = dict(hf.to_hf(full, self.world.student.model.config))
        provenance = {"arm": arm.name, "seed": str(seed)}
        if mask.threshold is not None:
            provenance["threshold"] = repr(mask.threshold)
        hosts.on_main(lambda: save_mask(path, tensors, provenance=provenance))


def _require_some(mask: Any, name: str) -> None:
    """Raises ValueError if a mask selects nothing: its run would train nothing."""
    if not any(np.asarray(leaf).any() for leaf in jax.tree.leaves(mask)):
        raise ValueError(f"{name} selects no coordinate, so that nothing is trained")


def _density(mask: Any) -> float:
    """The density by which `random_mask` selects as many coordinates as a mask.

    Half a coordinate less than the mask's, since it rounds up.
    """
    leaves = jax.tree.leaves(mask)
    count = sum(int(leaf.sum()) for leaf in leaves)
    return (count - 0.5) / sum(leaf.size for leaf in leaves)
