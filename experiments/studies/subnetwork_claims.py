"""Claims of the study of subnetworks, with thresholds fixed before any run."""

from typing import Any

from experiments.studies.subnetwork_report import PAIRS, Found
from experiments.studies.verdict import Side, Verdict, differences

RECOVERED = 0.8
"""Share of the full run's gain from which on a mask counts as near full.

Tested seed by seed: the interval of masked gain less this share of the full gain lies
above 0. `experiments.ablation.claims` has the same share. A seed whose full run gained
nothing has nothing to recover; it leaves the claim undecided.
"""

EQUAL = 0.9
"""Share of equal parameters that arXiv 2505.11711 finds at least."""

GRPO = 0.093
"""Density of GRPO's mask in P1's Figure 7, from its text."""

OURS = "ours; the papers have no such run"
PAIR_SOURCES = ("P1, Table 4", "P1, Table 4", "arXiv 2505.11711, seeds")


def claims(density: float, found: Found, world: str = "") -> list[Verdict]:
    """What P1 and arXiv 2505.11711 say of subnetworks, and what our controls ask.

    Args:
      density: At which kinds of mask are compared.
      found: What was measured.
      world: Empty for text, `vision` for the vision-language world.
    """
    return [
        *_overlap_claims(density, found),
        *_near_full_claims(density, found, world),
        *_order_claims(density, found, world),
        *(_sparser_claims(density, found) if world == "vision" else ()),
        *_agreement_claims(density, found),
    ]


def _overlap_claims(density: float, found: Found) -> list[Verdict]:
    out = []
    for (pair, (a, b)), source in zip(PAIRS.items(), PAIR_SOURCES, strict=True):
        if pair in found.supports:
            out.append(
                Verdict(
                    f"Within tensors, the supports of {a} and {b} overlap beyond "
                    "chance",
                    source,
                    "coverage of the stored supports at 1e-5 less chance in tensors"
                    + _pairs_note(b),
                    "above",
                    0.0,
                    _beyond_chance(b, found.supports[pair]),
                )
            )
    for arm, seeds in found.masks.items():
        rule = arm.rsplit("_", 1)[0]
        if rule in ("random", "matched_random") or arm.startswith("file_"):
            continue
        out.append(
            Verdict(
                f"Within tensors, the mask {rule} agrees with the own beyond chance",
                "P1, Table 4, by coordinates alone"
                if rule == "rlvr"
                else "ours; chance given each tensor's share",
                f"coverage of the own mask less chance in tensors, at {density:.1%}"
                + _pairs_note(arm),
                "above",
                0.0,
                _beyond_chance(arm, seeds),
            )
        )
    return out


def _beyond_chance(other: str, seeds: list[dict[str, Any]]) -> tuple[float | None, ...]:
    """Coverage less what each tensor's share would give by chance.

    The pairs of a seed with the next share runs, and are no independent samples: of
    these every other one is taken, so that three seeds make one.
    """
    if "other_seed" in other:
        seeds = seeds[: max(1, len(seeds) - 1) : 2]
    return differences(
        _column(seeds, "covered_by_b"),
        _column(seeds, "covered_by_b_chance_per_tensor"),
    )


def _pairs_note(other: str) -> str:
    return ", of pairs that share no run" if "other_seed" in other else ""


def _near_full_claims(density: float, found: Found, world: str) -> list[Verdict]:
    out = []
    figure = "P1, Figure 7" if world == "vision" else "P1, Figure 3"
    # In Figure 7 GRPO's mask, sparser there, falls behind.
    left_out = f"rlvr_{density:g}" if world == "vision" else ""
    for arm, full, claim, source in (
        (
            f"own_{density:g}",
            "opd",
            "OPD's own subnetwork nearly matches full OPD",
            figure,
        ),
        (
            f"rlvr_{density:g}",
            "opd",
            "RLVR's subnetwork nearly matches full OPD",
            figure,
        ),
        (
            f"rlvr_own_{density:g}",
            "rlvr",
            "RLVR's own subnetwork nearly matches full RLVR",
            "arXiv 2505.11711",
        ),
    ):
        if arm not in found.outcomes or arm == left_out:
            continue
        part = [RECOVERED * gain if gain > 0 else None for gain in found.gain(full)]
        out.append(
            Verdict(
                claim,
                source,
                f"gain in accuracy, masked less {RECOVERED:.0%} of the full run's, "
                "undefined where that is no gain",
                "above",
                0.0,
                differences(found.gain(arm), part),
            )
        )
    return out


