"""Parameters under the names of Hugging Face checkpoints, and back.

Everything here reads the rule table of the model's family, in one direction or the
other; `rules` says how a table is written.
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from geomjax.checkpoints.sources import CheckpointSource
from geomjax.models.config import ModelConfig
from geomjax.models.families import FAMILIES
from geomjax.models.renamed import RenamedSource
from geomjax.models.rules import Rule
from geomjax.optim.roles import Roles
from geomjax.typing import Params, Path

DERIVED = re.compile(r".*\.rotary_emb\.inv_freq")
"""Tensors of older checkpoints that follow from config.json; nobody reads them."""


def rules(config: ModelConfig) -> tuple[Rule, ...]:
    """The rules of a model: its architecture's table, without what it does not have."""
    return tuple(
        rule
        for rule in FAMILIES[config.architecture].rules
        if rule.when is None or getattr(config.text, rule.when)
    )


def roles(config: ModelConfig) -> Roles:
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


def published(source: CheckpointSource, config: ModelConfig) -> RenamedSource:
    """The tensors of a checkpoint under the names that the family's table has."""
    return RenamedSource(source, FAMILIES[config.architecture].renamed)


def check_names(source: RenamedSource, config: ModelConfig, shapes: Params) -> None:
    """Compares every name and shape of a checkpoint with what the model expects.

    A tied head that is stored all the same must equal the embedding.

    Raises:
      ValueError: Lists every missing, unexpected, repeated and mis-shaped tensor at
        once.
    """
    expected = {
        name: leaf(shapes, rule.path).shape[rule.role.stack_depth :]
        for rule in rules(config)
        for name in rule.names(config)
    }
    found = {
        name: tuple(source.spec(name).shape)
        for name in source.keys()
        if not DERIVED.fullmatch(name)
    }
    problems = list(source.repeated)
    if config.text.tie_word_embeddings and "lm_head.weight" in found:
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
            why = f": {source.left_out[name]}" if name in source.left_out else ""
            problems.append(f"missing {name} {want}{why}")
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


def to_hf(
    tree: Params,
    config: ModelConfig,
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
        count = math.prod(rule.stack_shape(config))
        view = array.reshape(count, *array.shape[rule.role.stack_depth :])
        for name, tensor in zip(rule.names(config), view, strict=True):
            yield name, convert(tensor)


def from_hf(tensors: Mapping[str, np.ndarray], config: ModelConfig) -> Params:
    """Stacks arrays under checkpoint names into the parameters' structure.

    The inverse of `to_hf`, for masks and other data that follows the weights.
    """
    tree: Params = {}
    for rule in rules(config):
        stack = np.stack([tensors[name] for name in rule.names(config)])
        shape = (*rule.stack_shape(config), *stack.shape[1:])
        insert(tree, rule.path, jnp.asarray(stack.reshape(shape)))
    return tree
