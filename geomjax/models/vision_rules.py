"""The rules of Qwen2.5-VL's vision tower; its decoder has those of Qwen2."""

from geomjax.models.rules import Rule
from geomjax.optim.roles import Role

RENAMED = {"model.visual.": "visual.", "model.language_model.": "model."}
"""Prefixes of modules in memory, and what published checkpoints have instead."""


def _in_blocks(module: str, kind: str, role: Role) -> Rule:
    path = ("visual", "blocks", *module.split("."), kind)
    return Rule(f"visual.blocks.{{block}}.{module}.{kind}", path, role)


def _norm(module: str) -> Rule:
    role = Role(1, "vector", None, None, ("layers", "embed"))
    return _in_blocks(module, "weight", role)


def _linear(module: str, out_axis: str | None, in_axis: str) -> tuple[Rule, Rule]:
    matrix = Role(1, "matrix", -2, -1, ("layers", out_axis, in_axis))
    vector = Role(1, "vector", None, None, ("layers", out_axis))
    return _in_blocks(module, "weight", matrix), _in_blocks(module, "bias", vector)


def _merger(number: int, path: str, out_axis: str, in_axis: str) -> tuple[Rule, Rule]:
    name, where = f"visual.merger.mlp.{number}", ("visual", "merger", path)
    matrix = Role(0, "matrix", -2, -1, (out_axis, in_axis))
    vector = Role(0, "vector", None, None, (out_axis,))
    return (
        Rule(f"{name}.weight", (*where, "weight"), matrix),
        Rule(f"{name}.bias", (*where, "bias"), vector),
    )


VISION: tuple[Rule, ...] = (
    # A kernel of five axes is no matrix for optimizers that work on matrices.
    Rule(
        "visual.patch_embed.proj.weight",
        ("visual", "patch_embed", "proj", "weight"),
        Role(0, "vector", None, None, ("embed", None, None, None, None)),
    ),
    _norm("norm1"),
    # Queries, keys and values in one: no split of them falls between heads.
    *_linear("attn.qkv", None, "embed"),
    *_linear("attn.proj", "embed", "heads"),
    _norm("norm2"),
    *_linear("mlp.gate_proj", "ffn", "embed"),
    *_linear("mlp.up_proj", "ffn", "embed"),
    *_linear("mlp.down_proj", "embed", "ffn"),
    Rule(
        "visual.merger.ln_q.weight",
        ("visual", "merger", "ln_q", "weight"),
        Role(0, "vector", None, None, ("embed",)),
    ),
    *_merger(0, "up_proj", "ffn", "embed"),
    *_merger(2, "down_proj", "embed", "ffn"),
)
"""The rules of the vision tower; `{block}` runs over its blocks."""