def _order_claims(density: float, found: Found, world: str) -> list[Verdict]:
    figure = "P1, Figure 7" if world == "vision" else "P1, Figure 3"
    random = f"random_{density:g}"
    matched = f"matched_random_{density:g}"
    cases = [
        ("own", random, figure),
        ("rlvr", random, figure),
        ("own", matched, OURS),
        ("other_teacher", random, OURS),
        ("other_seed", random, OURS),
        ("low", random, "arXiv 2511.08567: small weights; ours for OPD"),
        ("nonprincipal", random, "arXiv 2511.08567: off the principals; ours for OPD"),
        ("low_nonprincipal", random, "arXiv 2511.08567: both; ours for OPD"),
    ]
    out = []
    for rule, control, source in cases:
        arm = f"{rule}_{density:g}"
        if not {arm, control} <= found.outcomes.keys():
            continue
        name = "random" if control == random else "random of the same share per tensor"
        out.append(
            Verdict(
                f"The mask {rule} ends above the mask {name}",
                source,
                f"late accuracy at {density:.1%}, {rule} less control",
                "above",
                0.0,
                differences(found.accuracy(arm), found.accuracy(control)),
            )
        )
    return out


def _sparser_claims(density: float, found: Found) -> list[Verdict]:
    """P1's Figure 7: GRPO's mask is better than chance, and worse than OPD's."""
    arm, control, own = f"rlvr_{GRPO:g}", f"random_{GRPO:g}", f"own_{density:g}"
    if not {arm, control, own} <= found.outcomes.keys():
        return []
    late = found.accuracy(arm)
    return [
        Verdict(
            "GRPO's mask ends above the mask random of its density",
            "P1, Figure 7",
            f"late accuracy at {GRPO:.1%}, rlvr less random",
            "above",
            0.0,
            differences(late, found.accuracy(control)),
        ),
        Verdict(
            "GRPO's sparser mask ends below OPD's own",
            "P1, Figure 7",
            f"late accuracy, rlvr at {GRPO:.1%} less own at {density:.1%}",
            "below",
            0.0,
            differences(late, found.accuracy(own)),
        ),
    ]


def _agreement_claims(density: float, found: Found) -> list[Verdict]:
    out = []
    equal, distance = "stored_within_1e-05", "distance"

    def add(claim: str, source: str, statistic: str, side: Side, *rest: Any) -> None:
        out.append(Verdict(claim, source, statistic, side, *rest))

    for arm, full in (
        (f"own_{density:g}", "OPD"),
        (f"rlvr_own_{density:g}", "RLVR"),
    ):
        if arm in found.agreement:
            add(
                f"Training {full}'s own subnetwork ends at full training's parameters",
                "arXiv 2505.11711: 94.0 and 90.5 %",
                "share of stored parameters within 1e-5 of full training's",
                "above",
                EQUAL,
                tuple(_column(found.agreement[arm], equal)),
            )
    own, other = f"own_{density:g}", "opd, another seed"
    if {own, other} <= found.agreement.keys():
        add(
            "The own subnetwork ends nearer to full training than another seed does",
            OURS,
            "distance over the norm of the full update, own less another seed; pairs "
            "of seeds share runs",
            "below",
            0.0,
            differences(
                _column(found.agreement[own], distance),
                _column(found.agreement[other], distance),
            ),
        )
    return out


def _column(seeds: list[dict[str, Any]], name: str) -> list[float | None]:
    return [seed[name] for seed in seeds]
