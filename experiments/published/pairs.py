"""The pairs of checkpoints that the papers analyse, and where they are to be had."""

from pathlib import Path
from typing import Literal, NamedTuple

Availability = Literal["published", "unverified", "local"]


class Repository(NamedTuple):
    """One checkpoint.

    Attributes:
      name: Its repository on the hub, or the folder that stands for it under `--root`.
      availability: `published` under that name; `unverified`, where the paper names no
        repository, or another one may be meant; `local`, where no public checkpoint is
        known, as of those that the authors trained for the paper.
    """

    name: str
    availability: Availability = "published"


class PublishedPair(NamedTuple):
    """A source and what was trained from it, under the paper's name for the pair."""

    paper: Literal["P1", "P2"]
    name: str
    source: Repository
    tuned: Repository


class NotAvailableError(ValueError):
    """A checkpoint that cannot be had here; says where it was looked for."""


_DS_QWEN = Repository("deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B")
_QWEN_VL = Repository("Qwen/Qwen2.5-VL-3B-Instruct")
_QWEN_8B = Repository("Qwen/Qwen3-8B-Base")
_KLEAR_SFT = Repository("Kwai-Klear/Klear-Reasoner-8B-SFT")


def _local(name: str) -> Repository:
    return Repository(name, "local")


def _unverified(name: str) -> Repository:
    return Repository(name, "unverified")


def _p1(name: str, source: Repository, tuned: Repository) -> PublishedPair:
    return PublishedPair("P1", name, source, tuned)


def _p2(name: str, source: Repository, tuned: Repository) -> PublishedPair:
    return PublishedPair("P2", name, source, tuned)


PAIRS = (
    # P1, Table 7.
    _p1("Qwen-Math Distill", Repository("Qwen/Qwen2.5-Math-1.5B"), _DS_QWEN),
    _p1(
        "DeepScaleR RLVR",
        _DS_QWEN,
        Repository("agentica-org/DeepScaleR-1.5B-Preview"),
    ),
    _p1("DS-Qwen OPD", _DS_QWEN, _local("DS-Qwen-OPD")),
    _p1("JustRL RLVR", _DS_QWEN, Repository("hbx/JustRL-DeepSeek-1.5B")),
    _p1("DS-Qwen OPD (JustRL)", _DS_QWEN, _local("DS-Qwen-OPD-JustRL")),
    _p1(
        "MiniCPM OPD",
        Repository("openbmb/MiniCPM5-1B-SFT"),
        Repository("openbmb/MiniCPM5-1B"),
    ),
    _p1("Qwen2.5-VL GRPO", _QWEN_VL, _local("Qwen2.5-VL-3B-GRPO")),
    _p1("Qwen2.5-VL OPD", _QWEN_VL, _local("Qwen2.5-VL-3B-OPD")),
    # P1 names no repository; this one's card has its student, teacher and data.
    _p1(
        "Qwen3-1.7B OPD",
        Repository("Qwen/Qwen3-1.7B-Base"),
        _unverified("lllyx/Qwen3-1.7B-Base-OPD"),
    ),
    _p1("Qwen3 OPSD", Repository("Qwen/Qwen3-4B"), _local("Qwen3-4B-OPSD")),
    # P2, Table 1. Its own runs start from its own supervised anchors.
    _p2("SFT-8B", _QWEN_8B, _local("SFT-8B")),
    _p2("OPD-8B-T32B", _local("SFT-8B"), _local("OPD-8B-T32B")),
    _p2("RLVR-8B", _local("SFT-8B"), _local("RLVR-8B")),
    _p2("OPD-4B-T8B", _local("SFT-4B"), _local("OPD-4B-T8B")),
    _p2("OPD-4B-T14B", _local("SFT-4B"), _local("OPD-4B-T14B")),
    _p2("OPD-4B-T32B", _local("SFT-4B"), _local("OPD-4B-T32B")),
    _p2("OPD-14B-T32B", _local("SFT-14B"), _local("OPD-14B-T32B")),
    _p2("OPD-8B-T32B-Code", _local("SFT-8B"), _local("OPD-8B-T32B-Code")),
    _p2("OPD-8B-T32B-MoE", _local("SFT-8B"), _local("OPD-8B-T32B-MoE")),
    _p2("Klear-Reasoner-8B-SFT", _QWEN_8B, _KLEAR_SFT),
    _p2(
        "UniReason-14B-think-SFT",
        _unverified("Qwen/Qwen3-14B-Base"),
        _unverified("ReasoningTransferability/UniReason-Qwen3-14B-think-SFT"),
    ),
    _p2(
        "Klear-Reasoner-8B GRPO",
        _KLEAR_SFT,
        _unverified("Kwai-Klear/Klear-Reasoner-8B"),
    ),
    _p2(
        "GT-Qwen3-8B-Base GRPO",
        _QWEN_8B,
        _unverified("TMLR-Group-HF/GT-Qwen3-8B-Base"),
    ),
    _p2(
        "Polaris-4B DAPO",
        _unverified("Qwen/Qwen3-4B"),
        _unverified("POLARIS-Project/Polaris-4B-Preview"),
    ),
)


def choose(papers: tuple[str, ...], only: tuple[str, ...]) -> tuple[PublishedPair, ...]:
    """The pairs of some papers, or those named in `only`, in the papers' order.

    Raises:
      ValueError: A name that no pair has, or a paper other than P1 and P2.
    """
    names = {pair.name for pair in PAIRS}
    unknown = sorted({*only} - names) + sorted({*papers} - {"P1", "P2"})
    if unknown:
        raise ValueError(
            f"unknown: {unknown}; the papers are P1 and P2, the pairs {sorted(names)}"
        )
    if only:
        return tuple(pair for pair in PAIRS if pair.name in only)
    return tuple(pair for pair in PAIRS if pair.paper in papers)


def locate(repository: Repository, root: Path | None) -> str:
    """What to open for a checkpoint: a folder under `root`, else its name on the hub.

    Raises:
      NotAvailableError: No such folder, or there is no root and no public repository.
    """
    name = repository.name
    if root is None:
        if repository.availability == "local":
            raise NotAvailableError(
                f"{name} is local only: no public checkpoint is known (P1 and P2 "
                f"trained theirs); put one at DIR/{name} and give --root=DIR"
            )
        return name
    candidates = dict.fromkeys((root / name, root / name.split("/")[-1]))
    for folder in candidates:
        if folder.is_dir():
            return str(folder)
    local = ", local only" if repository.availability == "local" else ""
    raise NotAvailableError(
        f"{name}{local}: no folder {' or '.join(map(str, candidates))}"
    )
