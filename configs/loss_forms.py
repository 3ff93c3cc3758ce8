r"""The forms of the distillation loss, and the noise of their gradients.

    python -m experiments.loss_forms --workdir=runs/forms
    python -m experiments.loss_forms --workdir=runs/smoke \
        --config=configs/loss_forms.py:smoke

Variants: `tiny` (the tiny world, 24 runs), `smoke` (about a minute), `paper` (the
settings of P2 with the forms of P1 and thunlp/OPD; a description, for a cluster).
"""

import ml_collections

from configs import study


def get_config(variant: str = "tiny") -> ml_collections.ConfigDict:
    """The configuration of a variant: tiny, smoke or paper."""
    config = study.tiny()
    # The tiny world has 16 tokens, of which 4 are a quarter. P1's vision-language run
    # has a forward KL with k = 32, thunlp/OPD a reverse KL renormalised on the
    # student's 16. All else is ours.
    k, forward_k = (16, 32) if variant == "paper" else (4, 4)
    kinds = {
        "sampled_token": "distill",
        "reverse_kl": "reverse_kl",
        "forward_kl": "forward_kl",
        "jsd": "jsd",
        "top_reverse_renormalised": f"top_k:reverse_kl:{k}:student:renormalise",
        "top_reverse_bucket": f"top_k:reverse_kl:{k}:student:bucket",
        "top_forward_renormalised": f"top_k:forward_kl:{forward_k}:teacher:renormalise",
        "top_forward_bucket": f"top_k:forward_kl:{forward_k}:teacher:bucket",
    }
    if variant == "smoke":
        kept = ("sampled_token", "reverse_kl", "top_reverse_bucket")
        kinds = {name: kinds[name] for name in kept}
    # One rate for all, the ablation's for the sampled token; ours.
    config.arms = {
        name: {"kind": kind, "learning_rate": 1e-4} for name, kind in kinds.items()
    }
    config.moment_matrices = (
        "layers.self_attn.q_proj:0",
        "layers.self_attn.o_proj:1",
        "layers.mlp.down_proj:1",
    )
    if variant == "smoke":
        study.shrink(config)
        config.moment_matrices = ("layers.self_attn.o_proj:1",)
    elif variant == "paper":
        study.paper(config)
        for arm in config.arms.values():
            arm.learning_rate = 1e-6
        # None: a gradient for each of 524,288 tokens would be held at once.
        config.moment_matrices = ()
    elif variant != "tiny":
        raise ValueError(f"variant {variant!r}; known: tiny, smoke, paper")
    return config
