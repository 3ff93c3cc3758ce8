"""Group-relative advantages of a verifiable reward (GRPO)."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

_EPSILON = 1e-6


class GroupAdvantages(NamedTuple):
    """Advantages of the rows of a rollout.

    Attributes:
      advantages: `[B]` float32; 0 in groups without contrast.
      contrast: `[B]` bool, whether the rewards of the row's group differ; False for a
        row whose reward is unknown.
    """

    advantages: Float[Array, " B"]
    contrast: Bool[Array, " B"]


def group_advantages(
    rewards: Float[Array, " B"],
    group_size: int,
    known: Bool[Array, " B"] | None = None,
) -> GroupAdvantages:
    """Rewards normalised within their group, P1 eq. (7).

    `A_i = (r_i - mean(r)) / (std(r) + 1e-6)` over the n completions of one prompt, with
    the standard deviation of a sample (division by n - 1), as verl computes it; neither
    P1 nor P2 says which. A group whose rewards are all equal teaches nothing: its rows
    are marked, so that they can be left out and counted (the dynamic filtering of P2
    and DAPO, which draws other prompts in their place; here the batch shrinks instead).

    Differs from eq. (7) in how the loss is reduced: there it is a mean over each
    response's tokens, `1/|y_i|`, and then over responses; by `token_mean` every token
    of a mini-batch weighs the same, which is ours (and DAPO's).

    Args:
      rewards: Rewards, the n rows of a prompt adjacent.
      group_size: n, completions of a prompt.
      known: Rows whose reward says something; None for all. The others are in no mean
        and no deviation, and have neither advantage nor contrast; a group of fewer than
        two known rows has none.

    Returns:
      Advantages and contrast.

    Raises:
      ValueError: Groups of one, which have no contrast by construction, or rows that do
        not make whole groups.
    """
    if group_size < 2:
        raise ValueError(
            f"groups have {group_size} completion; GRPO compares the completions of a "
            "prompt, so samples_per_prompt must be 2 or more"
        )
    if rewards.shape[0] % group_size:
        raise ValueError(
            f"{rewards.shape[0]} rewards do not make whole groups of {group_size}"
        )
    groups = rewards.reshape(-1, group_size)
    mean = groups.mean(axis=1, keepdims=True)
    deviation = jnp.std(groups, axis=1, ddof=1, keepdims=True)
    contrast = (groups != groups[:, :1]).any(axis=1, keepdims=True)
    if known is not None:
        there = known.reshape(groups.shape)
        # Whole groups keep the mean and deviation of above, to the last bit.
        whole = there.all(axis=1, keepdims=True)
        count = there.sum(axis=1, keepdims=True).astype(groups.dtype)
        of_known = jnp.where(there, groups, 0.0).sum(axis=1, keepdims=True)
        mean = jnp.where(whole, mean, of_known / jnp.maximum(count, 1.0))
        square = jnp.where(there, (groups - mean) ** 2, 0.0).sum(axis=1, keepdims=True)
        of_known = jnp.sqrt(square / jnp.maximum(count - 1.0, 1.0))
        deviation = jnp.where(whole, deviation, of_known)
        least = jnp.where(there, groups, jnp.inf).min(axis=1, keepdims=True)
        contrast = there & (there & (groups != least)).any(axis=1, keepdims=True)
    advantages = jnp.where(contrast, (groups - mean) / (deviation + _EPSILON), 0.0)
    return GroupAdvantages(
        advantages.reshape(-1), jnp.broadcast_to(contrast, groups.shape).reshape(-1)
    )
