"""P1's vision-language run on Geometry3K, line by line (arXiv 2606.13657, Table 6).

    python -m experiments.describe --config=configs/p1_vl_opd.py

A description: `experiments.optimizer_ablation` trains on such prompts, but not with
this objective, forward KL on the teacher's 32 most likely tokens, which is
`geomjax.objectives.top_k`.
"""

import ml_collections

from configs.marks import Fields, Mark, marks, ours, paper, values

_SILENT = "P1 gives none"


def get_fields() -> Fields:
    """Every field with its mark."""
    return {
        "student": paper("Qwen/Qwen2.5-VL-3B-Instruct", "Table 7"),
        "teacher": paper("NoisyRollout-Geo3K-7B", "Table 7, without a repository"),
        "prompts": paper("geometry3k", "Table 7"),
        "objective": paper("forward_kl_top_k", "Table 6"),
        "top_k": paper(32, "Table 6"),
        "optimizers": {
            "adamw": {
                "transform": paper("adamw", "Table 6"),
                "learning_rates": paper((1e-6,), "Table 6"),
                "clip_norm": ours(1.0, f"{_SILENT}; verl's default"),
            }
        },
        "prompts_per_step": paper(128, "Table 6: train batch size"),
        "samples_per_prompt": paper(1, "Table 6: rollout n"),
        "mini_batches": paper(4, "Table 6: mini-batches of 32 prompts"),
        "micro_batches": ours(4, "memory"),
        "num_steps": ours(164, "Table 6: 10 epochs, of 2,101 prompts"),
        "temperature": ours(1.0, _SILENT),
        "max_prompt_tokens": paper(1024, "Table 6"),
        "max_new_tokens": paper(2048, "Table 6"),
        "schedule": ours("constant", _SILENT),
        "evaluate_every": paper(10, "Table 6; on Geometry3K's validation split"),
        "evaluate_samples": paper(1, "Table 6: mean@1"),
        "compute_dtype": ours("bfloat16", "master weights stay float32; " + _SILENT),
    }


def get_marks() -> dict[str, Mark]:
    """Every field's mark, by dotted name."""
    return marks(get_fields())


def get_config() -> ml_collections.ConfigDict:
    """The configuration."""
    return values(get_fields())
