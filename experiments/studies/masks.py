"""Masks of one seed, by where they are from, and how masks and ends compare."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import ml_dtypes
import numpy as np

from experiments.common.read_mask import read_mask
from experiments.studies.run import Run
from experiments.studies.study import Study
from geomjax import hosts
from geomjax.analysis.overlap import (
    MaskCounts,
    describe,
    overlap,
    summarize_overlap,
)
from geomjax.checkpoints import CheckpointSource, DictSource
from geomjax.models import hf
from geomjax.optim.mask_file import save_mask
from geomjax.optim.mask_select import (
    matched_random_mask,
    random_mask,
    top_fraction_mask,
)
from geomjax.optim.source_mask import SOURCE_RULES, source_mask
from geomjax.typing import Params

MOVED = ("own", "rlvr", "other_teacher", "other_seed")
"""Where a run moved the weights most: the full run of the same kind and seed, RLVR of
this seed, OPD by another teacher, OPD of another seed."""

DRAWN = ("random", "matched_random")
"""Uniformly, and as many in each tensor as the own mask has there."""

RULES = (*MOVED, *DRAWN, *SOURCE_RULES)
"""All kinds of mask; the last are predicted from the source before any training."""

TOLERANCES = (1e-5, 1e-4)
"""Within which stored parameters count as equal (arXiv 2505.11711)."""


class Masks(NamedTuple):
    """What the masks of one seed are made of.

    Attributes:
      study: Its model and roles.
      origin: Parameters before training.
      ends: Parameters after training, by rule of `MOVED`.
      seed: Of what is drawn.
    """

    study: Study
    origin: Params
    ends: Mapping[str, Params]
    seed: int

    def make(self, rule: str, density: float) -> Any:
        """The mask of a rule: booleans shaped as the parameters.

        Masks of one rule and seed are nested: a sparser one lies within a denser one.

        Raises:
          ValueError: An unknown rule, a density out of range, or fewer coordinates
            moved than are asked for.
        """
        key = jax.random.key(self.seed)
        if rule in SOURCE_RULES:
            return source_mask(self.origin, self.study.roles, rule, density)
        if rule in MOVED:
            return self._moved(rule, density)
        if rule == "random":
            return random_mask(jax.random.fold_in(key, 0), self.origin, density)
        if rule == "matched_random":
            own = self._moved("own", density)
            return matched_random_mask(
                jax.random.fold_in(key, 1), own, self.study.roles
            )
        raise ValueError(f"mask {rule!r}; known: {', '.join(RULES)}")

    def _moved(self, rule: str, density: float) -> Any:
        delta = jax.tree.map(
            lambda new, old: np.abs(np.asarray(new) - np.asarray(old)),
            self.ends[rule],
            self.origin,
        )
        selected = top_fraction_mask(delta, density)
        if selected.threshold == 0:
            raise ValueError(
                f"mask {rule}: fewer than {density} of the coordinates moved at all; "
                "lower the density"
            )
        return selected.mask


def mask_of_file(study: Study, path: str | Path) -> Any:
    """A mask file, as `read_mask` reads it."""
    student = study.world.student
    return read_mask(path, student.params, student.model.config)


def mask_path(study: Study, run: Run) -> Path:
    """Where a run's mask is, from before it begins."""
    return study.workdir / run.folder / "mask.safetensors"


def keep_mask(study: Study, run: Run, mask: Any, notes: Mapping[str, str]) -> None:
    """Writes a run's mask, with notes on what it is."""
    path = mask_path(study, run)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_mask(path, tensors_of(study, mask), provenance=notes)


def kept_mask(study: Study, run: Run) -> Any:
    """The mask that process 0 has written for a run."""
    hosts.await_file(mask_path(study, run))
    return mask_of_file(study, mask_path(study, run))


def tensors_of(study: Study, mask: Any) -> dict[str, np.ndarray]:
    """A mask by tensor name."""
    return dict(hf.to_hf(mask, study.world.student.model.config))


def compare_masks(study: Study, a: Any, b: Any) -> dict[str, Any]:
    """Overlap of two masks with its chance levels.

    Beside those of `geomjax.analysis.overlap.describe` there is
    `covered_by_b_chance_per_tensor`: what coordinates drawn at random within every
    tensor, as many as each mask has there, would share. Above the plain chance level,
    it is how far the masks agree on the tensors alone.
    """
    in_b = tensors_of(study, b)
    tensors = []
    for name, mask in tensors_of(study, a).items():
        other = in_b[name]
        tensors.append(
            MaskCounts(
                mask.size, int(mask.sum()), int(other.sum()), int((mask & other).sum())
            )
        )
    total = sum(tensors, MaskCounts(0, 0, 0, 0))
    return describe(total) | chance_within(tensors)


def compare_supports(
    source: CheckpointSource, a: CheckpointSource, b: CheckpointSource
) -> dict[str, Any]:
    """The same of the coordinates that two updates moved by more than 1e-5, stored.

    Args:
      source: The checkpoint that both trainings started from.
      a: The first trained one.
      b: The second.
    """
    rows = overlap(source, a, b)
    counted = [row for row in rows if row["both"] is not None]
    tensors = [
        MaskCounts(row["numel"], row["a"], row["b"], row["both"]) for row in counted
    ]
    return summarize_overlap(rows)["global"] | chance_within(tensors)


def chance_within(tensors: Sequence[MaskCounts]) -> dict[str, float | None]:
    """Coverage of a by b, were both at random in each tensor and as large there."""
    size = sum(counts.a for counts in tensors)
    expected = math.fsum(counts.a * counts.b / counts.numel for counts in tensors)
    return {"covered_by_b_chance_per_tensor": expected / size if size else None}


def stored_source(study: Study, params: Params) -> DictSource:
    """The parameters as a bfloat16 checkpoint holds them."""
    config = study.world.student.model.config
    return DictSource(dict(hf.to_hf(params, config, _stored)))


def agreement(origin: Params, full: Params, other: Params) -> dict[str, float]:
    """How far a run's end is that of the full run.

    Args:
      origin: Parameters before training.
      full: After full training.
      other: After another training.

    Returns:
      `master_equal`, the share of float32 parameters that are the same bits;
      `stored_equal`, that of bfloat16 ones; `stored_within_1e-05` and so on, the share
      that differs by no more; and `distance`, the norm of the difference over that of
      the full update: 0 for the full run itself, 1 for the untouched source.
    """
    bits = close = size = 0
    near = dict.fromkeys(TOLERANCES, 0)
    apart = moved = 0.0
    for w, a, b in zip(*map(jax.tree.leaves, (origin, full, other)), strict=True):
        w, a, b = (np.ascontiguousarray(x, np.float32) for x in (w, a, b))
        size += a.size
        bits += int((a.view(np.uint32) == b.view(np.uint32)).sum())
        a16, b16 = _stored(a), _stored(b)
        close += int((a16.view(np.uint16) == b16.view(np.uint16)).sum())
        gap = np.abs(a16.astype(np.float32) - b16.astype(np.float32))
        for tolerance in TOLERANCES:
            near[tolerance] += int((gap <= np.float32(tolerance)).sum())
        apart += float(np.square(b.astype(np.float64) - a).sum())
        moved += float(np.square(a.astype(np.float64) - w).sum())
    return {
        "master_equal": bits / size,
        "stored_equal": close / size,
        **{f"stored_within_{t:g}": count / size for t, count in near.items()},
        "distance": float(np.sqrt(apart / moved)),
    }


def _stored(array: np.ndarray) -> np.ndarray:
    return array.astype(ml_dtypes.bfloat16)
