"""The check that a student and its teacher share a tokenizer."""

import json
from itertools import zip_longest
from typing import Any

from transformers import PreTrainedTokenizerFast


def require_same_tokenizer(
    student: PreTrainedTokenizerFast, teacher: PreTrainedTokenizerFast
) -> None:
    """Raises unless both tokenizers map each text to the same ids.

    Compares the vocabulary, the merges and other settings of the model, the added
    tokens with their flags, the normalizer and pre-tokenizer, and the tokens added to a
    text. Not compared: how ids are decoded, the chat template (prompts are rendered
    once, by the student's), and which tokens play the roles of end and padding: a base
    model and its chat version differ there and share every id.

    Args:
        student: the student's tokenizer.
        teacher: the teacher's.

    Raises:
        ValueError: naming all that differs.
    """
    ours, theirs = _parts(student), _parts(teacher)
    differences = [
        f"  {name}: {_difference(ours[name], theirs[name])}"
        for name in ours
        if ours[name] != theirs[name]
    ]
    if differences:
        raise ValueError(
            "the student and the teacher have different tokenizers:\n"
            + "\n".join(differences)
            + "\nDistillation compares probabilities id by id; use a teacher with the "
            "student's tokenizer."
        )


def _parts(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    model = state["model"]
    return {
        # By id: the order that get_vocab gives changes from call to call.
        "vocabulary": dict(sorted(tokenizer.get_vocab().items(), key=lambda x: x[1])),
        "merges": model.get("merges", []),
        "model settings": {
            name: value
            for name, value in model.items()
            if name not in ("vocab", "merges")
        },
        "added tokens": {token["content"]: token for token in state["added_tokens"]},
        "normalizer": state["normalizer"],
        "pre-tokenizer": state["pre_tokenizer"],
        # By effect: post-processors that add nothing are written in several ways.
        "tokens added to a text": tokenizer.encode(""),
    }


def _difference(student: Any, teacher: Any) -> str:
    """Where two parts differ, in at most a few lines whatever their size."""
    if isinstance(student, dict) and isinstance(teacher, dict):
        only_student = [key for key in student if key not in teacher]
        only_teacher = [key for key in teacher if key not in student]
        changed = [
            f"{key!r} ({student[key]!r} and {teacher[key]!r})"
            for key in student
            if key in teacher and student[key] != teacher[key]
        ]
        described = [
            f"{len(keys)} {what}, such as {', '.join(map(str, keys[:3]))}"
            for what, keys in (
                ("only in the student's", only_student),
                ("only in the teacher's", only_teacher),
                ("differ", changed),
            )
            if keys
        ]
        return "; ".join(described)
    if isinstance(student, list) and isinstance(teacher, list):
        pairs = enumerate(zip_longest(student, teacher))
        first = next((i, a, b) for i, (a, b) in pairs if a != b)
        return (
            f"{len(student)} and {len(teacher)} entries, the first difference at "
            f"{first[0]}: {first[1]!r} and {first[2]!r}"
        )
    return f"{json.dumps(student)[:200]} and {json.dumps(teacher)[:200]}"
