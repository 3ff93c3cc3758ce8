"""The runs of a study's arms, all of them trained before any is measured.

Several processes train together; process 0 then measures and writes by itself, in
`geomjax.hosts.on_main`, while the others wait.
"""

from collections.abc import Mapping, Sequence

import ml_collections
from tqdm import tqdm

from experiments.common.outcome import Outcome
from experiments.studies.run import FLOAT32, Run
from experiments.studies.study import Start, Study
from geomjax import hosts
from geomjax.train.learn import Controls


def arm_runs(config: ml_collections.ConfigDict) -> dict[str, list[Run]]:
    """The runs of each arm, one a seed; those of a reward learn from it alone."""
    return {
        name: [
            Run(
                name,
                arm.kind,
                arm.learning_rate,
                seed,
                controls=Controls(alpha=0.0 if arm.kind == "reward" else 1.0),
                stored=arm.get("stored", FLOAT32),
            )
            for seed in config.seeds
        ]
        for name, arm in config.arms.items()
    }


def train_arms(
    study: Study, runs: Mapping[str, Sequence[Run]], starts: Mapping[str, Start]
) -> dict[str, list[Outcome]]:
    """Trains all runs, by arm; each arm has its own start."""
    outcomes: dict[str, list[Outcome]] = {}
    with run_bar(sum(map(len, runs.values()))) as bar:
        for name, specs in runs.items():
            outcomes[name] = []
            for spec in specs:
                bar.set_description(f"{name} seed {spec.seed}")
                outcomes[name].append(study.train(spec, starts[name]))
                bar.update()
    return outcomes


def run_bar(total: int) -> tqdm:
    """Progress of so many runs, which process 0 shows."""
    return tqdm(total=total, unit="run", disable=not hosts.is_main())
