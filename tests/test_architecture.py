"""Holds the floors of the design: who may import whom, and what stays out of where."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FLOORS = (
    {"typing", "names", "meshes", "compiled", "jaxpr_flops", "hosts"},
    {"geometry", "checkpoints", "data", "sandbox"},
    {"models", "optim", "update", "rewards"},
    {"analysis", "rollout", "objectives", "evaluation"},
    {"train"},
    {"experiments", "configs"},
)
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
# Same floor, one direction; the shared types are open to everyone.
ALSO_ALLOWED = {
    ("models", "optim"),
    ("names", "typing"),
    ("meshes", "typing"),
    ("hosts", "typing"),
    ("typing", "meshes"),
    ("compiled", "typing"),
    ("jaxpr_flops", "typing"),
    ("experiments", "configs"),
}
# Lower floors that are out of bounds all the same: the analysis wing knows no model
# code, the training wing no metrics, and losses and steps receive their model.
FORBIDDEN = {
    ("geometry", "names"),
    ("geometry", "meshes"),
    ("analysis", "models"),
    ("objectives", "models"),
    ("train", "models"),
    ("train", "analysis"),
}
# The only places that may import these packages.
PLACES = {
    "absl": ("experiments/", "configs/"),
    "flax": ("geomjax/models/",),
    "ml_collections": ("experiments/", "configs/"),
    "orbax": ("geomjax/checkpoints/",),
    "torch": ("experiments/bench_", "experiments/peers/"),
    **dict.fromkeys(("pickle", "dill", "cloudpickle", "joblib", "shelve"), ()),
}


def imports(tree: ast.Module, package: list[str]) -> set[tuple[str, ...]]:
    """The modules a file names in imports, absolute, with the names they import."""
    found: set[tuple[str, ...]] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {tuple(alias.name.split(".")) for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = base + (node.module.split(".") if node.module else [])
            found |= {(*base, alias.name) for alias in node.names}
    return found


def room_of(module: tuple[str, ...]) -> str | None:
    """The room of one of our modules; None outside the project and for its root."""
    if module[0] != "geomjax":
        return module[0] if module[0] in FLOOR else None
    if len(module) == 1 or module[1].startswith("__"):
        return None
    return module[1] if module[1] in FLOOR else f"{module[1]} (on no floor)"


def may_import(room: str, other: str) -> bool:
    """Whether modules of `room` may import modules of `other`."""
    if room == other or (room, other) in ALSO_ALLOWED:
        return True
    if room not in FLOOR or other not in FLOOR or (room, other) in FORBIDDEN:
        return False
    return FLOOR[other] < FLOOR[room]


def violations(root: Path) -> list[str]:
    """Every breach of the design in the packages under `root`, one line each."""
    found = []
    for top in ("geomjax", "experiments", "configs"):
        for path in sorted((root / top).rglob("*.py")):
            file = path.relative_to(root).as_posix()
            tree = ast.parse(path.read_text(encoding="utf-8"))
            module = tuple(file.removesuffix(".py").split("/"))
            room = room_of(module)
            if tree.body and not ast.get_docstring(tree):
                found.append(f"{file} has no docstring")
            for name in sorted(imports(tree, list(module[:-1]))):
                other = room_of(name)
                if room and other and not may_import(room, other):
                    found.append(f"{file}: {room} may not import {other}")
                if not file.startswith(PLACES.get(name[0], ("",))):
                    found.append(f"{file} may not import {name[0]}")
            for node in ast.walk(tree):
                if not isinstance(node, ast.Call):
                    continue
                callee = ast.unparse(node.func)
                if top == "geomjax" and callee == "print":
                    found.append(f"{file}:{node.lineno} prints")
                if any(k.arg == "allow_pickle" for k in node.keywords) and (
                    "allow_pickle=True" in ast.unparse(node)
                ):
                    found.append(f"{file}:{node.lineno} unpickles")
    return found


def test_the_tree_keeps_to_the_design():
    assert not violations(ROOT)


def test_every_package_is_looked_at():
    rooms = {path.name for path in (ROOT / "geomjax").iterdir() if path.is_dir()}
    assert rooms - {"__pycache__"} <= set(FLOOR)
    assert {"geometry", "models", "optim", "train"} <= rooms


@pytest.mark.parametrize(
    ("file", "code", "expected"),
    [
        ("geomjax/geometry/a.py", "import geomjax.models.load", "geometry may not"),
        ("geomjax/geometry/a.py", "from geomjax import names", "import names"),
        ("geomjax/analysis/a.py", "from geomjax.models import hf", "import models"),
        ("geomjax/analysis/a.py", "from geomjax import rollout", "import rollout"),
        ("geomjax/rollout/a.py", "from ..objectives import sft", "import objectives"),
        ("geomjax/optim/a.py", "from geomjax.models import hf", "import models"),
        ("geomjax/train/a.py", "from geomjax.analysis import run", "import analysis"),
        ("geomjax/train/a.py", "def f():\n  import geomjax.models", "import models"),
        ("geomjax/data/a.py", "import experiments.tiny_world", "import experiments"),
        ("geomjax/odd/a.py", "import geomjax.typing", "on no floor"),
        ("geomjax/train/a.py", "from geomjax.odd import b", "on no floor"),
        ("geomjax/data/a.py", "import torch.nn as nn", "may not import torch"),
        ("experiments/a.py", "from torch import nn", "may not import torch"),
        ("geomjax/data/a.py", "from absl import flags", "may not import absl"),
        ("geomjax/checkpoints/a.py", "import pickle", "may not import pickle"),
        ("geomjax/checkpoints/a.py", "np.load(p, allow_pickle=True)", "unpickles"),
        ("geomjax/data/a.py", "print('x')", "prints"),
    ],
)
def test_a_breach_is_found(tmp_path, file, code, expected):
    path = tmp_path / file
    path.parent.mkdir(parents=True)
    path.write_text(f'"""Documented."""\n{code}\n')
    found = violations(tmp_path)
    assert len(found) == 1
    assert expected in found[0]


def test_a_missing_docstring_is_found(tmp_path):
    path = tmp_path / "configs" / "a.py"
    path.parent.mkdir()
    path.write_text("x = 1\n")
    assert violations(tmp_path) == ["configs/a.py has no docstring"]


@pytest.mark.parametrize(
    ("file", "code"),
    [
        ("geomjax/geometry/a.py", "from geomjax.typing import Params\nfrom . import b"),
        ("geomjax/models/a.py", "from geomjax.optim.roles import Role\nimport flax"),
        ("geomjax/train/a.py", "import geomjax\nimport geomjax.rollout.sample"),
        ("experiments/bench_a.py", "import torch\nimport geomjax.train.step\nprint()"),
        ("experiments/peers/a.py", "import torch"),
    ],
)
def test_what_the_design_allows_passes(tmp_path, file, code):
    path = tmp_path / file
    path.parent.mkdir(parents=True)
    path.write_text(f'"""Documented."""\n{code}\n')
    assert not violations(tmp_path)
