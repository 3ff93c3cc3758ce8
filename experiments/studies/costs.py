"""What a token costs under each form of a loss, and noise at equal cost."""

from collections.abc import Mapping

import jax

from experiments.studies.moments import Moments, mean_figure
from experiments.studies.run import Run
from experiments.studies.study import Study
from geomjax.analysis.report import Cell, Column, Estimate, Table
from geomjax.jaxpr_flops import matmul_flops
from geomjax.train.step import mini_batch


def measure_costs(study: Study, kinds: Mapping[str, str]) -> dict[str, float]:
    """Operations of a completion slot, by arm.

    Those of the matrix products of scoring, loss and gradient, counted in the traced
    program: student forward and backward, teacher forward, and what the form adds. The
    draw, which is the same for all forms, and the optimizer are left out. A rollout is
    drawn for its shapes; nothing is trained, and no gradient is compiled. In process 0
    alone, as the report is.

    Args:
      study: Where the arms run.
      kinds: Arm -> kind of its runs.
    """
    alone = study.on_one_device()
    return {name: _flops_per_token(alone, kind) for name, kind in kinds.items()}


def _flops_per_token(study: Study, kind: str) -> float:
    """The count of one arm, of the first rollout's shapes."""
    objective, prepare = study.loss(kind)
    params, last = study.world.student.params, study.world.sampling.max_new_tokens
    rollout, extras = study.draw(Run("cost", kind, 1.0, 0), params, 0)

    def gradient(params, context, rollout, extras):
        signal = prepare(params, context, rollout, extras)
        drawn = rollout._replace(completion=signal.targets)
        batch = mini_batch(drawn, last)._replace(advantages=signal.advantages)
        return jax.grad(objective, has_aux=True)(params, context, batch)[0]

    traced = jax.make_jaxpr(gradient)(params, study.context(kind), rollout, extras)
    return matmul_flops(traced) / (rollout.tokens.shape[0] * last)


def cost_table(moments: Moments, costs: Mapping[str, float], reference: str) -> Table:
    """Noise of equally many tokens, and of equally many operations.

    Args:
      moments: Figures of the arms.
      costs: From `measure_costs`.
      reference: The arm whose cost is 1.
    """
    columns = [
        Column("arm", align="left"),
        Column("Mflop a token", spec=".3f"),
        Column("cost", spec=".2f"),
        Column("noise to signal", spec=".3g"),
        Column("times cost", spec=".3g"),
    ]
    rows: list[list[Cell]] = []
    for name, flops in costs.items():
        cost = flops / costs[reference]
        noise = [x for x in mean_figure(moments, name, "noise_to_signal") if x]
        rows.append(
            [
                name,
                flops / 1e6,
                cost,
                Estimate.from_samples(noise),
                Estimate.from_samples([cost * x for x in noise]),
            ]
        )
    return Table(
        columns,
        rows,
        "Noise to signal is that of one token, means over the matrices above; the mean "
        "of N independent tokens has 1/N of it. Cost: operations of a completion token "
        f"in the matrix products of scoring, loss and gradient, {reference} being 1; "
        "times cost, the noise of what the same operations buy. Drawing the tokens, "
        "which costs every form the same, is left out: counted in, the costs lie "
        "closer together.",
    )
