"""Does geomjax compute a checkpoint as transformers does? Run it on each new one.

    python -m experiments.check_model --checkpoint=DIR [--json=FILE]

DIR is a folder in the Hugging Face layout, or the name of a repository on the hub, of
any family that geomjax knows. On random tokens in ragged rows, all in float32:

    logits      those of transformers against ours: largest difference, relative to the
                largest logit, and largest KL of a position (needs the parity extra)
    cache       prefill and decoding, token by token, against one full pass
    round trip  every tensor as it would be exported, in its stored dtype, bit for bit
    tokenizer   each of its ids has a row of the embedding

Of a model that sees, the first two are made a second time, on rows with two images, one
and none.

The exit status is 2 if a check fails. One that cannot be made, because PyTorch or a
class of transformers is missing, is shown as skipped and does not fail.
"""

import hashlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from experiments.common import cli
from experiments.common.check_rows import Rows, ragged_rows, rows_with_images
from experiments.common.environment import environment
from experiments.peers import transformers_logits
from geomjax.checkpoints import open_source
from geomjax.data.tokenizers import load_tokenizer, tokenizer_size
from geomjax.models import hf
from geomjax.models.load import Loaded, checkpoint_directory, load
from geomjax.models.qwen2_5_vl import Qwen25VL, place_images

FAILED_STATUS = 2
MAX_DIFFERENCE = 1e-4
"""Of logits, relative to the largest; float32 products in another order give 1e-6."""
MAX_KL = 1e-6
"""Of a position, in nats."""


class Check(NamedTuple):
    """One line of the table.

    Attributes:
      name: What was checked.
      found: What was found, as the table shows it.
      passed: Whether it is as it should be; None where it could not be checked.
    """

    name: str
    found: str
    passed: bool | None


def define_flags() -> None:
    """Defines the flags; not at import: experiments can be imported together."""
    flags.DEFINE_string("checkpoint", None, "Folder, or name on the hub.")
    flags.DEFINE_integer("tokens", 48, "Length of the rows.", lower_bound=4)
    flags.DEFINE_integer("seed", 0, "Of the random tokens.")
    flags.DEFINE_string("json", "", "File to write the table to.")


def main() -> None:
    """Checks what the flags name."""
    values = flags.FLAGS
    if values.checkpoint is None:
        raise ValueError("--checkpoint is not given; --help explains it")
    directory = checkpoint_directory(values.checkpoint)
    checks = check_model(directory, values.tokens, values.seed)
    width = max(len(check.name) for check in checks)
    for check in checks:
        print(f"{check.name:{width}}  {_verdict(check):7}  {check.found}")
    if values.json:
        record = {
            "checkpoint": values.checkpoint,
            "checks": [check._asdict() for check in checks],
            "environment": environment(),
        }
        Path(values.json).write_text(json.dumps(record, indent=2) + "\n")
    if any(check.passed is False for check in checks):
        sys.exit(FAILED_STATUS)


def _verdict(check: Check) -> str:
    return {True: "passed", False: "FAILED", None: "skipped"}[check.passed]


def check_model(directory: Path, length: int, seed: int) -> list[Check]:
    """All checks of a checkpoint.

    Args:
      directory: Its folder.
      length: Tokens of the rows.
      seed: Of the random tokens.

    Returns:
      The lines of the table.

    Raises:
      ValueError: The checkpoint cannot be loaded.
    """
    loaded = load(directory)
    model = loaded.model
    count = sum(leaf.size for leaf in jax.tree.leaves(loaded.params))
    checks = [
        Check("architecture", model.config.architecture, True),
        Check("parameters", f"{count:,}", True),
    ]
    for kind, rows in rows_for(loaded, length, seed).items():
        ours = full_logits(loaded, rows)
        about = [
            *compare_with_transformers(directory, rows, ours),
            check_cache(loaded, rows, ours),
        ]
        checks += [check._replace(name=check.name + kind) for check in about]
    return [
        *checks,
        check_round_trip(directory, loaded),
        check_tokenizer(directory, loaded),
    ]


def rows_for(loaded: Loaded, length: int, seed: int) -> dict[str, Rows]:
    """What a model is compared on, by what its checks are called after their names."""
    model = loaded.model
    if not isinstance(model, Qwen25VL):
        return {"": ragged_rows(model.vocab_size, length, seed)}
    placeholders = (model.config.image_token, model.config.video_token)
    return {
        ", text": ragged_rows(model.vocab_size, length, seed, placeholders),
        ", images": rows_with_images(model.config, model.vocab_size, seed),
    }


def _inputs(loaded: Loaded, rows: Rows) -> tuple[Any, list[jax.Array], Any]:
    """A function from images to the model of the rows, the rows, and the images."""
    arrays = [jnp.asarray(array) for array in rows[:3]]
    model = loaded.model
    if rows.images is None or not isinstance(model, Qwen25VL):
        return (lambda _: model), arrays, None
    images = place_images(model.config, rows.prompts, rows.images)
    return model.with_images, arrays, jax.tree.map(jnp.asarray, images)


