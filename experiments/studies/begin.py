"""The start of a study: settings checked, world loaded, inputs recorded."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import ml_collections

from experiments.common import workdir as workdirs
from experiments.common.prompts import has_images, open_judge, write_unusable
from experiments.common.provenance import record_start
from experiments.common.settings import refuse
from experiments.common.tracking import load_tracker
from experiments.common.world import World, load_world, locate
from experiments.studies.forms import is_privileged
from experiments.studies.settings import base_folder, check_settings
from experiments.studies.study import Study
from experiments.studies.worlds import in_world, recipes
from geomjax import hosts
from geomjax.models.load import Loaded, load
from geomjax.typing import Params


class Begun(NamedTuple):
    """A study and where its runs may start.

    Attributes:
      study: Trains runs.
      origins: Parameters of `anchor` and `base`, on the host where there is a mesh.
    """

    study: Study
    origins: dict[str, Params]


_NONE: Mapping[str, Any] = MappingProxyType({})


@contextmanager
def begin(
    config: ml_collections.ConfigDict,
    workdir: Path,
    name: str,
    paths: Mapping[str, Path] = _NONE,
    hashes: Mapping[str, str] = _NONE,
) -> Iterator[Begun]:
    """Checks and loads everything before any work is done.

    Args:
      config: The study's configuration.
      workdir: Its folder.
      name: Its module in `experiments`, for the record of its starts.
      paths: What it reads beside its world, as `claim_inputs` takes it.
      hashes: The same of what is no file.

    Raises:
      ValueError: A setting is out of range, the tracker is not installed, the world
        does not fit together, the base is another model than the anchor, an arm reads
        privileged text beside images, or the workdir was begun with other inputs.
    """
    check_settings(config)
    load_tracker(config.tracker)
    placed = in_world(config)
    with open_judge(config) as judge:
        base_dir = base_folder(placed)
        world = load_world(placed, judge)
        _refuse_privileged_images(config, world)
        student, teacher, _ = locate(placed)
        workdir.mkdir(parents=True, exist_ok=True)
        workdirs.claim_inputs(
            workdir,
            {"student": student, "teacher": teacher, "base": base_dir, **paths},
            {"prompts": world.prompts.fingerprint, **recipes(config), **hashes},
        )
        record_start(workdir, name)
        write_unusable(workdir, world.prompts)
        model = world.student.model
        base = load(
            base_dir,
            vocab_size=model.vocab_size,
            dtype=model.dtype,
            placement=model.placement,
        )
        if base.model.config != model.config:
            raise ValueError(
                f"the base {base_dir} and the anchor {world.student_dir} are models of "
                "different configurations; SFT starts from the base of the anchor"
            )
        for note in world.prompts.notes:
            print(note)
        origins = {"anchor": _origin(world.student), "base": _origin(base)}
        del base
        yield Begun(Study(config, world, workdir, judge), origins)
        for note in judge.notes():
            print(note)


def _origin(loaded: Loaded) -> Params:
    """Parameters that updates are counted from, whole."""
    split = loaded.model.placement.mesh is not None
    return hosts.fetch(loaded.params) if split else loaded.params


def _refuse_privileged_images(config: ml_collections.ConfigDict, world: World) -> None:
    """Raises ValueError with every arm whose teacher would not see the images."""
    if has_images(world.train.examples):
        refuse(
            [
                f"arm {name}: {arm.kind} is of text, and the prompts have images"
                for name, arm in config.get("arms", {}).items()
                if is_privileged(arm.kind)
            ]
        )
