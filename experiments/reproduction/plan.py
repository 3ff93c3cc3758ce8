"""Which studies the reproduction runs, in which order and with which configuration."""

import importlib
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import ml_collections

from experiments.ablation.runner import FREE as FREE_IN_ABLATION
from experiments.common import workdir as workdirs
from experiments.studies import worlds
from experiments.studies.launch import FREE as FREE_IN_STUDIES

FREE = FREE_IN_ABLATION | FREE_IN_STUDIES


class Entry(NamedTuple):
    """One study of the lot.

    Attributes:
      name: What it is called, and its folder.
      module: Its module in `experiments`, and its file in `configs`.
      variant: Its configuration.
      smoke: The one that `--smoke` takes.
      settings: Fields set beside the variant, by dotted name; not in a smoke run.
    """

    name: str
    module: str
    variant: str = "tiny"
    smoke: str = "smoke"
    settings: Mapping[str, Any] = MappingProxyType({})

    def config(self, *, smoke: bool) -> ml_collections.ConfigDict:
        """Its configuration."""
        module = importlib.import_module(f"configs.{self.module}")
        if smoke:
            return module.get_config(self.smoke)
        config = module.get_config(self.variant)
        config.update_from_flattened_dict(dict(self.settings))
        return config

    def arguments(self, workdir: Path, *, smoke: bool) -> list[str]:
        """What `python` is given to run it in `workdir`'s folder of its name."""
        variant = self.smoke if smoke else self.variant
        settings = {} if smoke else self.settings
        return [
            "-m",
            f"experiments.{self.module}",
            f"--workdir={workdir / self.name}",
            f"--config={CONFIGS / self.module}.py:{variant}",
            *(f"--config.{name}={value!r}" for name, value in settings.items()),
        ]

    def command(self, *, smoke: bool) -> str:
        """The same for a reader, from the root of a clone."""
        arguments = self.arguments(Path("runs"), smoke=smoke)
        return shlex.join(["python", *arguments]).replace(f"{CONFIGS}", CONFIGS.name)

    def finished(self, workdir: Path) -> bool:
        """Whether it has ended in `workdir`'s folder of its name, report and all."""
        return all((workdir / self.name / file).exists() for file in (RESULTS, REPORT))

    def check(self, workdir: Path, *, smoke: bool) -> None:
        """Refuses a folder begun with another configuration, or in another world.

        Worlds are compared by the recipes and the bundled checkpoints that the folder
        records; prompts, whose hash is known only once they are read, by the study.

        Raises:
          WorkdirError: It was, or is damaged.
        """
        folder = workdir / self.name
        if (folder / workdirs.CONFIG_FILE).exists():
            config = self.config(smoke=smoke)
            workdirs.claim(folder, config, resume=False, free=FREE)
            module = importlib.import_module(f"experiments.{self.module}")
            recipes = getattr(module, "recipes", worlds.recipes)
            workdirs.check_inputs(folder, worlds.bundled(config), recipes(config))


CONFIGS = Path(__file__).parent.parent.parent / "configs"
RESULTS, REPORT = "results.json", "report.html"

_HALF = MappingProxyType({"num_steps": 100, "evaluate_every": 10})
_ONE_MATRIX = _HALF | {"moment_matrices": ("layers.self_attn.o_proj:1",)}

ENTRIES = (
    Entry("optimizer_ablation", "optimizer_ablation", "default"),
    Entry("training_regimes", "training_regimes"),
    # Studies of some forty runs take half as many steps, so that all end in time.
    Entry("subspace_locking", "subspace_locking", settings=_HALF),
    Entry("objective_controls", "objective_controls", settings=_ONE_MATRIX),
    Entry("subnetwork", "subnetwork"),
    Entry("loss_forms", "loss_forms", settings=_ONE_MATRIX),
    Entry("precision", "precision", settings=_HALF),
    Entry("dynamics", "dynamics", settings=_HALF),
    # In three worlds, two of which are built first.
    Entry("opd_variants", "opd_variants"),
    Entry("subnetwork_vision", "subnetwork", "vision", "vision_smoke"),
    # A hundred and twenty runs.
    Entry(
        "optimizers",
        "optimizer_ablation",
        "optimizers",
        "optimizers_smoke",
        MappingProxyType({"num_steps": 60, "evaluate_every": 12}),
    ),
)
"""The lot, those that most of the papers' tables need first."""

_SUFFIX = "_midsize"
MIDSIZE = tuple(
    Entry(name + _SUFFIX, name, "midsize", "midsize_smoke")
    for name in ("training_regimes", "subspace_locking", "subnetwork")
)
"""Entries of 104 million parameters, which run only if `--only` names them.

At their smallest they take place in the bundled world, and belong to the lot.
"""

KNOWN = ENTRIES + MIDSIZE


def select(names: Sequence[str], *, smoke: bool = False) -> tuple[Entry, ...]:
    """The entries of these names in the order of `KNOWN`; the lot for none.

    Args:
      names: Of entries.
      smoke: Whether the lot is the one of a smoke run, which leaves out nothing.

    Raises:
      ValueError: There is no such entry.
    """
    known = [entry.name for entry in KNOWN]
    unknown = sorted(set(names) - set(known))
    if unknown:
        raise ValueError(f"--only names {unknown}; known: {', '.join(known)}")
    if not names:
        return KNOWN if smoke else ENTRIES
    return tuple(entry for entry in KNOWN if entry.name in names)


def sizes(name: str) -> tuple[str, str]:
    """An entry's name, and that of its like at 104 million parameters, if any."""
    return name, name + _SUFFIX
