r"""When each layer's update enters the channel that it ends in, per module.

    python -m experiments.dynamics --workdir=runs/dynamics
    python -m experiments.dynamics --workdir=runs/smoke \
        --config=configs/dynamics.py:smoke

Variants: `tiny` (the tiny world, 12 runs), `smoke` (OPD alone), `tiny_deep` (a
world of 6 layers and width 256, built on first use), `paper` (P2's settings and model
names; a description, for a cluster).

P1 = arXiv 2606.13657 and P2 = arXiv 2606.07082 name it as future work; rates and
regimes are those of `training_regimes`, the rest is ours.
"""

import ml_collections

from configs import study


def get_config(variant: str = "tiny") -> ml_collections.ConfigDict:
    """The configuration of a variant, see above."""
    config = study.tiny()
    config.arms = {
        "sft": {"kind": "responses", "start": "base", "learning_rate": 1e-3},
        "sft_anchor": {"kind": "responses", "start": "anchor", "learning_rate": 1e-4},
        "opd": {"kind": "distill", "start": "anchor", "learning_rate": 1e-4},
        "rlvr": {"kind": "reward", "start": "anchor", "learning_rate": 1e-4},
    }
    # Entries can be told apart to a twentieth of the run, early ones to a hundredth.
    config.snapshot_shares = (
        *(0.01, 0.02, 0.05),
        *(i / 20 for i in range(2, 20)),
    )
    if variant == "smoke":
        study.shrink(config)
        config.seeds = (0, 1)
        for name in ("sft", "sft_anchor", "rlvr"):
            del config.arms[name]
    elif variant == "paper":
        shares = config.snapshot_shares
        study.paper(config)
        config.snapshot_shares = shares
        for name, arm in config.arms.items():
            arm.learning_rate = 1e-5 if name == "sft" else 1e-6
    elif variant == "tiny_deep":
        study.deep(config)
    elif variant != "tiny":
        raise ValueError(f"variant {variant!r}; known: tiny, smoke, tiny_deep, paper")
    return config
