"""Which tensor of a tuned checkpoint is which tensor of its source.

Names are matched exactly first. What is left is matched by its name as a text-only
causal language model would store it: multimodal wrappers put the same decoder under
`model.language_model.` or `language_model.model.`, and training wrappers put prefixes
before everything. At last an unembedding that one side does not store, because it is
tied to the embedding, is matched with that embedding.
"""

from collections import defaultdict
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

from geomjax.checkpoints.errors import CheckpointError
from geomjax.checkpoints.sources import CheckpointSource

# Prefixes of wrappers that add nothing to the weights, taken off repeatedly.
_WRAPPERS = ("module.", "_orig_mod.", "_fsdp_wrapped_module.", "base_model.model.")

# Where multimodal checkpoints keep their parts, and the name used here. Longest first.
_ALIASES = (
    ("model.language_model.model.", "model."),
    ("model.language_model.lm_head.", "lm_head."),
    ("model.language_model.", "model."),
    ("language_model.model.", "model."),
    ("language_model.lm_head.", "lm_head."),
    ("language_model.", "model."),
    ("layers.", "model.layers."),
    ("embed_tokens.", "model.embed_tokens."),
    ("norm.", "model.norm."),
    ("model.visual.", "visual."),
    ("model.vision_tower.", "vision_tower."),
    ("model.multi_modal_projector.", "multi_modal_projector."),
)

Shape = tuple[int, ...]

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"


# The name of a match, its keys on both sides, and how it was found.
_Named = tuple[str, str, str, str]


class Match(NamedTuple):
    """One tensor on both sides.

    Attributes:
        name: what results call it: its name in the source, or, where the source has
            tied it away, in the tuned checkpoint.
        source_key: its key in the source.
        tuned_key: its key in the tuned checkpoint.
        shape: its shape, that of the common rows where `rows` is set.
        how: "exact", "alias" or "tied".
        rows: leading rows that both sides have, where they differ in that number and
            the comparison of the common ones was asked for; else None.
    """

    name: str
    source_key: str
    tuned_key: str
    shape: Shape
    how: str
    rows: int | None = None


class Matching(NamedTuple):
    """What two checkpoints have in common, and everything they do not.

    Attributes:
        matched: the tensors that can be compared, in the source's order.
        missing: names in the source that the tuned checkpoint lacks.
        extra: names in the tuned checkpoint that the source lacks.
        ambiguous: groups of names, each with the keys that compete for it.
        mismatched: names whose shapes differ, with both shapes; not compared.
        cut: names of which only the common rows are compared, with both shapes.
        left_out: names that a reader left out, with side and reason.
        duplicates: heads that are stored although they are tied: their side stores
            the embedding's values twice. They are not compared: it would count the
            embedding's update twice.
    """

    matched: tuple[Match, ...]
    missing: tuple[str, ...]
    extra: tuple[str, ...]
    ambiguous: dict[str, dict[str, tuple[str, ...]]]
    mismatched: dict[str, tuple[Shape, Shape]]
    cut: dict[str, tuple[Shape, Shape]]
    left_out: dict[str, dict[str, str]]
    duplicates: tuple[str, ...]

    @property
    def complete(self) -> bool:
        """Whether every tensor of both sides is accounted for and compared whole."""
        return not (
            self.missing
            or self.extra
            or self.ambiguous
            or self.mismatched
            or any(self.left_out.values())
            or self.cut
        )

    def to_json(self) -> dict[str, Any]:
        """The matching as plain lists and dicts, for `matching.json`."""
        return {
            "complete": self.complete,
            "matched": [
                match._asdict() | {"shape": list(match.shape)} for match in self.matched
            ],
            "missing": list(self.missing),
            "extra": list(self.extra),
            "ambiguous": {
                name: {side: list(keys) for side, keys in sides.items()}
                for name, sides in self.ambiguous.items()
            },
            "mismatched": _shapes_to_json(self.mismatched),
            "cut": _shapes_to_json(self.cut),
            "left_out": self.left_out,
            "duplicates": list(self.duplicates),
        }

    def summary(self) -> str:
        """The matching in a few lines, for the screen."""
        counts: dict[str, int] = defaultdict(int)
        for match in self.matched:
            counts[match.how] += 1
        kinds = ", ".join(f"{count} {how}" for how, count in counts.items())
        lines = [f"{len(self.matched)} tensors matched ({kinds})"]
        lines += _listed("missing from the tuned checkpoint", self.missing)
        lines += _listed("not in the source", self.extra)
        lines += _listed("ambiguous", self.ambiguous)
        lines += _listed("of different shapes", self.mismatched)
        for side, reasons in self.left_out.items():
            lines += _listed(f"left out of the {side}", reasons)
        lines += _listed("a head equal to its embedding, left out", self.duplicates)
        lines += _listed("compared in their common rows only", self.cut)
        return "\n".join(lines)


