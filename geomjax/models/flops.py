"""Operations of a decoder's forward pass, counted from its configuration."""

import math

import jax

from geomjax.models.decoder import Decoder
from geomjax.models.hf import roles
from geomjax.optim.roles import leaf_paths


def token_weights(model: Decoder) -> int:
    """Entries of the matrices that one token is multiplied with.

    Those of its experts alone, and the output head in the rows in use; the look-up of
    an embedding is no product.
    """
    config = model.config
    table = roles(config)
    total = model.vocab_size * config.hidden_size
    leaves = jax.tree.leaves(model.shapes)
    for path, leaf in zip(leaf_paths(model.shapes), leaves, strict=True):
        if table[path].kind != "matrix":
            continue
        size = math.prod(leaf.shape)
        if table[path].stack_depth == 2:
            assert config.experts is not None
            size = size * config.experts.per_token // config.experts.count
        total += size
    return total


def forward_flops(model: Decoder, length: float) -> float:
    """Operations of one sequence's forward pass; a product and its sum count as two.

    As in PaLM (arXiv 2204.02311, appendix B), `2 N` a token and attention's two
    products, here over the pairs that a causal mask leaves. A backward pass takes
    twice as many; norms, rotations and softmax are left out.

    Args:
      model: The decoder.
      length: Tokens of the sequence.

    Returns:
      The count.
    """
    config = model.config
    value_dim = config.head_dim if config.latent is None else config.latent.value_dim
    each = 2 * config.num_heads * (config.head_dim + value_dim)
    full = length * (length + 1) / 2
    pairs = config.num_layers * full
    if config.sliding_window is not None and length > config.sliding_window:
        beyond = length - config.sliding_window
        pairs -= len(config.sliding_layers) * beyond * (beyond + 1) / 2
    return 2.0 * token_weights(model) * length + each * pairs
