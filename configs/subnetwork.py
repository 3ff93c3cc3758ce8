r"""Which coordinates training needs: masks, densities and overlaps (P1, Table 4).

    python -m experiments.subnetwork --workdir=runs/subnetwork
    python -m experiments.subnetwork --workdir=runs/vision \
        --config=configs/subnetwork.py:vision

Variants: `tiny` (the tiny world, 66 short runs), `smoke` (OPD and some of its
masks, two seeds), `vision` (a small Qwen2.5-VL that reads drawn shapes, built on first
use: P1's Figure 7 in 24 runs), `vision_smoke` (the same at its smallest), `midsize`
(104 million parameters, OPD alone, for one GPU), `midsize_smoke` (the same in the
bundled world), `paper` (P1's settings and model names; a description, for a cluster).

P1 = arXiv 2606.13657. "ours" marks what the paper does not give, or what the tiny world
changes.
"""

import ml_collections

from configs import p1_opd, study


def get_config(variant: str = "tiny") -> ml_collections.ConfigDict:
    """The configuration of a variant, see above."""
    config = study.tiny()
    # Changes to the recipe of the small vision-language world, where `world` is vision.
    config.vision_recipe = {}
    # Full runs. All train at the ablation's rate, masked runs too: P1 keeps the rate.
    config.arms = {
        "opd": {"kind": "distill", "start": "anchor", "learning_rate": 1e-4},
        "rlvr": {"kind": "reward", "start": "anchor", "learning_rate": 1e-4},
        "opd_other_teacher": {
            "kind": "distill",
            "start": "anchor",
            "learning_rate": 1e-4,
        },
    }
    # The other teacher: a checkpoint, or empty for one that is trained from nothing by
    # the tiny world's recipe with these fields changed: another initialization and
    # other problems, so that it shares no weights with the first teacher or the anchor;
    # none of its problems is one that the study holds out.
    config.other_teacher = ""
    config.other_recipe = {"seed": 1}
    # Kinds of mask (`experiments.studies.masks.RULES`), or paths of mask files; P1 has
    # own, rlvr and random, the others are ours.
    config.masks = (
        "own",
        "rlvr",
        "other_teacher",
        "other_seed",
        "random",
        "matched_random",
        "low",
        "nonprincipal",
        "low_nonprincipal",
    )
    # The density of P1's OPD mask, for all kinds: P1's RLVR mask had 22.1 %. Mask files
    # have their own.
    config.density = 0.175
    # Ours: further densities, of some kinds. The full run is the one of 100 %.
    config.curve_masks = ("own", "random", "low_nonprincipal")
    config.curve_densities = (0.01, 0.05, 0.5)
    # P1's optimizer is the ablation's here, betas and decay included, and its clipping
    # of the ratio is symmetric.
    config.optimizer.options.b2 = 0.999
    config.ratio_clip = (0.2, 0.2)
    config.snapshot_shares = ()
    # Shorter than the ablation's 200 steps, so that many runs fit; ours.
    config.num_steps = 60
    config.evaluate_every = 6
    config.save_every = 60
    config.test_fraction = 0.15
    config.evaluation_batch = 320
    if variant == "smoke":
        _shrink(config)
    elif variant in ("vision", "vision_smoke"):
        _vision(config)
        if variant == "vision_smoke":
            _shrink_vision(config)
    elif variant in ("midsize", "midsize_smoke"):
        _midsize(config)
        if variant == "midsize_smoke":
            study.shrink_midsize(config)
    elif variant == "paper":
        _paper(config)
    elif variant != "tiny":
        raise ValueError(
            f"variant {variant!r}; known: tiny, smoke, vision, vision_smoke, midsize, "
            "midsize_smoke, paper"
        )
    return config


def _shrink(config: ml_collections.ConfigDict) -> None:
    """OPD alone: compiling is what takes time, and RLVR would double it."""
    study.shrink(config)
    config.seeds = (0, 1)  # For the overlap of two supports.
    del config.arms["rlvr"], config.arms["opd_other_teacher"]
    config.masks = ("own", "random", "low_nonprincipal")
    config.curve_masks = ("own",)
    config.curve_densities = (0.01,)
    config.num_steps = config.save_every = config.evaluate_every = 4
    config.snapshot_shares = ()


