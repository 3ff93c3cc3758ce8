r"""The model pairs of both papers beside their published tables.

    python -m experiments.published_pairs --workdir=runs/published
    python -m experiments.published_pairs --workdir=runs/published --root=DIR \
        --config=configs/published_pairs.py:all

Variants: `p1` (default; the ten pairs of P1's Table 7), `p2` (the fourteen of P2's
Table 1, up to 14 billion parameters), `all`. P1 = arXiv 2606.13657, P2 = arXiv
2606.07082. All pairs of P1 that are public are some 30 GB to download.
"""

import ml_collections

PAPERS = {"p1": ("P1",), "p2": ("P2",), "all": ("P1", "P2")}


def get_config(variant: str = "p1") -> ml_collections.ConfigDict:
    """The configuration of a variant: p1, p2 or all."""
    if variant not in PAPERS:
        raise ValueError(f"variant {variant!r}; known: {', '.join(PAPERS)}")
    return ml_collections.ConfigDict(
        {
            "papers": PAPERS[variant],
            # Names of pairs, such as ("DeepScaleR RLVR",); empty for all of the papers.
            "only": (),
            # Seeds of the null updates; each costs two more measurements of a pair.
            "null_seeds": 0,
            # GiB for the work; 0 for a quarter of what is free.
            "memory_budget_gib": 0.0,
            # Compare resized vocabularies in the rows that both sides have.
            "common_rows": False,
        }
    )
