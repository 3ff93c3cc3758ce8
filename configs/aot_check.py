r"""Which run is compiled for a TPU slice, see `experiments.aot_check`.

    python -m experiments.aot_check --config=configs/aot_check.py:ds_qwen_1_5b \
        --topology=v5e:4x4

Variants: `qwen3_1_7b` (teacher Qwen3-4B), `ds_qwen_1_5b` (DeepSeek-R1-Distill-Qwen-1.5B
and JustRL-1.5B, which has its shape: P1) and `qwen3_8b` (teacher Qwen3-32B: P2).

P1 = arXiv 2606.13657, P2 = arXiv 2606.07082; "ours" marks what they do not give.
"""

import ml_collections


def get_config(variant: str = "ds_qwen_1_5b") -> ml_collections.ConfigDict:
    """The configuration of a variant: qwen3_1_7b, ds_qwen_1_5b or qwen3_8b."""
    distilled = "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B"
    variants = {
        "qwen3_1_7b": ("Qwen/Qwen3-1.7B", "Qwen/Qwen3-4B", 1024, 7168, 151669),
        "ds_qwen_1_5b": (distilled, distilled, 1024, 7168, 151665),
        # P2 gives no length of responses: ours.
        "qwen3_8b": ("Qwen/Qwen3-8B", "Qwen/Qwen3-32B", 1024, 7168, 151669),
    }
    if variant not in variants:
        raise ValueError(f"variant {variant!r}; known: {sorted(variants)}")
    student, teacher, prompt, response, tokens = variants[variant]
    config = ml_collections.ConfigDict(
        {
            # Their shapes are in `experiments/recipe/published.py`.
            "student": {"name": student},
            "teacher": {"name": teacher},
            "tokenizer_size": tokens,
            "max_prompt_tokens": prompt,
            "max_new_tokens": response,
            # P1: 128 prompts, 4 samples each, 4 mini-batches. Those of an optimizer
            # update, 128, are accumulated a sequence a chip at a time (ours), and the
            # rollout draws so many sequences at a time (ours; P1's 512 in parts).
            "sequences_per_update": 128,
            "sequences_per_rollout": 128,
            "sequences_per_chip": 1,
            # Empty: fsdp over all chips.
            "mesh": "",
            # Ours: tokens whose logits a chip holds whole, recomputation of each block.
            "loss_chunk_tokens": 1024,
            "remat": True,
            # 0 for the models' own; a few, to see whether everything compiles.
            "layers": 0,
        }
    )
    return config
