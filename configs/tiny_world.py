"""The bundled tiny world: three small Qwen3 checkpoints and their problems; its kin.

    python -m experiments.tiny_world
    python -m experiments.tiny_world --output=DIR --config=configs/tiny_world.py:scripts

Takes about two minutes on 2 CPU cores. Supervised training on chained arithmetic
modulo 10; `base`, `anchor` and `teacher` are snapshots of one run, so the anchor is the
base after more training and the teacher is the anchor after more. All settings are
ours.

The variants are worlds that are not bundled, but built where they are first needed:

- `scripts`: the same task in the digits of thirteen scripts, 136 tokens, which come in
  one after another once the model calculates, with the answer in front of some prompts,
  so that a model can be asked with privileged information;
- `deep`: the same task with 6 layers of width 256 (4.7 million parameters), for what
  needs depth or rank; some 0.4 s of one CPU core a step, 17 minutes in all. Its teacher
  has 61 % on the test problems, its anchor 32 %;
- `extremes`: another task of the same form and size, chains of minima and maxima;
- `midsize`: longer chains with 12 layers of width 768 (104 million parameters), for one
  GPU: some 100 s of an H100. It learns all at once, so that the anchor is above 50 %
  and differs from one GPU run to the next: 57 and 86 % in two.
"""

import ml_collections

VARIANTS = ("scripts", "deep", "extremes", "midsize")


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    """The recipe of the committed artifacts, or of a variant."""
    config = _bundled()
    if variant == "scripts":
        config.scripts = 13
        config.hints = 0.3
        # More to learn: which characters are the same digit, and how to read a hint.
        # It learns to calculate in one script before it meets the others.
        config.one_script_steps = 600
        config.script_every = 75
        config.teacher_steps = config.max_anchor_steps = 3000
    elif variant == "deep":
        config.model.update(
            hidden_size=256,
            intermediate_size=768,
            num_layers=6,
            num_heads=8,
            num_kv_heads=4,
        )
        config.learning_rate = 1e-3
        config.batch_size = 32
        config.base_steps = 100
        config.teacher_steps = config.max_anchor_steps = 2500
    elif variant == "extremes":
        config.operators = "<>"
        config.base_steps = 50
    elif variant == "midsize":
        config.operations = (5, 8)
        config.model.update(
            hidden_size=768,
            intermediate_size=3072,
            num_layers=12,
            num_heads=12,
            num_kv_heads=4,
            head_dim=64,
        )
        config.compute_dtype = "bfloat16"
        config.learning_rate = 5e-4
        config.warmup_steps = 100
        config.batch_size = 512
        config.base_steps = 100
        config.teacher_steps = config.max_anchor_steps = 500
        config.num_problems = 20000
    elif variant:
        raise ValueError(f"variant {variant!r}; known: {', '.join(VARIANTS)}, or none")
    return config


def _bundled() -> ml_collections.ConfigDict:
    return ml_collections.ConfigDict(
        {
            "seed": 0,
            "operations": (3, 4),
            # Sum and difference; "<>" for minimum and maximum.
            "operators": "+-",
            # Scripts that problems are written in, each in one.
            "scripts": 1,
            # Steps with the first script alone, and steps after which each further one
            # comes in; 0: all from the start.
            "one_script_steps": 0,
            "script_every": 0,
            # Share of training prompts with the answer in front.
            "hints": 0.0,
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
            "compute_dtype": "float32",
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