def _midsize(config: ml_collections.ConfigDict) -> None:
    """P1's masks at a size that learns at rates near the papers'."""
    # At 1e-6 the gain that masks may keep or lose is less than half as large.
    study.midsize(config, rate=1e-5)
    config.snapshot_shares = ()
    # Another teacher would be another model of that size, trained from nothing.
    del config.arms["opd_other_teacher"], config.arms["rlvr"]
    config.masks = ("own", "random", "matched_random", "low")
    config.curve_masks = config.curve_densities = ()


def _vision(config: ml_collections.ConfigDict) -> None:
    """P1's vision-language run in small: Table 6, and the masks of Figure 7.

    P1 has a top-k of 32 out of some 150,000 tokens; here it is 4 of 17. Its samples a
    prompt are 1; here 4, as GRPO compares them.
    """
    config.world = "vision"
    del config.arms["opd_other_teacher"]
    config.arms.opd.kind = "top_k:forward_kl:4:teacher:bucket"
    config.masks = ("own", "rlvr", "random")
    config.density = 0.333  # P1: about a third, the density of its OPD mask.
    # P1's GRPO mask is sparser than its OPD mask, and has a random twin of its own.
    config.curve_masks = ("rlvr", "random")
    config.curve_densities = (0.093,)
    config.max_new_tokens = 5
    config.test_fraction = 0.15


def _shrink_vision(config: ml_collections.ConfigDict) -> None:
    study.shrink(config)
    # A model that is hardly trained gets no reward, so that RLVR would not move.
    del config.arms["rlvr"]
    config.masks = ("own", "random")
    config.curve_masks = ("random",)
    config.num_steps = config.save_every = 2
    config.evaluate_every = 1
    config.prompts_per_step, config.samples_per_prompt = 4, 2
    config.validation_fraction = config.test_fraction = 0.2
    config.evaluation_batch = 16
    config.snapshot_shares = ()
    config.vision_recipe = {
        "num_training_images": 16,
        "anchor_accuracy": 0.0,
        "evaluate_every": 2,
        "warmup_steps": 1,
        "teacher_steps": 4,
        "batch_size": 4,
        "num_problems": 64,
        "num_validation": 16,
        # Few widths: each has measuring programs of its own, which must be compiled.
        "text": {"num_hidden_layers": 1, "num_key_value_heads": 4},
        "vision": {"hidden_size": 24, "intermediate_size": 96, "num_heads": 2},
    }


def _paper(config: ml_collections.ConfigDict) -> None:
    """P1's settings, from configs/p1_opd.py, where each has its source.

    P1 takes its RLVR mask from the public DeepScaleR; here RLVR is trained anew. Its
    accuracy is mean@16 on AIME 2024 and 2025; here a tenth of the prompts is held out.
    """
    ablation = p1_opd.get_config("deepscaler")
    for name in (
        "student",
        "teacher",
        "prompts",
        "prompts_per_step",
        "samples_per_prompt",
        "mini_batches",
        "micro_batches",
        "num_steps",
        "temperature",
        "max_prompt_tokens",
        "max_new_tokens",
        "seeds",
        "evaluate_every",
        "save_every",
        "evaluation_batch",
        "overlong",
        "compute_dtype",
    ):
        config[name] = ablation[name]
    config.data.remove_duplicates = True
    config.base = config.student  # No run starts from it.
    config.other_teacher = p1_opd.get_config("justrl").teacher
    config.other_recipe = {}
    config.validation_fraction = 0.01
    config.test_fraction = 0.1
    config.reward.name = "math"
    config.optimizer.options.weight_decay = 0.01
    config.masks = tuple(m for m in config.masks if m != "other_seed")
    for arm in config.arms.values():
        arm.learning_rate = 1e-6