def match(
    source: CheckpointSource, tuned: CheckpointSource, *, common_rows: bool = False
) -> Matching:
    """Finds the tensors that two checkpoints have in common.

    Nothing is dropped in silence: whatever is not compared is in the result, by name.

    Args:
        source: the checkpoint before training.
        tuned: the checkpoint after it.
        common_rows: compare embeddings and heads of different vocabulary sizes in the
            rows that both have, instead of leaving them out.

    Returns:
        The matching.

    Raises:
        CheckpointError: no tensor matches at all.
    """
    pairs, missing, extra, ambiguous = _match_names(source.keys(), tuned.keys())
    duplicates = _match_heads(source, tuned, pairs, missing, extra)
    matched: list[Match] = []
    mismatched: dict[str, tuple[Shape, Shape]] = {}
    cut: dict[str, tuple[Shape, Shape]] = {}
    for name, source_key, tuned_key, how in pairs:
        before, after = source.spec(source_key).shape, tuned.spec(tuned_key).shape
        rows = None
        if before != after:
            is_table = canonical_name(name) in (EMBEDDING, HEAD)
            if not (common_rows and is_table and before[1:] == after[1:]):
                mismatched[name] = (before, after)
                continue
            rows = min(before[0], after[0])
            cut[name] = (before, after)
        shape = before if rows is None else (rows, *before[1:])
        matched.append(Match(name, source_key, tuned_key, shape, how, rows))
    if not matched:
        raise CheckpointError(
            "the two checkpoints",
            [
                "no tensor has the same name and shape on both sides: are they of one "
                "architecture?",
                f"in the source: {_some(source.keys())}",
                f"in the tuned checkpoint: {_some(tuned.keys())}",
                *(f"{name!r}: {a} against {b}" for name, (a, b) in mismatched.items()),
            ],
        )
    order = {key: i for i, key in enumerate(source.keys())}
    # A head tied to its embedding goes behind everything: its key is the embedding's.
    matched.sort(key=lambda m: (m.how == "tied", order[m.source_key]))
    left_out = {"source": dict(source.left_out), "tuned": dict(tuned.left_out)}
    return Matching(
        tuple(matched),
        tuple(missing),
        tuple(extra),
        ambiguous,
        mismatched,
        cut,
        left_out,
        tuple(duplicates),
    )


def canonical_name(name: str) -> str:
    """The name that a text-only causal language model would give this tensor."""
    while prefix := next((p for p in _WRAPPERS if name.startswith(p)), None):
        name = name.removeprefix(prefix)
    for prefix, replacement in _ALIASES:
        if name.startswith(prefix):
            return replacement + name.removeprefix(prefix)
    return name


def _match_names(
    source: Iterable[str], tuned: Iterable[str]
) -> tuple[
    list[_Named],
    list[str],
    list[str],
    dict[str, dict[str, tuple[str, ...]]],
]:
    """Pairs by name and then by canonical name; missing, extra and ambiguous names."""
    source, tuned = list(source), list(tuned)
    exact = set(source) & set(tuned)
    pairs = [(key, key, key, "exact") for key in source if key in exact]
    left = _by_canonical_name(key for key in source if key not in exact)
    right = _by_canonical_name(key for key in tuned if key not in exact)
    missing, extra = [], []
    ambiguous: dict[str, dict[str, tuple[str, ...]]] = {}
    for name, keys in left.items():
        others = right.pop(name, [])
        if not others:
            missing += keys
        elif len(keys) == len(others) == 1:
            pairs.append((keys[0], keys[0], others[0], "alias"))
        else:
            ambiguous[name] = {"source": tuple(keys), "tuned": tuple(others)}
    for keys in right.values():
        extra += keys
    return pairs, missing, extra, ambiguous


def _by_canonical_name(keys: Iterable[str]) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = defaultdict(list)
    for key in keys:
        groups[canonical_name(key)].append(key)
    return groups


def _match_heads(
    source: CheckpointSource,
    tuned: CheckpointSource,
    pairs: list[_Named],
    missing: list[str],
    extra: list[str],
) -> list[str]:
    """Matches heads that are tied to their embedding; edits the lists.

    Returns:
        Heads that are their own side's embedding stored twice.
    """
    embeddings = [pair for pair in pairs if canonical_name(pair[0]) == EMBEDDING]
    if len(embeddings) != 1:
        return []
    _, source_embedding, tuned_embedding, _ = embeddings[0]
    for pair in pairs:
        if canonical_name(pair[0]) != HEAD:
            continue
        if (
            (source.tie_word_embeddings and tuned.tie_word_embeddings)
            and _equal(source, pair[1], source_embedding)
            and _equal(tuned, pair[2], tuned_embedding)
        ):
            pairs.remove(pair)
            return [pair[0]]
        return []
    for side, embedding, names, other in (
        (source, source_embedding, missing, tuned),
        (tuned, tuned_embedding, extra, source),
    ):
        heads = [name for name in names if canonical_name(name) == HEAD]
        if len(heads) != 1 or other.tie_word_embeddings is False:
            continue
        head = heads[0]
        names.remove(head)
        if _equal(side, head, embedding):
            return heads
        if side is source:
            pairs.append((head, head, tuned_embedding, "tied"))
        else:
            pairs.append((head, source_embedding, head, "tied"))
    return []


def _equal(source: CheckpointSource, a: str, b: str) -> bool:
    """Whether two tensors of a checkpoint have the same bits."""
    if source.spec(a) != source.spec(b):
        return False
    first, second = source.read(a), source.read(b)
    # In slices: a comparison as a whole would make two arrays of the table's size.
    step = max(1, (1 << 22) // max(1, int(np.prod(first.shape[1:]))))
    same = all(
        first[i : i + step].tobytes() == second[i : i + step].tobytes()
        for i in range(0, first.shape[0], step)
    )
    source.release(a)
    source.release(b)
    return same


def _shapes_to_json(
    shapes: dict[str, tuple[Shape, Shape]],
) -> dict[str, dict[str, list[int]]]:
    return {
        name: {"source": list(source), "tuned": list(tuned)}
        for name, (source, tuned) in shapes.items()
    }


def _some(names: Iterable[str]) -> str:
    names = list(names)
    if not names:
        return "no tensor"
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(map(repr, names[:3])) + more


def _listed(what: str, names: Iterable[str]) -> list[str]:
    names = list(names)
    return [f"{len(names)} {what}: {', '.join(names)}"] if names else []
