r"""P1's runs on DAPO-Math-17K, line by line (arXiv 2606.13657, Table 5, Figure 3).

    python -m experiments.describe --config=configs/p1_opd.py
    python -m experiments.optimizer_ablation --workdir=runs/p1 \
        --config=configs/p1_opd.py:justrl

Variants: `deepscaler` (the teacher of the masks, default) and `justrl` (the teacher of
AdamW against SGD). Written for accelerators; it has been built and described here, and
not run. What else Table 5 gives, of the evaluation and the machines, stands in
`get_besides`: no part of this run, and described with it.
"""

import ml_collections

from configs import optimizer_ablation
from configs.marks import Fields, Mark, marks, ours, over, paper, values

_TEACHERS = {
    "deepscaler": "agentica-org/DeepScaleR-1.5B-Preview",
    "justrl": "hbx/JustRL-DeepSeek-1.5B",
}
_SILENT = "P1 gives none"


def get_fields(variant: str = "deepscaler") -> Fields:
    """Every field with its mark."""
    if variant not in _TEACHERS:
        raise ValueError(f"variant {variant!r}; known: {', '.join(_TEACHERS)}")
    base = optimizer_ablation.get_config()
    adamw = {
        "transform": paper("adamw", "Table 5"),
        "learning_rates": paper((1e-6,), "Table 5"),
        "clip_norm": ours(1.0, f"{_SILENT}; verl's default"),
        "options": {
            "b1": ours(0.9, _SILENT),
            "b2": ours(0.999, _SILENT),
            "eps": ours(1e-8, _SILENT),
            "weight_decay": ours(0.01, f"{_SILENT}; optax would take 1e-4"),
        },
    }
    sgd = {
        "transform": paper("sgd", "section 5"),
        "learning_rates": paper((1e-2,), "Table 5, the SGD ablation"),
        "clip_norm": ours(0.0, "vanilla SGD; P1 mentions no clipping"),
        "options": {},
    }
    arms = {
        "adamw": ("adamw", "none"),
        "sgd": ("sgd", "none"),
        "adamw_opd_mask": ("adamw", "own"),
        "adamw_random_mask": ("adamw", "random"),
        # The RLVR mask: where the teacher, trained by RLVR from the student, differs.
        "adamw_teacher_mask": ("adamw", "teacher"),
    }
    fields: Fields = {
        "student": paper("deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B", "Table 7"),
        "teacher": paper(_TEACHERS[variant], "Table 7"),
        "prompts": paper("dapo-math-17k", "Table 7"),
        "optimizers": {"adamw": adamw, "sgd": sgd},
        "arms": {
            name: {
                "optimizer": paper(optimizer, "Figure 3"),
                "mask": paper(mask, "Figure 3"),
            }
            for name, (optimizer, mask) in arms.items()
        },
        # Not read beside a threshold: the random mask then has the own mask's density.
        "mask_density": paper(0.175, "Figure 3: of the OPD and the random mask"),
        # Of bfloat16 weights: P1's masks hold what its sparsities (Table 2) leave.
        "mask_threshold": paper(1e-5, "section 5: of the OPD and the RLVR mask"),
        "objective": paper("sampled_token", "Table 5: k1, policy-gradient style"),
        "ratio_clip": ours(0.2, f"{_SILENT}; verl's default"),
        "prompts_per_step": paper(128, "Table 5: train batch size"),
        "samples_per_prompt": paper(4, "Table 5: rollout n"),
        "mini_batches": paper(4, "Table 5: mini-batches of 32 prompts"),
        "micro_batches": ours(16, "memory: 8 sequences at a time"),
        "num_steps": ours(135, "Table 5: 1 epoch, of 17,398 distinct prompts"),
        "temperature": ours(1.0, f"{_SILENT}; 1.0 in the scripts that it follows"),
        "max_prompt_tokens": paper(1024, "Table 5"),
        "max_new_tokens": paper(7168, "Table 5: train response length"),
        "schedule": ours("constant", _SILENT),
        "warmup_steps": ours(0, _SILENT),
        "seeds": ours((0,), _SILENT),
        "evaluate_every": paper(10, "Table 5"),
        "save_every": ours(10, _SILENT),
        "validation_fraction": ours(0.01, "for the divergence alone"),
        "test_fraction": ours(0.0, "P1 evaluates on AIME 2024 and 2025"),
        "evaluation_batch": ours(64, "memory"),
        "overlong": ours("drop", f"{_SILENT}; verl filters prompts over the limit"),
        "accuracy": ours(False, "P1's is mean@16 on AIME: experiments.evaluate"),
        "compute_dtype": ours("bfloat16", "master weights stay float32; " + _SILENT),
    }
    fields = over(base, fields, "the ablation's own")
    fields["data"]["remove_duplicates"] = ours(
        True, "the published file repeats each prompt about a hundred times"
    )
    return fields


def get_besides() -> Fields:
    """What the table gives and the run does not take.

    `evaluate` are flags of `experiments.evaluate`, on the exported checkpoints.
    """
    script = "the default of the scripts that it follows"
    return {
        "evaluate": {
            "suite": paper("aime24,aime25", "Table 5"),
            "samples": paper(16, "Table 5: mean@16"),
            "max_new_tokens": paper(15_360, "Table 5: validation response length"),
            "temperature": ours(0.7, f"{_SILENT}; {script}"),
            "top_p": ours(0.95, f"{_SILENT}; {script}"),
        },
        "gpus": {
            "actor": paper(4, "Table 5, of one node; here one mesh holds both models"),
            "teacher": paper(2, "Table 5"),
        },
    }


def get_marks(variant: str = "deepscaler") -> dict[str, Mark]:
    """The mark of every field, and of what stands besides, by dotted name."""
    return marks(get_fields(variant)) | marks(get_besides(), "besides.")


def get_config(variant: str = "deepscaler") -> ml_collections.ConfigDict:
    """The configuration of a variant: deepscaler or justrl."""
    return values(get_fields(variant))
