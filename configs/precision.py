r"""How much of the sparsity is the number format's (nobody has published it).

    python -m experiments.precision --workdir=runs/precision
    python -m experiments.precision --workdir=runs/smoke \
        --config=configs/precision.py:smoke

Variants: `tiny` (the tiny world, 33 runs), `smoke` (OPD at one rate, two seeds),
`paper` (P2's settings and model names at its rate; a description, for a cluster).

P2 = arXiv 2606.07082. Everything else is ours.
"""

import ml_collections

from configs import study

STORED = ("float32", "nearest", "stochastic")


def get_config(variant: str = "tiny") -> ml_collections.ConfigDict:
    """The configuration of a variant: tiny, smoke or paper."""
    config = study.tiny()
    if variant == "tiny":
        # From P2's rate for OPD and RLVR, by way of its rate for SFT, to the rate of
        # the other studies here: the step against the unit in the last place is what
        # the format's share depends on.
        arms = _opd(("1e-6", "1e-5", "1e-4"))
        # The other regimes at one rate and as many steps, so that they differ from OPD
        # in what they learn from alone; P2's SFT differs in rate and length too.
        arms |= _one("sft", "responses", "1e-5") | _one("rlvr", "reward", "1e-5")
    elif variant == "smoke":
        study.shrink(config)
        config.seeds = (0, 1)  # So that runs share a program.
        arms = _opd(("1e-5",))
    elif variant == "paper":
        study.paper(config)
        arms = _opd(("1e-6",)) | _one("rlvr", "reward", "1e-6")
        arms |= _one("sft", "responses", "1e-6")
    else:
        raise ValueError(f"variant {variant!r}; known: tiny, smoke, paper")
    config.arms = arms
    config.snapshot_shares = ()  # Ends alone are compared.
    return config


def _opd(rates: tuple[str, ...]) -> dict[str, dict]:
    """OPD at each rate, stored in each way between updates."""
    arms: dict[str, dict] = {}
    for stored in STORED:
        for rate in rates:
            arms |= _one("opd", "distill", rate, stored)
    return arms


def _one(regime: str, kind: str, rate: str, stored: str = "float32") -> dict[str, dict]:
    """An arm under its name; all of them start where P2's OPD and RLVR do."""
    ending = "" if stored == "float32" else f"_{stored}"
    arm = {
        "kind": kind,
        "start": "anchor",
        "learning_rate": float(rate),
        "stored": stored,
    }
    return {f"{regime}_{rate}{ending}": arm}
