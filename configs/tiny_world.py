"""The bundled tiny world: three small Qwen3 checkpoints and their problems.

    python -m experiments.tiny_world

Takes about two minutes on 2 CPU cores. Supervised training on chained arithmetic
modulo 10; `base`, `anchor` and `teacher` are snapshots of one run, so the anchor is the
base after more training and the teacher is the anchor after more. All settings are
ours.
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    """The recipe of the committed artifacts."""
    return ml_collections.ConfigDict(
        {
            "seed": 0,
            "operations": (3, 4),
            # Share of training answers with one wrong value, from which the chain goes
            # on: the student will make mistakes, and the teacher must know them.
            "slips": 0.5,
            # Qwen3 architecture, small. Initial scale 1/sqrt(fan-in).
            "model": {
                "hidden_size": 128,
                "intermediate_size": 384,
                "num_layers": 2,
                "num_heads": 4,
                "num_kv_heads": 2,
                "head_dim": 32,
                # Contexts have 15 tokens; at 10,000 most frequencies stand still.
                "rope_theta": 100.0,
                "max_position_embeddings": 64,
            },
            "learning_rate": 2e-3,
            "warmup_steps": 20,
            "batch_size": 64,
            # The base has seen the format; the anchor is the first evaluated snapshot
            # whose greedy accuracy reaches anchor_accuracy.
            "base_steps": 150,
            "anchor_accuracy": 0.3,
            "evaluate_every": 10,
            # The teacher's rate falls to zero over its last steps.
            "max_anchor_steps": 2000,
            "teacher_steps": 2000,
            "num_problems": 6000,
            "num_test": 1024,
            "num_validation": 512,
        }
    )
