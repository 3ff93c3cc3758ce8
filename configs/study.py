"""What the configurations of the studies of training regimes share."""

import ml_collections

from configs import optimizer_ablation, p2

OTHERS = (
    "optimizers",
    "arms",
    "mask_density",
    "mask_threshold",
    "objective",
    "jsd_beta",
    "ratio_clip",
    "schedule",
    "warmup_steps",
    "frozen",
    "keep_checkpoints",
    "profile_steps",
    "export_masters",
)
"""Fields of the optimizer ablation that studies lack; the rest mean the same here, and
have its values."""


def tiny() -> ml_collections.ConfigDict:
    """The bundled tiny world, three seeds."""
    config = optimizer_ablation.get_config()
    for name in OTHERS:
        del config[name]
    # The checkpoint before the anchor's supervised training. Empty: the tiny world's.
    config.base = ""
    # A variant of configs/tiny_world.py, built on first use: what an empty student,
    # base, teacher or prompts stands for. Empty: the bundled world.
    config.world = ""
    # P2: Adam, decay 0.1, betas (0.9, 0.98) and, for RLVR, eps 1e-15. No decay here: at
    # our rates it would be a visible share of the update; at P2's 1e-6 it is not. The
    # clipping is ours; P2 gives none.
    config.optimizer = {
        "transform": "adamw",
        "clip_norm": 1.0,
        "options": {"b1": 0.9, "b2": 0.98, "eps": 1e-8, "weight_decay": 0.0},
    }
    # P2's clipping of the importance ratio, 1 - 0.2 to 1 + 0.28.
    config.ratio_clip = (0.2, 0.28)
    # Shares of a run at which its parameters are kept; the end always is.
    config.snapshot_shares = (0.05, 0.1, 0.2, 0.4, 0.6, 0.8)
    return config


def shrink(config: ml_collections.ConfigDict) -> None:
    """Makes a configuration one of the suite: so small that it mostly compiles."""
    config.num_steps = 6
    config.seeds = (0,)
    config.prompts_per_step = 8
    config.evaluate_every = 3
    config.save_every = 6
    config.validation_fraction = 0.01
    config.test_fraction = 0.01
    config.evaluation_batch = 64
    config.snapshot_shares = (0.34, 0.67)


def deep(config: ml_collections.ConfigDict) -> None:
    """The world of 6 layers and width 256, with half the steps and half the prompts."""
    config.world = "deep"
    config.num_steps = 100
    config.prompts_per_step = 16


def midsize(config: ml_collections.ConfigDict, rate: float) -> None:
    """The world of 104 million parameters, for one GPU; ours.

    One seed: a run takes seconds on an H100, but its programs compile for a minute and
    a half, and its update takes half a minute or more to measure. P2's rates are 1e-5
    for SFT and 1e-6 for the others. Optimizer and clipping stay the study's. Masters
    and moments are float32 and the models compute in bfloat16. The bfloat16 storage is
    that of checkpoints: the masters' update is compared as it is (`master`) and as two
    bfloat16 checkpoints of them would show it (`stored`). Weights that are bfloat16
    between updates are another arm, `stored` of `experiments.precision`. What was seen:
    experiments/artifacts/midsize.

    Args:
      config: Changed in place.
      rate: Learning rate of all arms but `sft`, whose is 1e-5.
    """
    config.world = "midsize"
    config.seeds = (0,)
    config.num_steps = 100
    config.prompts_per_step = 32
    config.samples_per_prompt = 8
    config.micro_batches = 1
    config.max_prompt_tokens = 20
    config.max_new_tokens = 10
    config.evaluate_every = 10
    config.save_every = 100
    config.snapshot_shares = (0.2,)
    config.compute_dtype = "bfloat16"
    # About 200 and 600 of 20,000 problems, within the 1,536 that are held out.
    config.validation_fraction = 0.01
    config.test_fraction = 0.03
    for name, arm in config.arms.items():
        arm.learning_rate = 1e-5 if name == "sft" else rate


def shrink_midsize(config: ml_collections.ConfigDict) -> None:
    """Makes a configuration of `midsize` one of the suite: in the bundled world."""
    config.world = ""
    config.num_steps = config.save_every = config.evaluate_every = 4
    config.prompts_per_step, config.samples_per_prompt = 8, 4
    config.evaluation_batch = 64


def paper(config: ml_collections.ConfigDict) -> None:
    """P2's OPD settings (arXiv 2606.07082, appendix C), by the names of its models.

    They are those of every arm but for its rate. P2's SFT and RLVR differ in batch,
    steps, schedule, optimizer and data: what theirs are, from configs/p2.py, is noted
    in the arm's `published`, which the study records and does not read; the runs of one
    study share batch, steps and optimizer. SFT's responses here are the set's answers,
    not P2's traces. The SFT anchor is not public, and every study loads it before it
    trains anything, so that it must be made beforehand and named as `student`. Prompts:
    DAPO-Math-17k, as JSON lines. P2 does not give the longest response (ours: 8,192
    tokens) or the seeds. Its OPD batch of 64 is read as sequences, 8 prompts of 8
    samples, as in configs/p2.py.
    """
    config.base = "Qwen/Qwen3-8B-Base"
    config.student = "qwen3-8b-sft-anchor"
    config.teacher = "Qwen/Qwen3-32B"
    config.prompts = "dapo-math-17k.jsonl"
    config.num_steps = 299
    config.prompts_per_step = 8
    config.samples_per_prompt = 8
    config.mini_batches = 1
    config.micro_batches = 8
    config.max_prompt_tokens = 1024
    config.max_new_tokens = 8192
    config.evaluate_every = 64
    config.save_every = 64
    config.seeds = (0,)
    config.overlong = "drop"
    config.reward.name = "math"  # P2: the binary reward of DeepScaleR.
    config.compute_dtype = "bfloat16"
    config.optimizer.options.weight_decay = 0.1
    config.snapshot_shares = (63 / 299, 127 / 299, 191 / 299, 255 / 299)
    for name, arm in config.get("arms", {}).items():
        if name in ("sft", "rlvr"):
            arm.published = _published(name)


def _published(regime: str) -> dict[str, object]:
    """Where P2's SFT or RLVR differs from its OPD."""
    theirs, opd = p2.get_config(regime), p2.get_config("opd")
    options, shared = (x.optimizers.adamw.options for x in (theirs, opd))
    fields = ("schedule", "final_learning_rate", "warmup_steps", "num_steps", "prompts")
    found = {
        name: theirs[name]
        for name in fields
        if name in theirs and theirs[name] != opd.get(name)
    }
    found["sequences_per_step"] = (
        theirs.sequences_per_step
        if "sequences_per_step" in theirs
        else theirs.prompts_per_step * theirs.samples_per_prompt
    )
    found |= {name: x for name, x in options.items() if x != shared[name]}
    return found