def full_logits(loaded: Loaded, rows: Rows) -> np.ndarray:
    """Our logits of the real tokens, `[M, V]`, from one full pass."""
    model, arrays, images = _inputs(loaded, rows)
    apply = jax.jit(lambda params, images, *x: model(images).apply(params, *x))
    return _logits(loaded, apply(loaded.params, images, *arrays), rows)


def cached_logits(loaded: Loaded, rows: Rows) -> np.ndarray:
    """The same by prefill of the first half, with all images, and decoding."""
    model, arrays, images = _inputs(loaded, rows)
    length = rows.tokens.shape[1]
    prompt = length // 2
    if images is not None:
        prompt = max(prompt, rows.last_image_slot + 1)
    split = jax.jit(loaded.model.split_layers)(loaded.params)
    prefill = jax.jit(
        lambda params, images, *x: model(images).prefill(params, *x, length)
    )
    decode = jax.jit(lambda params, images, *x: model(images).decode(params, *x))
    hidden, cache = prefill(split, images, *(a[:, :prompt] for a in arrays))
    states = [hidden]
    for t in range(prompt, length):
        hidden, cache = decode(split, images, *(a[:, t] for a in arrays), cache)
        states.append(hidden[:, None])
    return _logits(loaded, jnp.concatenate(states, axis=1), rows)


def _logits(loaded: Loaded, hidden: jax.Array, rows: Rows) -> np.ndarray:
    head = loaded.model.unembedding(loaded.params)
    real = np.asarray(hidden)[rows.segment_ids != 0]
    product = jnp.einsum("md,vd->mv", real, head, precision=jax.lax.Precision.HIGHEST)
    return np.asarray(product)


def compare_with_transformers(
    directory: Path, rows: Rows, ours: np.ndarray
) -> Iterator[Check]:
    """Largest difference of the logits, and largest KL of a position."""
    reason = transformers_logits.missing(directory)
    if reason is not None:
        yield Check("logits against transformers", reason, None)
        return
    logits = transformers_logits.transformers_logits(directory, rows)
    theirs = logits[rows.segment_ids != 0]
    yield difference("logits against transformers", ours, theirs)
    kl = divergence(theirs, ours)
    found = f"largest {kl.max():.1e}, mean {kl.mean():.1e} nats; at most {MAX_KL:.0e}"
    yield Check("KL of a position", found, bool(kl.max() <= MAX_KL))


def check_cache(loaded: Loaded, rows: Rows, full: np.ndarray) -> Check:
    """Prefill and decoding against the full pass."""
    return difference("cached decoding", cached_logits(loaded, rows), full)


def difference(name: str, got: np.ndarray, expected: np.ndarray) -> Check:
    """Largest difference of logits, relative to the largest of them."""
    apart = float(np.abs(got - expected).max())
    relative = apart / float(np.abs(expected).max())
    found = f"{apart:.1e}, {relative:.1e} of the largest; at most {MAX_DIFFERENCE:.0e}"
    return Check(name, found, relative <= MAX_DIFFERENCE)


def divergence(logits: np.ndarray, other: np.ndarray) -> np.ndarray:
    """KL(softmax(logits) || softmax(other)) of each row, in float64 nats."""

    def log_softmax(x: np.ndarray) -> np.ndarray:
        x = x.astype(np.float64)
        x = x - x.max(axis=-1, keepdims=True)
        return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))

    p, q = log_softmax(logits), log_softmax(other)
    return (np.exp(p) * (p - q)).sum(axis=-1)


def check_round_trip(directory: Path, loaded: Loaded) -> Check:
    """Every tensor as export would write it, in its stored dtype, against its bits."""
    source = hf.published(open_source(directory), loaded.model.config)
    digest = hashlib.sha256()
    changed = []
    for name, tensor in hf.to_hf(loaded.params, loaded.model.config):
        stored = source.read(name)
        exported = np.ascontiguousarray(tensor.astype(stored.dtype))
        digest.update(exported.tobytes())
        if exported.tobytes() != np.ascontiguousarray(stored).tobytes():
            changed.append(name)
        source.release(name)
    if changed:
        found = f"{len(changed)} tensors changed, {changed[0]} among them"
        return Check("round trip", found, False)
    return Check("round trip", f"bit for bit, sha256 {digest.hexdigest()[:16]}", True)


def check_tokenizer(directory: Path, loaded: Loaded) -> Check:
    """Whether the embedding has a row for every id of the tokenizer."""
    if not (directory / "tokenizer.json").is_file():
        return Check("tokenizer", "the checkpoint has none", None)
    tokens, rows = tokenizer_size(load_tokenizer(directory)), loaded.model.vocab_size
    found = f"{tokens} ids, {rows} rows"
    if tokens < rows:
        found += f"; give load(..., vocab_size={tokens}) to cut the padding"
    return Check("tokenizer", found, tokens <= rows)


if __name__ == "__main__":
    cli.main(main, define_flags)
