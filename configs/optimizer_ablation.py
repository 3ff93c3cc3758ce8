r"""On-policy distillation with AdamW, SGD and subnetwork masks (P1, Figure 3).

    python -m experiments.optimizer_ablation --workdir=runs/ablation
    python -m experiments.optimizer_ablation --workdir=runs/smoke \
        --config=configs/optimizer_ablation.py:smoke

Variants: `default` (the tiny world, minutes on 2 CPU cores), `smoke` (8 steps of one
seed), `sweep` (learning rates chosen on the validation split), `optimizers` (nine
optimizers without masks and one by import path, each at the best of four rates),
`optimizers_smoke` (three of them at two rates, 8 steps of one seed).

P1 = arXiv 2606.13657. "ours" marks what the paper does not give, or what the tiny world
changes; the README lists all of it.
"""

import ml_collections

from configs import shared


def get_config(variant: str = "default") -> ml_collections.ConfigDict:
    """The configuration of a variant: default, smoke, sweep or of the optimizers."""
    config = ml_collections.ConfigDict(
        {
            # Hugging Face checkpoint folders, and prompts: a JSONL file of {prompt,
            # answer}, or whatever else `geomjax.data.sources.read_source` takes. Empty:
            # the bundled tiny world. P1: DS-Qwen-1.5B, JustRL-1.5B and DAPO-Math-17K.
            "student": "",
            "teacher": "",
            "prompts": "",
            "data": shared.data(),
            "reward": shared.reward(),
            # What an arm's optimizer is: an optax name or package.module:function, its
            # rates (of several, the best on the validation split is reported), the
            # largest global norm of its gradients (0 for no clipping), and further
            # keyword arguments. Rates: P1 1e-6 and 1e-2; these are what the sweep chose
            # for the arms `adamw` and `sgd`, and masked arms keep the rate of `adamw`.
            # Clipping, betas, eps and decay are ours: P1 gives none. SGD is vanilla, as
            # in P1; clipped at every update it would be normalized gradient descent.
            "optimizers": {
                "adamw": {
                    "transform": "adamw",
                    "learning_rates": (1e-4,),
                    "clip_norm": 1.0,
                    "options": {
                        "b1": 0.9,
                        "b2": 0.999,
                        "eps": 1e-8,
                        "weight_decay": 0.01,
                    },
                },
                "sgd": {
                    "transform": "sgd",
                    "learning_rates": (3e-3,),
                    "clip_norm": 0.0,
                    "options": {},
                },
                # For one of your own: --config.arms.sgd.optimizer=custom
                "custom": {
                    "transform": "",
                    "learning_rates": (1e-3,),
                    "clip_norm": 0.0,
                    "options": {},
                },
            },
            # Masks: none, own (where the arm `adamw` moved), teacher (where the teacher
            # differs most), random, matched_random (the own mask's density in every
            # tensor), or the path of a mask file.
            "arms": {
                "adamw": {"optimizer": "adamw", "mask": "none"},
                "sgd": {"optimizer": "sgd", "mask": "none"},
                "adamw_opd_mask": {"optimizer": "adamw", "mask": "own"},
                "adamw_teacher_mask": {"optimizer": "adamw", "mask": "teacher"},
                "adamw_random_mask": {"optimizer": "adamw", "mask": "random"},
                "adamw_matched_random_mask": {
                    "optimizer": "adamw",
                    "mask": "matched_random",
                },
            },
            # P1 masks the coordinates that moved by more than 1e-5, which were 17.5 %;
            # here the threshold is the one that gives this density. A mask_threshold
            # above 0 is P1's rule, on weights as stored in bfloat16, for own and
            # teacher, whatever density it gives; random then has that of own.
            "mask_density": 0.175,
            "mask_threshold": 0.0,
            # P1 eq. (9). Others: reverse_kl, forward_kl, jsd (with jsd_beta).
            "objective": "sampled_token",
            "jsd_beta": 0.5,
            "ratio_clip": 0.2,  # ours; P1 gives none.
            # P1: 128 prompts, 4 samples each, mini-batches of 32 prompts. Ours: fewer.
            "prompts_per_step": 32,
            "samples_per_prompt": 4,
            "mini_batches": 2,
            "micro_batches": 1,
            "num_steps": 200,
            "temperature": 1.0,  # ours (thunlp/OPD's default).
            "max_prompt_tokens": 16,
            "max_new_tokens": 6,
            "schedule": "constant",  # ours, of AdamW and SGD alike.
            "warmup_steps": 0,
            # Regular expressions of parameters that are not trained, such as
            # ("embed_tokens", "norm", "lm_head").
            "frozen": (),
            "seeds": (0, 1, 2),
            "evaluate_every": 20,  # P1: 10, of some 140 steps.
            "save_every": 50,
            "keep_checkpoints": 2,
            # Steps to trace for TensorBoard, such as "10:15"; empty for none.
            "profile_steps": "",
            # Shares of the prompts held out, by a hash of their text: about 270 and
            # 1,250 of the tiny world's 6,000. Together they stay within the 1,536 that
            # its checkpoints were not trained on.
            "validation_fraction": 0.045,
            "test_fraction": 0.2,
            "evaluation_batch": 512,
            # Prompts longer than max_prompt_tokens: error, or drop and count them.
            "overlong": "error",
            # Accuracy by the reward; False for prompts without answers.
            "accuracy": True,
            "compute_dtype": "float32",
            # Devices by axis, such as "data=2,fsdp=2,tensor=2"; empty: the first one.
            "mesh": "",
            "export_masters": False,
            # Besides TensorBoard: wandb or trackio, where it is installed.
            "tracker": "",
        }
    )
    if variant == "smoke":
        _shrink(config)
    elif variant == "sweep":
        config.optimizers.adamw.learning_rates = (3e-5, 1e-4, 3e-4, 1e-3, 3e-3)
        config.optimizers.sgd.learning_rates = (1e-3, 3e-3, 1e-2)
    elif variant == "optimizers":
        config.optimizers = _optimizers(config.optimizers.adamw.options.to_dict())
        config.arms = {
            name: {"optimizer": name, "mask": "none"} for name in config.optimizers
        }
    elif variant == "optimizers_smoke":
        _shrink(config)
        table = _optimizers(config.optimizers.adamw.options.to_dict())
        kept = {name: table[name] for name in ("adamw", "muon", "adopt")}
        for optimizer in kept.values():
            optimizer["learning_rates"] = optimizer["learning_rates"][:2]
        config.optimizers = kept
        config.arms = {name: {"optimizer": name, "mask": "none"} for name in kept}
    elif variant != "default":
        raise ValueError(
            f"variant {variant!r}; known: default, smoke, sweep, optimizers, "
            "optimizers_smoke"
        )
    return config


