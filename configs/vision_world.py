"""The small vision-language world: a Qwen2.5-VL that reads drawn shapes.

    python -m experiments.vision_world --output=runs/vision_world

Takes about two minutes on 2 CPU cores. Supervised training on reading rows and columns
of shapes in a grid; `anchor` and `teacher` are snapshots of one run. `seed` moves
weights, images and questions. All settings are ours.
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    """The recipe."""
    return ml_collections.ConfigDict(
        {
            "seed": 0,
            # Share of training answers with one wrong letter, which is no target, so
            # that the teacher knows how to go on from a mistake.
            "slips": 0.5,
            "text": {
                "hidden_size": 96,
                "intermediate_size": 256,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "max_position_embeddings": 64,
                "rms_norm_eps": 1e-6,
                "hidden_act": "silu",
                "tie_word_embeddings": False,
                "rope_parameters": {
                    "rope_type": "default",
                    # Rows and columns of 2 cells turn with the lower frequencies, so
                    # that these must not be low.
                    "rope_theta": 4.0,
                    "mrope_section": [4, 4, 4],
                },
            },
            # A cell of the grid, of 8 pixels, is one token and one window.
            "vision": {
                "depth": 2,
                "hidden_size": 64,
                "intermediate_size": 128,
                "num_heads": 4,
                "in_channels": 3,
                "patch_size": 4,
                "temporal_patch_size": 2,
                "spatial_merge_size": 2,
                "window_size": 8,
                "out_hidden_size": 96,
                "fullatt_block_indexes": [1],
                "hidden_act": "silu",
            },
            "learning_rate": 2e-3,
            "warmup_steps": 50,
            "batch_size": 64,
            # Distinct images to train on; image and question are drawn at random.
            "num_training_images": 4096,
            # The anchor is the first evaluated snapshot whose greedy accuracy reaches
            # anchor_accuracy; the rate falls to zero over the teacher's steps.
            "anchor_accuracy": 0.3,
            "evaluate_every": 5,
            "teacher_steps": 600,
            # The prompts file: images that were not trained on, one question each.
            "num_problems": 4000,
            # Problems, of yet other images, that accuracy is measured on here.
            "num_validation": 512,
        }
    )
