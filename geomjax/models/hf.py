"""Hugging Face tensor names and our paths: one table, used in both directions."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from geomjax.models.config import DecoderConfig
from geomjax.optim.roles import Role, Roles
from geomjax.typing import Params, Path, TensorSource


class Rule(NamedTuple):
    """One tensor, or one a layer, of a checkpoint.

    Attributes:
      hf_pattern: Name in the checkpoint; `{layer}` runs over the layers.
      path: Where it lies in the parameters, stacked over the layers.
      role: What it is, for optimizers and sharding.
    """

    hf_pattern: str
    path: Path
    role: Role

    def names(self, num_layers: int) -> list[str]:
        """The names this rule stands for, by layer."""
        if not self.role.stack_depth:
            return [self.hf_pattern]
        return [self.hf_pattern.format(layer=i) for i in range(num_layers)]


def _embedding(name: str, *path: str) -> Rule:
    return Rule(name, path, Role(0, "embedding", -2, -1, ("vocab", "embed")))


def _matrix(module: str, out_axis: str, in_axis: str) -> Rule:
    role = Role(1, "matrix", -2, -1, ("layers", out_axis, in_axis))
    name = f"model.layers.{{layer}}.{module}.weight"
    return Rule(name, ("layers", *module.split("."), "weight"), role)


def _layer_norm(module: str, axis: str | None) -> Rule:
    role = Role(1, "vector", None, None, ("layers", axis))
    name = f"model.layers.{{layer}}.{module}.weight"
    return Rule(name, ("layers", *module.split("."), "weight"), role)


QWEN3 = (
    _embedding("model.embed_tokens.weight", "embed_tokens", "weight"),
    _layer_norm("input_layernorm", "embed"),
    _matrix("self_attn.q_proj", "heads", "embed"),
    _matrix("self_attn.k_proj", "kv_heads", "embed"),
    _matrix("self_attn.v_proj", "kv_heads", "embed"),
    _matrix("self_attn.o_proj", "embed", "heads"),
    _layer_norm("self_attn.q_norm", None),
    _layer_norm("self_attn.k_norm", None),
    _layer_norm("post_attention_layernorm", "embed"),
    _matrix("mlp.gate_proj", "ffn", "embed"),
    _matrix("mlp.up_proj", "ffn", "embed"),
    _matrix("mlp.down_proj", "embed", "ffn"),
    Rule(
        "model.norm.weight",
        ("norm", "weight"),
        Role(0, "vector", None, None, ("embed",)),
    ),
    _embedding("lm_head.weight", "lm_head", "weight"),
)

TABLES = {"Qwen3ForCausalLM": QWEN3}
"""Hugging Face architecture name -> its rules."""


def rules(config: DecoderConfig) -> tuple[Rule, ...]:
    """The rules of a model: its architecture's table, without a head that is tied."""
    return tuple(
        rule
        for rule in TABLES[config.architecture]
        if not (config.tie_word_embeddings and rule.path[0] == "lm_head")
    )


def roles(config: DecoderConfig) -> Roles:
    """What each parameter is, by path."""
    return {rule.path: rule.role for rule in rules(config)}


def leaf(params: Params, path: Path) -> Any:
    """The leaf of a nested dict at `path`."""
    for key in path:
        params = params[key]
    return params


def insert(params: Params, path: Path, value: Any) -> None:
    """Puts a leaf into a nested dict, making the dicts on the way."""
    for key in path[:-1]:
        params = params.setdefault(key, {})
    params[path[-1]] = value


