"""P2's three regimes, line by line (arXiv 2606.07082, appendix C).

    python -m experiments.describe --config=configs/p2.py:opd

Variants: `sft`, `opd` (default) and `rlvr`. Descriptions for `experiments.describe`:
they name P2's models and sizes, of which nothing was run. P2's batches count sequences:
OPD and RLVR sample 8 for a prompt.
"""

import ml_collections

from configs.marks import Fields, Mark, marks, ours, paper, values

_SILENT = "P2 gives none"
_ANCHOR = "the checkpoint that P2's SFT ends in is not public"


def get_fields(variant: str = "opd") -> Fields:
    """Every field with its mark."""
    regimes = {"sft": _sft, "opd": _opd, "rlvr": _rlvr}
    if variant not in regimes:
        raise ValueError(f"variant {variant!r}; known: {', '.join(regimes)}")
    return regimes[variant]()


def get_marks(variant: str = "opd") -> dict[str, Mark]:
    """Every field's mark, by dotted name."""
    return marks(get_fields(variant))


def get_config(variant: str = "opd") -> ml_collections.ConfigDict:
    """The configuration of a variant: sft, opd or rlvr."""
    return values(get_fields(variant))


def _adam(rate: float, b2: float, eps: object) -> Fields:
    return {
        "adamw": {
            "transform": paper("adamw", "Adam with decay, appendix C"),
            "learning_rates": paper((rate,), "appendix C"),
            "clip_norm": ours(1.0, _SILENT),
            "options": {
                "b1": paper(0.9, "appendix C"),
                "b2": paper(b2, "appendix C"),
                "eps": eps,
                "weight_decay": paper(0.1, "appendix C"),
            },
        }
    }


def _precision() -> Fields:
    return {
        "compute_dtype": paper("bfloat16", "appendix C"),
        "master_dtype": ours("float32", "P2: gradients accumulate in float32"),
    }


def _sft() -> Fields:
    return {
        "student": paper("Qwen/Qwen3-8B-Base", "appendix C"),
        "prompts": paper(
            "dolci-think-sft", "appendix C; 7B or 32B variant not said, ours: 7B"
        ),
        "objective": paper("cross_entropy", "appendix C"),
        "replies": ours("last", f"{_SILENT}; Qwen3's template drops earlier thinking"),
        "optimizers": _adam(1e-5, 0.95, ours(1e-8, _SILENT)),
        "sequences_per_step": paper(256, "appendix C: batch size"),
        "micro_batches": ours(32, "memory"),
        "num_steps": paper(5375, "appendix C: the last of 5 epochs"),
        "schedule": paper("cosine", "appendix C: from 1e-5 to 1e-6"),
        "final_learning_rate": paper(1e-6, "appendix C"),
        "warmup_steps": paper(537, "appendix C: 10 % of the steps"),
        "max_sequence_tokens": ours(16384, _SILENT),
        "packing": ours(True, _SILENT),
        "save_every": paper(256, "appendix C"),
        **_precision(),
    }


def _rollouts() -> Fields:
    return {
        "student": ours("qwen3-8b-sft-anchor", _ANCHOR),
        "prompts": paper("dapo-math-17k", "appendix C"),
        "samples_per_prompt": paper(8, "appendix C"),
        "temperature": paper(1.0, "appendix C"),
        "max_prompt_tokens": ours(1024, _SILENT),
        "max_new_tokens": ours(8192, _SILENT),
        "schedule": paper("constant", "appendix C"),
    }


def _opd() -> Fields:
    return {
        **_rollouts(),
        "teacher": paper("Qwen/Qwen3-32B", "appendix C"),
        "objective": paper("sampled_token", "appendix C: coefficient 1.0, no KL"),
        "optimizers": _adam(1e-6, 0.98, ours(1e-8, _SILENT)),
        "prompts_per_step": ours(
            8,
            "P2: batch 64 and 8 samples, so 8 prompts; it also says 300 prompts a step",
        ),
        "mini_batches": ours(1, _SILENT),
        "micro_batches": ours(8, "memory"),
        "num_steps": paper(299, "appendix C"),
        "save_every": paper(64, "appendix C: steps 63, 127, 191, 255 and 299"),
        **_precision(),
    }


def _rlvr() -> Fields:
    return {
        **_rollouts(),
        "objective": paper("grpo", "appendix C: no KL, no entropy term"),
        "reward": {
            "name": ours("math", "P2: the binary reward of DeepScaleR"),
        },
        "ratio_clip": paper((0.2, 0.28), "appendix C"),
        "drop_groups_without_contrast": paper(True, "appendix C: dynamic filter"),
        "optimizers": _adam(1e-6, 0.98, paper(1e-15, "appendix C")),
        "prompts_per_step": ours(
            64,
            "P2: batch 512 and 8 samples, so 64 prompts; it also says 1,024 a step",
        ),
        "mini_batches": ours(1, _SILENT),
        "micro_batches": ours(64, "memory"),
        "num_steps": paper(1023, "appendix C"),
        **_precision(),
    }
