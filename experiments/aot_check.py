r"""Compiles a distillation run for a TPU slice, on a machine without a TPU.

    python -m experiments.aot_check --config=configs/aot_check.py:ds_qwen_1_5b \
        --topology=v5e:4x4

Prints, for one optimizer update (the teacher's scores included) and one rollout (its
copy of the weights and the cache at full length included): seconds to compile, memory
of a chip against what it has, operations of the matrix products counted from the jaxpr,
and the bytes that a chip sends by kind of collective, both as often as loops run. The
whole training state and the teacher are arguments of both. Nothing is allocated. A
third, `geometry`, is what the default metrics of the update run on the chips.

With --nocode a compilation is ended when memory and collectives are decided, before
code is generated: a tenth of the time for the same figures, all but the code's size.

Needs libtpu: pip install geomjax[tpu]. Times at the peak of a chip and of its links are
lower bounds, no forecasts.
"""

import json
import sys
from typing import Any

import ml_collections
from absl import flags
from ml_collections import config_flags

from experiments.aot.assigned import measure_assigned
from experiments.aot.chips import Chip, slice_devices
from experiments.aot.geometry import measure_geometry
from experiments.aot.measure import Measured, measure
from experiments.aot.programs import PROGRAMS, make_model, make_programs
from experiments.common import cli
from geomjax.meshes import mesh_from_string

NAMES = (*PROGRAMS, "geometry")
"""What can be compiled."""


def define_flags() -> None:
    """Defines the flags; not at import: experiments can be imported together."""
    config_flags.DEFINE_config_file(
        "config", "configs/aot_check.py", "What to compile."
    )
    flags.DEFINE_string("topology", "v5e:4x4", "Generation and shape.")
    flags.DEFINE_list("programs", list(NAMES), "Which of them.")
    flags.DEFINE_string("json", "", "File to add one line of results to.")
    flags.DEFINE_bool(
        "code",
        True,
        "Whether to generate the code of a step too: nine tenths of the "
        "time, and nothing but the size of the code.",
    )
    flags.DEFINE_string("dump", "", "Folder for what the compiler writes down.")


def check(
    config: ml_collections.ConfigDict,
    topology: str,
    names: list[str],
    *,
    dump: str = "",
    command: list[str] | None = None,
) -> dict[str, Measured]:
    """Compiles the programs of a configuration for a slice and prints what they need.

    Args:
      config: As `configs/aot_check.py`.
      topology: Such as `v5e:4x4`.
      names: Some of `NAMES`.
      dump: Folder for what the compiler writes down.
      command: What does the same in a process of its own, to be ended before code is
        generated; None to generate it.

    Returns:
      What each needs.

    Raises:
      ValueError: An unknown program or slice, or a mesh that does not divide the
        models.
    """
    unknown = sorted(set(names) - set(NAMES))
    if unknown:
        raise ValueError(f"programs {unknown}: expected some of {list(NAMES)}")
    chip, devices = slice_devices(topology)
    mesh = mesh_from_string(config.mesh or f"fsdp={len(devices)}", devices)
    programs = make_programs(config, mesh)
    print(
        f"{config.student.name} with teacher {config.teacher.name} on {topology}, "
        f"mesh {dict(mesh.shape)}"
        + (f", cut to {config.layers} layers" if config.layers else "")
    )
    found = {}
    for name in names:
        if name == "geometry":
            student = make_model(config.student.to_dict(), config, mesh)
            found[name] = measure_geometry(student, devices)
        elif command is None:
            found[name] = measure(programs[name], dump)
        else:
            one = [*command, f"--programs={name}"]
            found[name] = measure_assigned(programs[name], name, one)
        print(_line(name, found[name], chip, len(devices)), flush=True)
    return found


def _line(name: str, found: Measured, chip: Chip, chips: int) -> str:
    parts = [
        f"{name:8s} compiled in {found.compile_s:.0f} s, {found.processor_s:.0f} s of "
        "processor time"
    ]
    if found.chip_bytes is None:
        parts.append(f"does not fit, {found.over}")
    else:
        used, there = (n / 2**30 for n in (found.chip_bytes, chip.hbm_bytes))
        parts.append(f"{used:.2f} of {there:.0f} GiB a chip")
    if found.flops is None:
        parts.append("operations not counted")
    else:
        at_peak = found.flops / chips / chip.peak_flops
        parts.append(f"{found.flops:.3g} operations, {at_peak:.3g} s at peak")
    if found.chip_bytes is not None:
        sent = sorted(found.sent_bytes.items())
        moved = sum(found.sent_bytes.values())
        kinds = ", ".join(f"{kind} {count / 1e9:.2f}" for kind, count in sent)
        parts.append(
            f"a chip sends {moved / 1e9:.2f} GB ({kinds or 'nothing'}), "
            f"{moved / chip.link_bytes_per_s:.3g} s at peak"
        )
    return "; ".join(parts)


def main() -> None:
    """Runs the check of the command line."""
    values = flags.FLAGS
    config = values.config
    again = [sys.executable, "-m", "experiments.aot_check", *sys.argv[1:], "--code"]
    found = check(
        config,
        values.topology,
        values.programs,
        dump=values.dump,
        command=None if values.code else again,
    )
    if values.json:
        row: dict[str, Any] = {
            "student": config.student.name,
            "teacher": config.teacher.name,
            "topology": values.topology,
            "mesh": config.mesh,
            "layers": config.layers,
            "code": values.code,
            "sequences_per_update": config.sequences_per_update,
            "sequences_per_rollout": config.sequences_per_rollout,
        }
        row |= {name: each._asdict() for name, each in found.items()}
        with open(values.json, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    cli.main(main, define_flags, cache=False)