def _shrink(config: ml_collections.ConfigDict) -> None:
    """Makes a configuration one of the suite."""
    config.num_steps = 8
    config.seeds = (0,)
    config.evaluate_every = 4
    config.save_every = 4
    config.validation_fraction = 0.01
    config.test_fraction = 0.01
    config.evaluation_batch = 64


def _optimizers(adamw: dict) -> dict[str, dict]:
    """Every optimizer of the variant `optimizers`, with four rates each.

    All of it is ours: P1 compares AdamW and SGD at one rate each. Grids span a factor
    of about thirty around the size of step that suited AdamW in the sweep. Clipping is
    that of `adamw`, save for SGD, whose clipped form would be another method.
    """
    moments = {name: adamw[name] for name in ("b1", "b2", "eps")}
    fine, medium, coarse = (
        (1e-5, 3e-5, 1e-4, 3e-4),
        (3e-5, 1e-4, 3e-4, 1e-3),
        (3e-4, 1e-3, 3e-3, 1e-2),
    )
    table = {
        "adamw": ("adamw", medium, 1.0, adamw),
        "adam": ("adam", medium, 1.0, moments),
        "sgd": ("sgd", coarse, 0.0, {}),
        "sgd_momentum": ("sgd", medium, 0.0, {"momentum": 0.9}),
        "rmsprop": ("rmsprop", medium, 1.0, {"decay": 0.999, "eps": 1e-8}),
        "adagrad": ("adagrad", (1e-3, 3e-3, 1e-2, 3e-2), 1.0, {}),
        "lamb": ("lamb", coarse, 1.0, {}),
        "lion": ("lion", fine, 1.0, {}),
        "muon": ("muon", coarse, 1.0, {}),
        # A transform of somebody else's, as yours would be.
        "adopt": ("optax.contrib:adopt", medium, 1.0, {}),
    }
    return {
        name: {
            "transform": transform,
            "learning_rates": rates,
            "clip_norm": clip_norm,
            "options": options,
        }
        for name, (transform, rates, clip_norm, options) in table.items()
    }
