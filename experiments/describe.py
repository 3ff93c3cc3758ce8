r"""What a recipe is and would take, before anything is downloaded.

    python -m experiments.describe --config=configs/p1_opd.py:justrl \
        [--config.FIELD=VALUE] [--device="TPU v5e"] [--devices=16] \
        [--topology=v5e:4x4]

Prints every field of the resolved configuration, marked as the paper's, as ours, or as
changed on this command line, and what its paper gives besides; then memory over all
devices and time per step by the leading terms of shapes and counts. These are
estimates, of sequences that all reach their longest: the time assumes 40 % of the
device's peak for matrix products, and for decoding its memory bandwidth. With
--topology, the recipe's update and rollout are also compiled for that slice, as
`experiments.aot_check` does (minutes; needs libtpu).
"""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_collections
from absl import flags
from ml_collections import config_flags

from experiments import aot_check
from experiments.aot.programs import PROGRAMS
from experiments.common import cli
from experiments.recipe import needs
from experiments.recipe.compiled import aot_config
from geomjax.train.throughput import peak_flops

UTILISATION = 0.4
"""Share of the peak that matrix products are taken to reach; a round number of ours."""

BANDWIDTH = {
    "TPU v5e": 819e9,
    "TPU v5p": 2765e9,
    "TPU v6e": 1600e9,
    "NVIDIA H100": 3.35e12,
}
"""Bytes a second of one device's memory: docs.cloud.google.com/tpu/docs/{v5e,v5p,v6e},
"HBM bandwidth per chip", and nvidia.com/en-us/data-center/h100."""

Mark = tuple[Any, str, str]
"""A recipe's value, whether it is the paper's or ours, and where or why."""

_GIB = 1 << 30


def define_flags() -> None:
    """Defines the flags; not at import: experiments can be imported together."""
    config_flags.DEFINE_config_file("config", None, "Recipe, FILE or FILE:variant.")
    flags.DEFINE_enum("device", "TPU v5e", list(BANDWIDTH), "Kind of device.")
    flags.DEFINE_integer("devices", 16, "How many of them.", lower_bound=1)
    flags.DEFINE_string("topology", "", "TPU slice to compile for, such as v5e:4x4.")
    flags.DEFINE_integer("layers", 0, "Blocks to compile, 0 for all.", lower_bound=0)


def main() -> None:
    """Prints what the flags describe."""
    values = flags.FLAGS
    if values.config is None:
        raise ValueError("--config is not given; --help explains it")
    file = config_flags.get_config_filename(values["config"])
    for line in describe(values.config, recipe_marks(file)):
        print(line)
    print()
    for line in estimate(values.config, values.device, values.devices):
        print(line)
    if values.topology:
        print()
        config = aot_config(values.config, values.layers)
        aot_check.check(config, values.topology, list(PROGRAMS))


def recipe_marks(file: str) -> dict[str, Mark]:
    """The marks of a recipe's file, none where it has none.

    Args:
      file: FILE or FILE:variant, as `--config` takes it.
    """
    path, _, variant = file.partition(":")
    spec = importlib.util.spec_from_file_location("recipe", Path(path))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    marks: Callable[..., dict[str, Mark]] | None = getattr(module, "get_marks", None)
    if marks is None:
        return {}
    return marks(variant) if variant else marks()


def describe(config: ml_collections.ConfigDict, known: dict[str, Mark]) -> list[str]:
    """One line a field: name, value, who chose it, and where or why.

    What is marked and no field of the configuration (`besides`) follows the fields.
    """
    rows = []
    fields = dict(_leaves(config.to_dict()))
    besides = {n: mark[0] for n, mark in known.items() if n.startswith("besides.")}
    for name, value in (fields | besides).items():
        mark = known.get(name)
        if mark is None:
            rows.append((name, repr(value), "", ""))
            continue
        given, origin, note = mark
        if given != value:
            origin, note = "changed", f"{origin} {given!r}: {note}"
        rows.append((name, repr(value), origin, note))
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    return [
        "  ".join([*(c.ljust(w) for c, w in zip(row[:3], widths, strict=True)), row[3]])
        for row in rows
    ]


def _leaves(values: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for name, value in values.items():
        if isinstance(value, dict):
            found += _leaves(value, f"{prefix}{name}.")
        else:
            found.append((prefix + name, value))
    return found


def estimate(config: ml_collections.ConfigDict, device: str, devices: int) -> list[str]:
    """Memory and time by estimate, a line each, with how each term was counted.

    Raises:
      ValueError: The shapes of a model are not known.
    """
    memory, work = needs.memory(config), needs.operations(config)
    total = sum(line.amount for line in memory)
    out = [f"memory by estimate, over {devices} x {device}, longest sequences:"]
    out += [f"  {m.what:18}{m.amount / _GIB:10.1f} GiB  {m.how}" for m in memory]
    each = total / devices / _GIB
    out.append(f"  {'together':18}{total / _GIB:10.1f} GiB  {each:.1f} GiB a device")
    peak = peak_flops(device)
    assert peak is not None
    rate = UTILISATION * peak * devices
    out.append(f"time per step by estimate, at {UTILISATION:.0%} of the peak:")
    seconds = 0.0
    for line in work:
        spent = line.amount / rate
        if line.what == "rollout":
            read = needs.decode_bytes(config) / (BANDWIDTH[device] * devices)
            spent = max(spent, read)
        seconds += spent
        out.append(f"  {line.what:18}{spent:10.1f} s    {line.amount:.2e} operations")
    days = seconds * config.num_steps / 86400
    out.append(
        f"  {'together':18}{seconds:10.1f} s    {days:.1f} days for {config.num_steps} "
        "steps of one run"
    )
    return out


if __name__ == "__main__":
    cli.main(main, define_flags, cache=False)
