"""Hugging Face tensor names and our paths: the rules that families are made of.

A rule ties one leaf of the parameters to its tensors in a checkpoint, and is read in
both directions. A family's table is a tuple of rules; `table` puts one together from
the parts below.
"""

import itertools
import string
from typing import NamedTuple

from geomjax.models.config import ModelConfig
from geomjax.optim.roles import Role
from geomjax.typing import Path


class Rule(NamedTuple):
    """One tensor, or one a layer, or one for each expert of each layer.

    Attributes:
      hf_pattern: Name in the checkpoint. Its fields, such as `{layer}` and `{expert}`,
        run over the sizes that `stack_sizes` of the configuration gives them.
      path: Where it lies in the parameters, stacked over the fields in their order.
      role: What it is, for optimizers and sharding.
      when: The field or property of the decoder's configuration that must be true for
        the tensor to be there; None for one that every model of the family has.
    """

    hf_pattern: str
    path: Path
    role: Role
    when: str | None = None

    @property
    def fields(self) -> tuple[str, ...]:
        """The fields of the pattern, one for each leading axis of the leaf."""
        parts = string.Formatter().parse(self.hf_pattern)
        return tuple(field for _, field, _, _ in parts if field)

    def stack_shape(self, config: ModelConfig) -> tuple[int, ...]:
        """The leading axes of the leaf, which index the tensors."""
        return tuple(config.stack_sizes[field] for field in self.fields)

    def names(self, config: ModelConfig) -> list[str]:
        """The names this rule stands for, in the order of the stack."""
        places = itertools.product(*map(range, self.stack_shape(config)))
        return [
            self.hf_pattern.format(**dict(zip(self.fields, place, strict=True)))
            for place in places
        ]


def _embedding(name: str, path: str, when: str | None = None) -> Rule:
    role = Role(0, "embedding", -2, -1, ("vocab", "embed"))
    return Rule(f"{name}.weight", (path, "weight"), role, when)


def matrix(
    module: str, out_axis: str | None, in_axis: str | None, when: str | None = None
) -> Rule:
    """A matrix `[out, in]` of every layer, under one name here and in the checkpoint.

    Args:
      module: Its module within the block, such as `self_attn.q_proj`.
      out_axis: Logical name of its outputs, for sharding; None for no name.
      in_axis: That of its inputs.
      when: As `Rule.when`.
    """
    role = Role(1, "matrix", -2, -1, ("layers", out_axis, in_axis))
    return _in_layers(module, "weight", role, when)


def vector(
    module: str, axis: str | None, kind: str = "weight", when: str | None = None
) -> Rule:
    """A bias or the weight of a norm of every layer; the arguments are `matrix`'s."""
    role = Role(1, "vector", None, None, ("layers", axis))
    return _in_layers(module, kind, role, when)


def _in_layers(module: str, kind: str, role: Role, when: str | None) -> Rule:
    path = ("layers", *module.split("."), kind)
    return Rule(f"model.layers.{{layer}}.{module}.{kind}", path, role, when)


def _of_experts(projection: str, out_axis: str, in_axis: str) -> Rule:
    name = f"model.layers.{{layer}}.mlp.experts.{{expert}}.{projection}.weight"
    role = Role(2, "matrix", -2, -1, ("layers", "experts", out_axis, in_axis))
    return Rule(name, ("layers", "mlp", "experts", projection, "weight"), role)


ATTENTION = (
    matrix("self_attn.q_proj", "heads", "embed"),
    matrix("self_attn.k_proj", "kv_heads", "embed"),
    matrix("self_attn.v_proj", "kv_heads", "embed"),
    matrix("self_attn.o_proj", "embed", "heads"),
)
ATTENTION_BIAS = (
    vector("self_attn.q_proj", "heads", "bias", when="qkv_bias"),
    vector("self_attn.k_proj", "kv_heads", "bias", when="qkv_bias"),
    vector("self_attn.v_proj", "kv_heads", "bias", when="qkv_bias"),
    vector("self_attn.o_proj", "embed", "bias", when="out_bias"),
)
HEAD_NORMS = (
    vector("self_attn.q_norm", None),
    vector("self_attn.k_norm", None),
)
LATENT_ATTENTION = (
    matrix("self_attn.q_proj", "heads", "embed", when="full_query"),
    matrix("self_attn.q_a_proj", None, "embed", when="latent_query"),
    vector("self_attn.q_a_layernorm", None, when="latent_query"),
    matrix("self_attn.q_b_proj", "heads", None, when="latent_query"),
    matrix("self_attn.kv_a_proj_with_mqa", None, "embed"),
    vector("self_attn.kv_a_layernorm", None),
    matrix("self_attn.kv_b_proj", "heads", None),
    matrix("self_attn.o_proj", "embed", "heads"),
)
MLP = (
    matrix("mlp.gate_proj", "ffn", "embed"),
    matrix("mlp.up_proj", "ffn", "embed"),
    matrix("mlp.down_proj", "embed", "ffn"),
)
MLP_BIAS = (
    vector("mlp.gate_proj", "ffn", "bias", when="mlp_bias"),
    vector("mlp.up_proj", "ffn", "bias", when="mlp_bias"),
    vector("mlp.down_proj", "embed", "bias", when="mlp_bias"),
)
EXPERTS = (
    matrix("mlp.gate", None, "embed"),
    _of_experts("gate_proj", "ffn", "embed"),
    _of_experts("up_proj", "ffn", "embed"),
    _of_experts("down_proj", "embed", "ffn"),
)


def table(attention: tuple[Rule, ...], ffn: tuple[Rule, ...]) -> tuple[Rule, ...]:
    """The rules of a family: the parts of its blocks, and what all families share."""
    norm = Role(0, "vector", None, None, ("embed",))
    return (
        _embedding("model.embed_tokens", "embed_tokens"),
        vector("input_layernorm", "embed"),
        *attention,
        vector("post_attention_layernorm", "embed"),
        *ffn,
        Rule("model.norm.weight", ("norm", "weight"), norm),
        _embedding("lm_head", "lm_head", when="untied_head"),
    )


LLAMA = table((*ATTENTION, *ATTENTION_BIAS), (*MLP, *MLP_BIAS))
QWEN3 = table((*ATTENTION, *ATTENTION_BIAS, *HEAD_NORMS), MLP)
QWEN3_MOE = table((*ATTENTION, *ATTENTION_BIAS, *HEAD_NORMS), EXPERTS)
MINICPM3 = table(LATENT_ATTENTION, MLP)
