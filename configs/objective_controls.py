r"""What in the signal shapes the update: tokens, rollouts, mixtures (P2, Figures 7, 9).

    python -m experiments.objective_controls --workdir=runs/controls
    python -m experiments.objective_controls --workdir=runs/smoke \
        --config=configs/objective_controls.py:smoke

Variants: `tiny` (the tiny world, 39 runs), `smoke` (five arms, one seed), `paper`
(P2's settings and model names; a description, for a cluster).

P2 = arXiv 2606.07082. "ours" marks what the paper does not give, or what the tiny world
changes.
"""

import ml_collections

from configs import study

ALPHAS = (0.75, 0.5, 0.25, 0.05, 0.01)
KEPT = (0.25, 0.5)


def get_config(variant: str = "tiny") -> ml_collections.ConfigDict:
    """The configuration of a variant: tiny, smoke or paper."""
    config = study.tiny()
    rate = 1e-4  # ours, for all arms: the ablation's for OPD. P2: 1e-6.
    arm = {"kind": "distill", "alpha": 1.0, "keep": 1.0, "by_gap": True}
    arms = {"opd": arm}
    for share in KEPT:
        label = f"{100 * share:.0f}"
        arms[f"top_{label}"] = arm | {"keep": share}
        arms[f"random_{label}"] = arm | {"keep": share, "by_gap": False}
    # The teacher's rollouts; the importance ratio is clipped at 1.0.
    arms["off_policy"] = arm | {"kind": "foreign"}
    for alpha in ALPHAS:
        arms[f"mix_{100 * alpha:02.0f}"] = arm | {"alpha": alpha}
    # The end of the mixtures, and supervised training for P1's heterogeneity figures.
    arms["rlvr"] = arm | {"alpha": 0.0}
    arms["sft"] = arm | {"kind": "responses"}
    config.arms = {
        name: fields | {"learning_rate": rate} for name, fields in arms.items()
    }
    # Matrices whose per-token gradients are measured before training, all of it ours:
    # P2 argues with E[g g^T] and measures none.
    config.moment_matrices = (
        "layers.self_attn.q_proj:0",
        "layers.self_attn.o_proj:1",
        "layers.mlp.down_proj:1",
    )
    if variant == "smoke":
        study.shrink(config)
        config.snapshot_shares = ()
        # Foreign rollouts and supervised training have programs of their own.
        kept = ("opd", "top_25", "random_25", "mix_50", "rlvr")
        config.arms = {name: config.arms[name].to_dict() for name in kept}
        config.moment_matrices = ("layers.self_attn.o_proj:1",)
    elif variant == "paper":
        study.paper(config)
        for fields in config.arms.values():
            fields.learning_rate = 1e-6
        # None: a gradient for each of 524,288 tokens would be held at once.
        config.moment_matrices = ()
    elif variant != "tiny":
        raise ValueError(f"variant {variant!r}; known: tiny, smoke, paper")
    return config
