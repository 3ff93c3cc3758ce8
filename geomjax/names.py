"""From a Hugging Face tensor name to its layer, module and group."""

import re
from typing import NamedTuple

ATTENTION = (
    "q_proj",
    "k_proj",
    "v_proj",
    "o_proj",
    "qkv_proj",
    "q_a_proj",
    "q_b_proj",
    "kv_a_proj_with_mqa",
    "kv_b_proj",
)
FFN = (
    "gate_proj",
    "up_proj",
    "down_proj",
    "gate_up_proj",
    "fc1",
    "fc2",
    "w1",
    "w2",
    "w3",
)
EMBEDDING = ("embed_tokens", "wte", "word_embeddings")
GROUPS = ("attention", "ffn", "embedding", "lm_head", "norm", "vision", "other")
"""Every group, in the order in which tables and figures list them."""

_VISION = ("visual", "vision_tower", "vision_model", "vpm", "multi_modal_projector")
_STACKS = ("layers", "blocks", "block", "h", "layer")
_NORM = re.compile(r"(^|_)(layer|rms)?norm\d*($|_)|^ln(_\w+)?$")
_STORAGE = ("weight", "bias")


class TensorName(NamedTuple):
    """What a tensor's name says about its place in the model.

    Attributes:
        layer: index of the block that holds it, None outside the blocks. The blocks
            of a vision tower are numbered on their own.
        module: `q_proj` ... `down_proj`, `embed_tokens`, `lm_head`, `norm`, `bias`,
            `router`; `experts.down_proj` and `shared_expert.down_proj` for experts;
            `visual.attn.qkv` and the like for the parts of a vision tower. A name that
            matches nothing keeps its own last part.
        group: one of `GROUPS`.
    """

    layer: int | None
    module: str
    group: str


def classify(name: str) -> TensorName:
    """Classifies a Hugging Face tensor name.

    >>> classify("model.layers.3.self_attn.q_proj.weight")
    TensorName(layer=3, module='q_proj', group='attention')
    >>> classify("model.layers.0.mlp.experts.7.up_proj.weight")
    TensorName(layer=0, module='experts.up_proj', group='ffn')
    >>> classify("visual.blocks.5.attn.qkv.weight")
    TensorName(layer=5, module='visual.attn.qkv', group='vision')

    Args:
        name: the name as the checkpoint stores it.

    Returns:
        Its layer, module and group.
    """
    parts = name.split(".")
    layer = _layer(parts)
    tower = next((i for i, part in enumerate(parts) if part in _VISION), None)
    if tower is not None:
        return TensorName(layer, _vision_module(parts[tower + 1 :]), "vision")
    is_bias = parts[-1] == "bias"
    stem = parts[:-1] if parts[-1] in _STORAGE and len(parts) > 1 else parts
    module, group = _module(stem)
    return TensorName(layer, "bias" if is_bias else module, group)


def _layer(parts: list[str]) -> int | None:
    for stack, index in zip(parts, parts[1:], strict=False):
        if stack in _STACKS and index.isdecimal():
            return int(index)
    return None


def _module(stem: list[str]) -> tuple[str, str]:
    last = stem[-1]
    if "experts" in stem or "shared_expert" in stem or "shared_experts" in stem:
        family = "experts" if "experts" in stem else "shared_expert"
        return (f"{family}.{last}" if last != "experts" else family), "ffn"
    if last in ("router", "gate") and "mlp" in stem:
        return "router", "ffn"
    if last in ATTENTION:
        return last, "attention"
    if last in FFN:
        return last, "ffn"
    if last in EMBEDDING:
        return "embed_tokens", "embedding"
    if last == "lm_head":
        return "lm_head", "lm_head"
    if _NORM.search(last):
        return "norm", "norm"
    return last, "other"


def _vision_module(parts: list[str]) -> str:
    kept = []
    skip_index = False
    for part in parts:
        if part in _STACKS:
            skip_index = True
            continue
        if not (skip_index and part.isdecimal()) and part != "weight":
            kept.append(part)
        skip_index = False
    return ".".join(["visual", *kept])
