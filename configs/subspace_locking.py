r"""Training inside the first directions of the early update (P2, Figures 4 to 6, 8).

    python -m experiments.subspace_locking --workdir=runs/locking
    python -m experiments.subspace_locking --workdir=runs/smoke \
        --config=configs/subspace_locking.py:smoke

Variants: `tiny` (the tiny world, 48 runs, 36 of them shorter), `smoke` (OPD's 4 runs
of one seed), `tiny_deep` (a world of 6 layers and width 256, built on first
use, where 16 directions are fewer), `midsize` (104 million parameters, OPD alone,
for one GPU), `midsize_smoke` (the same in the bundled world), `paper` (P2's settings
and model names; a description, for a cluster).

P2 = arXiv 2606.07082. "ours" marks what the paper does not give, or what the tiny world
changes.
"""

import ml_collections

from configs import study


def get_config(variant: str = "tiny") -> ml_collections.ConfigDict:
    """The configuration of a variant, see above."""
    config = study.tiny()
    # P2 runs OPD and SFT, each from where its update is counted, SFT at ten times OPD's
    # rate. RLVR is ours, and so is `sft_anchor`: at OPD's start and rate it differs
    # from OPD in sequences and loss alone.
    config.arms = {
        "opd": {"kind": "distill", "start": "anchor", "learning_rate": 1e-4},
        "sft": {"kind": "responses", "start": "base", "learning_rate": 1e-3},
        "sft_anchor": {"kind": "responses", "start": "anchor", "learning_rate": 1e-4},
        "rlvr": {"kind": "reward", "start": "anchor", "learning_rate": 1e-4},
    }
    # P2: the first 16 right singular vectors of the update at about 20 % of training.
    # Of our matrices, whose smaller dimensions are 64 and 128, that is more: chance of
    # a similarity is 16 / n, and is shown. Embedding, unembedding and norms are trained
    # without a constraint; P2 does not say what it does with them.
    config.rank = 16
    config.basis_share = 0.2
    if variant == "smoke":
        study.shrink(config)
        config.basis_share = 0.34
        config.evaluate_every = 6
        # Each regime has two programs to compile.
        config.arms = {"opd": config.arms.opd.to_dict()}
    elif variant == "paper":
        study.paper(config)
        config.basis_share = 63 / 299
        for name, arm in config.arms.items():
            arm.learning_rate = 1e-5 if name == "sft" else 1e-6
    elif variant == "tiny_deep":
        study.deep(config)
    elif variant in ("midsize", "midsize_smoke"):
        # At 1e-6 the gain that may be kept or lost is less than half as large.
        study.midsize(config, rate=1e-5)
        config.arms = {"opd": config.arms.opd.to_dict()}
        if variant == "midsize_smoke":
            study.shrink_midsize(config)
    elif variant != "tiny":
        raise ValueError(
            f"variant {variant!r}; known: tiny, smoke, tiny_deep, midsize, "
            "midsize_smoke, paper"
        )
    return config