def check_names(source: TensorSource, config: DecoderConfig, shapes: Params) -> None:
    """Compares every name and shape of a checkpoint with what the model expects.

    A tied head that is stored all the same must equal the embedding.

    Raises:
      ValueError: Lists every missing, unexpected and mis-shaped tensor at once.
    """
    expected = {
        name: leaf(shapes, rule.path).shape[rule.role.stack_depth :]
        for rule in rules(config)
        for name in rule.names(config.num_layers)
    }
    found = {name: tuple(source.spec(name).shape) for name in source.keys()}
    problems = []
    if config.tie_word_embeddings and "lm_head.weight" in found:
        del found["lm_head.weight"]
        embedded = "model.embed_tokens.weight" in found
        if embedded and not _same_bits(
            source.read("lm_head.weight"), source.read("model.embed_tokens.weight")
        ):
            problems.append(
                "lm_head.weight differs from model.embed_tokens.weight, but "
                "config.json says tie_word_embeddings"
            )
    for name in sorted(expected.keys() | found.keys()):
        want, got = expected.get(name), found.get(name)
        if got is None:
            problems.append(f"missing {name} {want}")
        elif want is None:
            problems.append(f"unexpected {name} {got}")
        elif want != got:
            problems.append(f"{name} has shape {got}, expected {want}")
    if problems:
        raise ValueError(
            f"the checkpoint does not fit {config.architecture}:\n"
            + "\n".join(problems)
        )


def _same_bits(left: np.ndarray, right: np.ndarray) -> bool:
    same_kind = left.shape == right.shape and left.dtype == right.dtype
    return same_kind and left.tobytes() == right.tobytes()


def read_params(
    source: TensorSource, config: DecoderConfig, shapes: Params, dtype: Any
) -> Params:
    """Reads a checkpoint into stacked parameters, one leaf after another.

    Args:
      source: The checkpoint's tensors.
      config: The model's configuration.
      shapes: The parameters' shapes, `Decoder.shapes`.
      dtype: Of the parameters; float32 holds bfloat16 and float16 exactly.

    Returns:
      The parameters on the default device.

    Raises:
      ValueError: Names or shapes do not fit (all listed), or a value is not finite in
        `dtype`.
    """
    check_names(source, config, shapes)
    params: Params = {}
    overflown = []
    for rule in rules(config):
        names = rule.names(config.num_layers)
        stack = np.empty(leaf(shapes, rule.path).shape, dtype)
        view = stack if rule.role.stack_depth else stack[None]
        for i, name in enumerate(names):
            with np.errstate(over="ignore"):  # Overflow is reported below, by name.
                view[i] = source.read(name)
            if not np.isfinite(view[i].astype(np.float32, copy=False)).all():
                overflown.append(name)
        insert(params, rule.path, jnp.asarray(stack))
    if overflown:
        raise ValueError(
            f"values that are not finite in {np.dtype(dtype).name}: "
            + ", ".join(overflown)
        )
    return params


def to_hf(
    tree: Params,
    config: DecoderConfig,
    convert: Callable[[np.ndarray], np.ndarray] = lambda array: array,
) -> Iterator[tuple[str, np.ndarray]]:
    """Unstacks parameters, or anything of their structure, under checkpoint names.

    Args:
      tree: Arrays in the parameters' structure: weights, masks, gradients.
      config: The model's configuration.
      convert: Applied to each tensor on the host, such as a cast.

    Yields:
      (name, array) in the order of the rules; one stacked leaf is on the host at a
      time.
    """
    for rule in rules(config):
        array = np.asarray(jax.device_get(leaf(tree, rule.path)))
        view = array if rule.role.stack_depth else array[None]
        for name, tensor in zip(rule.names(config.num_layers), view, strict=True):
            yield name, convert(tensor)


def from_hf(tensors: dict[str, np.ndarray], config: DecoderConfig) -> Params:
    """Stacks arrays under checkpoint names into the parameters' structure.

    The inverse of `to_hf`, for masks and other data that follows the weights.
    """
    tree: Params = {}
    for rule in rules(config):
        stack = [tensors[name] for name in rule.names(config.num_layers)]
        value = np.stack(stack) if rule.role.stack_depth else stack[0]
        insert(tree, rule.path, jnp.asarray(value))
    return tree
