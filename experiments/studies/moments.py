"""The second moment of the per-token gradients of a run's first step."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from tqdm import tqdm

from experiments.studies.run import Run
from experiments.studies.study import Study
from geomjax import hosts
from geomjax.analysis.report import Cell, Column, Estimate, Table
from geomjax.geometry.second_moment import SecondMoment, alignment, second_moment
from geomjax.models import hf
from geomjax.objectives.token_gradients import token_gradients
from geomjax.rollout.sample import Rollout
from geomjax.train.step import mini_batch
from geomjax.typing import Params

DIRECTIONS = 16


class Matrix(NamedTuple):
    """A matrix of the model: the path of its leaf and its place in the stack."""

    path: tuple[str, ...]
    place: tuple[int, ...]

    @property
    def name(self) -> str:
        """As tables show it."""
        return ".".join((*self.path[:-1], *map(str, self.place)))


def read_matrices(config: ml_collections.ConfigDict, study: Study) -> list[Matrix]:
    """The matrices of `config.moment_matrices`, written as `layers.mlp.up_proj:LAYER`.

    Raises:
      ValueError: One is no matrix of the model.
    """
    found = []
    for text in config.moment_matrices:
        name, _, layer = text.partition(":")
        path = (*name.split("."), "weight")
        role = study.roles.get(path)
        layers = 0
        if role is not None and role.stack_depth == 1:
            layers = hf.leaf(study.world.student.params, path).shape[0]
        if (
            role is None
            or role.kind != "matrix"
            or not layer.isdigit()
            or (int(layer) >= layers)
        ):
            raise ValueError(
                f"moment_matrices: {text!r} is no matrix of the model; expected such "
                "as layers.mlp.up_proj:0"
            )
        found.append(Matrix(path, (int(layer),)))
    return found


class TokenGradients:
    """Per-token gradients at the anchor; kinds of runs share programs."""

    def __init__(self, study: Study):
        self._study = study
        self._programs: dict[tuple[str, Matrix], Any] = {}

    def __call__(self, run: Run, matrix: Matrix) -> np.ndarray:
        """The gradients of a run's first step, `[N, m n]`, of tokens with weight.

        Those of the objective as the first update would take them, importance ratios
        and advantages included; tokens that sparsification drops are zero and stay in.
        """
        world = self._study.world
        key = run.kind, matrix
        if key not in self._programs:
            self._programs[key] = self._make(run.kind, matrix)
        params = world.student.params
        drawn = self._study.draw(run, params, 0)
        found = self._programs[key](params, self._study.context(run.kind), *drawn)
        each, used = jax.device_get(found)
        return np.asarray(each, np.float64)[np.asarray(used)]

    def _make(self, kind: str, matrix: Matrix) -> Any:
        objective, prepare = self._study.loss(kind)
        last = self._study.world.sampling.max_new_tokens

        @jax.jit
        def compute(params: Params, context: Params, rollout: Rollout, extras: Any):
            signal = prepare(params, context, rollout, extras)
            drawn = rollout._replace(completion=signal.targets)
            batch = mini_batch(drawn, last)._replace(advantages=signal.advantages)
            each = token_gradients(
                objective, params, context, batch, matrix.path, matrix.place
            )
            return each.reshape(each.shape[0], -1), batch.weights.reshape(-1) != 0

        return compute


def figures(
    reference: np.ndarray, each: np.ndarray, directions: int = DIRECTIONS
) -> dict[str, float | None]:
    """Figures of one second moment, and its alignment with a reference, in float64.

    Args:
      reference: `[M, d]` gradients to compare with.
      each: `[N, d]` gradients.
      directions: Leading directions that are compared.

    Returns:
      `tokens`, `mean_square`, `variance`, `noise_to_signal`, `participation`,
      `top_share`, `alignment` and its `chance`. The noise to signal is the variance of
      one token over the squared norm of the expected gradient, each by its unbiased
      estimate for independent tokens: the squared norm of the mean of N gradients is
      too large by 1/N of the variance, and would keep the ratio below N. None where
      the estimated signal is not above 0.
    """
    k = min(directions, len(each), len(reference))
    if k == 0 or not each.any():
        return {"tokens": float(len(each)), "chance": directions / reference.shape[1]}
    with jax.enable_x64(True):
        ours, theirs = jnp.asarray(each), jnp.asarray(reference)
        moment = second_moment(ours)
        values = {
            "tokens": float(len(each)),
            "mean_square": moment.mean_square,
            "variance": moment.variance,
            "noise_to_signal": _noise_to_signal(moment, len(each)),
            "participation": moment.participation,
            "top_share": moment.top_share(k),
            "alignment": alignment(ours, theirs, moment, second_moment(theirs), k),
            "chance": k / each.shape[1],
        }
        numbers = {name: float(value) for name, value in values.items()}
    return {n: v if np.isfinite(v) else None for n, v in numbers.items()}


def _noise_to_signal(moment: SecondMoment, tokens: int) -> float:
    if tokens < 2:
        return np.nan
    variance = float(moment.variance) * tokens / (tokens - 1)
    signal = float(moment.square_of_mean) - variance / tokens
    return variance / signal if signal > 0 else np.nan


Moments = dict[str, dict[str, list[dict[str, float | None]]]]
"""Arm -> matrix -> figures of each seed."""


def measure_moments(
    study: Study, specs: dict[str, list[Run]], matrices: list[Matrix], reference: str
) -> Moments:
    """Figures of the second moments at the anchor, for every control, matrix and seed.

    Empty without matrices. Taken in process 0, on one device: where there is a mesh,
    which cannot split a single sequence, student and teacher must fit that device
    beside their parts on the mesh.

    The reference's own leading directions are those of another rollout than the one
    compared, so that its alignment with itself is what sampling noise leaves of 1.
    """
    if not matrices:
        return {}
    return hosts.on_main(
        lambda: _measure(study.on_one_device(), specs, matrices, reference)
    )


def _measure(
    study: Study, specs: dict[str, list[Run]], matrices: list[Matrix], reference: str
) -> Moments:
    found: Moments = {}
    gradients = TokenGradients(study)
    total = len(specs) * len(matrices)
    with tqdm(total=total, desc="second moments", unit="matrix") as bar:
        for matrix in matrices:
            references = {
                spec.seed: gradients(spec._replace(seed=spec.seed + 1_000_000), matrix)
                for spec in specs[reference]
            }
            for name, runs in specs.items():
                found.setdefault(name, {})[matrix.name] = [
                    figures(references[spec.seed], gradients(spec, matrix))
                    for spec in runs
                ]
                bar.update()
    return found


MOMENT_COLUMNS = {
    "tokens": ("tokens", ".0f"),
    "mean square": ("mean_square", ".2e"),
    "noise to signal": ("noise_to_signal", ".3g"),
    "directions": ("participation", ".1f"),
    "top-16 share": ("top_share", ".1%"),
    "alignment with {}": ("alignment", ".1%"),
    "its chance level": ("chance", ".1%"),
}
"""Heading -> figure and format."""


def moments_table(moments: Moments, reference: str) -> Table:
    """Figures of the second moments, a row an arm and matrix.

    Args:
      moments: The figures.
      reference: What to call the arm that the others are compared with.
    """
    columns = [Column("matrix", align="left"), Column("arm", align="left")]
    columns += [
        Column(title.format(reference), spec=spec)
        for title, (_, spec) in MOMENT_COLUMNS.items()
    ]
    rows: list[list[Cell]] = []
    for matrix in next(iter(moments.values())):
        for arm, by_matrix in moments.items():
            found = by_matrix[matrix]
            cells: list[Cell] = [
                Estimate.from_samples([f.get(n) for f in found])
                for n, _ in MOMENT_COLUMNS.values()
            ]
            rows.append([matrix, arm, *cells])
    return Table(
        columns,
        rows,
        "Of the gradients that single tokens give to one matrix, at the anchor, on the "
        "first rollout of each run; means over seeds ± 95 % Student half widths. "
        "Tokens: those with weight, under a reward alone those of groups with "
        "contrast; leading directions of fewer tokens are noisier, and align less. "
        "Noise to signal: variance over the squared norm of the expected gradient, "
        "unbiased for independent tokens; seeds whose mean is within its own noise "
        "are left out. Directions: "
        "tr(M)^2 / tr(M^2) of M = E[g g^T]. Alignment: of the 16 leading directions "
        f"with those of {reference} on another rollout.",
    )


def moments_section(
    heading: str, moments: Moments, reference: str
) -> dict[str, list[Table]]:
    """The section of a report with their table; none where no matrix was measured."""
    return {heading: [moments_table(moments, reference)]} if moments else {}


def mean_figure(moments: Moments, arm: str, figure: str) -> list[float | None]:
    """Mean of a figure over the matrices, one a seed; None where one lacks it."""
    by_matrix = [[f.get(figure) for f in found] for found in moments[arm].values()]
    return [
        None if None in seeds else float(np.mean([float(x or 0) for x in seeds]))
        for seeds in zip(*by_matrix, strict=True)
    ]
