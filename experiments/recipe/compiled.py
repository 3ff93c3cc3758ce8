"""A recipe as `experiments.aot_check` compiles it."""

import ml_collections

from configs.aot_check import get_config
from experiments.recipe.published import entries


def aot_config(
    recipe: ml_collections.ConfigDict, layers: int = 0
) -> ml_collections.ConfigDict:
    """The run of a recipe: its models, lengths and sequences.

    The rest is as in `configs/aot_check.py`. A rollout draws as many sequences at a
    time as an optimizer update takes, and the softmax has a row for each stored
    embedding, as the tokenizer's size is not known without it.

    Args:
      recipe: A configuration of on-policy distillation between text models.
      layers: Blocks of both models, to see whether everything compiles; 0 for all.

    Returns:
      The configuration.

    Raises:
      ValueError: The recipe is of something else, or a model is not known.
    """
    if "teacher" not in recipe or "samples_per_prompt" not in recipe:
        raise ValueError(
            "only on-policy distillation is compiled ahead of time; drop --topology"
        )
    models = {role: entries(recipe[role]) for role in ("student", "teacher")}
    sequences = recipe.prompts_per_step * recipe.samples_per_prompt
    config = get_config()
    config.update(
        {role: fields | {"name": recipe[role]} for role, fields in models.items()},
        tokenizer_size=min(fields["vocab_size"] for fields in models.values()),
        max_prompt_tokens=recipe.max_prompt_tokens,
        max_new_tokens=recipe.max_new_tokens,
        sequences_per_update=sequences // recipe.mini_batches,
        sequences_per_rollout=sequences // recipe.mini_batches,
        layers=layers,
    )
    return config
