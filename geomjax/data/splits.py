"""Train, validation and test splits by a hash of the prompt."""

import hashlib
import json
from collections.abc import Sequence
from typing import Any, NamedTuple

from geomjax.data.prompts import Example

_HASH_BITS = 64


class Splits(NamedTuple):
    """Disjoint parts of a list of examples, each in the order of the list."""

    train: list[Example]
    validation: list[Example]
    test: list[Example]


def split_examples(
    examples: Sequence[Example],
    *,
    validation: float | int,
    test: float | int,
    seed: int = 0,
) -> Splits:
    r"""Splits examples by their prompts; what is held out is given, train is the rest.

    With h(prompt) a hash in [0, 1) of the prompt and its images, and both sizes given
    as fractions, an example is

        test if h < test, validation if test <= h < test + validation, else train,

    so that its place depends on no other example: prompts may be added to a file, and
    none changes sides. The sizes are then met on average. Both given as integers, they
    count distinct prompts and are met exactly: the first by h are the test split,
    those that follow the validation split. In both cases equal prompts share a side.

    Args:
        examples: the examples.
        validation: a fraction in [0, 1) or a number of distinct prompts; 0 for none.
        test: the same, of the same kind.
        seed: another seed gives another, independent split.

    Returns:
        The three splits.

    Raises:
        ValueError: if the sizes are out of range or not of one kind, or if the train
            split, or another whose size is not 0, would be empty.
    """
    sizes = {"validation": validation, "test": test}
    if type(validation) is not type(test) or min(sizes.values()) < 0:
        raise ValueError(
            f"splits: got {sizes}, expected two fractions (such as 0.1) or two numbers "
            "of prompts (such as 500), none negative"
        )
    places = {_identity(example): _hash(example, seed) for example in examples}
    if isinstance(test, int) and isinstance(validation, int):
        ends = _ends_by_rank(sorted(places.values()), test, test + validation)
    else:
        ends = tuple(int(end * 2**_HASH_BITS) for end in (test, test + validation))
    splits = Splits([], [], [])
    for example in examples:
        place = places[_identity(example)]
        if place < ends[0]:
            splits.test.append(example)
        elif place < ends[1]:
            splits.validation.append(example)
        else:
            splits.train.append(example)
    empty = [
        name
        for name, part in splits._asdict().items()
        if not part and (name == "train" or sizes[name] > 0)
    ]
    if empty:
        raise ValueError(
            f"splits: {' and '.join(empty)} would be empty with {sizes} of "
            f"{len(places)} distinct prompts; give more prompts or change the sizes"
        )
    return splits


def _ends_by_rank(ordered: list[int], *counts: int) -> tuple[int, ...]:
    """Hashes below which lie the first so many of the ordered hashes."""
    return tuple(
        ordered[count] if count < len(ordered) else 2**_HASH_BITS for count in counts
    )


def _identity(example: Example) -> tuple[Any, ...]:
    return example.prompt, *(image.digest for image in example.images)


def _hash(example: Example, seed: int) -> int:
    # Python's own hash differs between processes.
    data = json.dumps([seed, *_identity(example)]).encode()
    return int.from_bytes(hashlib.blake2b(data, digest_size=_HASH_BITS // 8).digest())
