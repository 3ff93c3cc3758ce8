"""Small runs of `experiments.evaluate` on the tiny world."""

import json

import ml_collections

from experiments import evaluate
from experiments.common.world import TINY_WORLD

PROBLEMS, SAMPLES = 192, 8


def config(**changes):
    return ml_collections.ConfigDict(
        {
            "checkpoint": str(TINY_WORLD / "anchor"),
            "compare": "",
            "suite": "tiny-world",
            "samples": SAMPLES,
            "temperature": 1.0,
            "top_p": 1.0,
            "max_new_tokens": 6,
            "seed": 0,
            "chat": "auto",
            "system": "",
            "thinking": "default",
            "limit": PROBLEMS,
            "rows": 64,
            "compute_dtype": "float32",
            "mesh": "",
            "reward": "",
            "reward_timeout_s": 60.0,
            "reward_workers": 1,
            "resamples": 1000,
            "bootstrap_seed": 0,
            "confidence": 0.95,
            **changes,
        }
    )


def evaluated(folder, **changes):
    folder.mkdir(exist_ok=True)
    return evaluate.run(config(**changes), folder)


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]
