r"""Accuracy of a checkpoint on problem suites: mean@k, pass@k, majority@k, intervals.

    python -m experiments.evaluate --checkpoint=DIR --suite=aime24,aime25 --workdir=OUT
    python -m experiments.evaluate --checkpoint=DIR --compare=DIR2 \
        --suite=math-500=FILE.jsonl,tiny-world --workdir=OUT

Suites are the named datasets of `geomjax.data.adapters` (from the hub, its cache, or a
local file in their schema), the tiny world's test split, and files of {prompt, answer};
`experiments.evaluation.suites` says how each is named. OUT gets `report.html` with its
generations, `results.json`, and all generations as JSON lines; a run that was killed
continues when it is started again, and ends with the same bytes. Several processes
divide the blocks of generations, each with the whole model on its first device or a
`--mesh` of its own, and process 0 writes the report; a suite has about
problems x samples / (8 x rows) blocks. SIGTERM to one of them stops all, in the midst
of a block; whole blocks are kept.

Defaults: 16 samples (P1, arXiv 2606.13657, reports mean@16), at most 15,360 tokens (its
Table 5), temperature 0.7 and top-p 0.95. P1 gives neither of the last two: they are the
validation settings of thunlp/OPD, whose configuration P1 says it follows. Intervals
resample problems, stratified by nothing.
"""

import json
import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
from absl import flags
from tqdm import tqdm

from experiments.common import cli
from experiments.common import workdir as workdirs
from experiments.common.environment import command, environment
from experiments.common.prompts import encode, has_images
from experiments.common.provenance import record_start
from experiments.evaluation import report
from experiments.evaluation.generations import (
    Generation,
    Task,
    by_problem,
    collect,
    generate,
    keep_problems,
    missing_blocks,
)
from experiments.evaluation.suites import Suite, read_suites
from geomjax import hosts
from geomjax.data.batches import ImagesOf, longest
from geomjax.data.chat import as_conversations, describe_first, thinking_settings
from geomjax.data.encode import EncodedPrompts
from geomjax.data.image_prompts import read_images
from geomjax.data.overlap import fingerprint
from geomjax.data.tokenizers import load_tokenizer, stop_token_ids, tokenizer_size
from geomjax.evaluation.bootstrap import Bootstrap, Interval
from geomjax.evaluation.summary import Problems, difference, summarize
from geomjax.meshes import ONE_DEVICE, Placement, mesh_from_string
from geomjax.models.load import Loaded, checkpoint_directory, load
from geomjax.rewards.pool import RewardPool
from geomjax.rollout.chunks import Drawing
from geomjax.rollout.continuous import ContinuousSampler

FREE = frozenset({"reward_workers"})
"""Settings that no result depends on."""

CHAT = ("auto", "on", "off")
THINKING = ("default", "on", "off")


def define_flags() -> None:
    """Defines the flags; not at import: experiments can be imported together."""
    flags.DEFINE_string("checkpoint", "", "Checkpoint folder, or its name on the hub.")
    flags.DEFINE_string(
        "compare", "", "A second checkpoint, compared problem by problem."
    )
    flags.DEFINE_string(
        "suite", "aime24,aime25", "Suites: NAME or NAME=PATH, by commas."
    )
    flags.DEFINE_string("workdir", "runs/evaluate", "Folder of generations and report.")
    flags.DEFINE_integer("samples", 16, "Completions of each problem, k (P1: 16).")
    flags.DEFINE_float("temperature", 0.7, "Softmax temperature; 0 is greedy.")
    flags.DEFINE_float("top_p", 0.95, "Mass of the nucleus sampled from; 1 for all.")
    flags.DEFINE_integer("max_new_tokens", 15_360, "Most tokens of a completion (P1).")
    flags.DEFINE_integer("seed", 0, "Seed of the draws.")
    flags.DEFINE_enum(
        "chat", "auto", CHAT, "Use the chat template, as images must; auto: if any."
    )
    flags.DEFINE_string("system", "", "System prompt, with the chat template.")
    flags.DEFINE_enum("thinking", "default", THINKING, "Thinking mode of the template.")
    flags.DEFINE_integer("limit", 0, "Problems of each suite; 0 for all.")
    flags.DEFINE_integer("rows", 64, "Sequences decoded at a time.")
    flags.DEFINE_enum(
        "compute_dtype", "float32", ("float32", "bfloat16"), "Of weights and compute."
    )
    flags.DEFINE_string(
        "mesh",
        "",
        "Its devices by axis, such as data=2,tensor=2; empty: the first.",
    )
    flags.DEFINE_string("reward", "", "Reward module:function instead of the suites'.")
    flags.DEFINE_float("reward_timeout_s", 60.0, "Seconds for one judgement.")
    flags.DEFINE_integer(
        "reward_workers", min(8, os.cpu_count() or 1), "Processes that judge."
    )
    flags.DEFINE_integer("resamples", 10_000, "Bootstrap resamples, B.")
    flags.DEFINE_integer("bootstrap_seed", 0, "Seed of the resamples.")
    flags.DEFINE_float("confidence", 0.95, "Stated coverage of the intervals.")


_FIELDS = (
    "checkpoint compare suite samples temperature top_p max_new_tokens seed chat "
    "system thinking limit rows compute_dtype mesh reward reward_timeout_s "
    "reward_workers resamples bootstrap_seed confidence"
).split()


def main() -> None:
    """Runs the evaluation that the flags describe."""
    values, workdir = flags.FLAGS, Path(flags.FLAGS.workdir)
    asked = ml_collections.ConfigDict({name: values[name].value for name in _FIELDS})
    with workdirs.locked(workdir):
        config = workdirs.claim(workdir, asked, resume=False, free=FREE)
        run(config, workdir)


def run(config: ml_collections.ConfigDict, workdir: Path) -> dict[str, Any]:
    """Evaluates, writes and prints.

    Args:
      config: The flags of this module by name, but for `workdir`.
      workdir: Folder of this configuration.

    Returns:
      What `results.json` holds.
    """
    if not config.checkpoint:
        raise ValueError(
            "--checkpoint names no checkpoint; give a folder or a hub name"
        )
    if config.samples < 1:
        raise ValueError(f"--samples is {config.samples}; expected 1 or more")
    suites = read_suites(config.suite, reward=config.reward, limit=config.limit)
    seen = [suite.name for suite in suites if has_images(suite.examples)]
    if config.chat == "off" and seen:
        raise ValueError(
            f"--chat=off, but {', '.join(seen)} has images, whose places only a chat "
            "template knows; expected auto or on"
        )
    # A file may be another on another host, and a hub's data may have changed between.
    workdirs.require_alike({each.name: fingerprint(each.examples) for each in suites})
    names = ("checkpoint", "compare") if config.compare else ("checkpoint",)
    folders = {name: checkpoint_directory(config[name]) for name in names}
    local = {s.name: s.source for s in suites if s.source and s.source.is_file()}
    workdirs.claim_inputs(workdir, folders | local, {})
    record_start(workdir, "evaluate")
    made = {
        name: _evaluate(config, workdir, name, folder, suites)
        for name, folder in folders.items()
    }
    return hosts.on_main(lambda: _conclude(config, workdir, suites, made))


def _conclude(
    config: ml_collections.ConfigDict,
    workdir: Path,
    suites: Sequence[Suite],
    made: dict[str, list[list[Generation]]],
) -> dict[str, Any]:
    """Writes and prints what the generations say."""
    bootstrap = Bootstrap(config.resamples, config.bootstrap_seed, config.confidence)
    results: list[report.Result] = []
    problems: dict[tuple[str, str], Problems] = {}
    for name, by_suite in made.items():
        for suite, generations in zip(suites, by_suite, strict=True):
            judged = by_problem(generations, len(suite.examples))
            problems[name, suite.name] = judged
            summary = summarize(judged, bootstrap)
            results.append(report.Result(suite, name, summary, generations))
    differences = {
        suite.name: difference(
            problems["checkpoint", suite.name],
            problems["compare", suite.name],
            bootstrap,
        )
        for suite in suites
        if config.compare
    }
    record = _record(config, results, differences)
    temporary = workdir / ".results.json.tmp"
    temporary.write_text(json.dumps(record, indent=2) + "\n")
    temporary.replace(workdir / "results.json")
    facts = {"Configuration": record["config"], "Environment": record["environment"]}
    files = report.write(workdir, results, differences, bootstrap, facts, command())
    _print(results, differences)
    print(f"\nreport: {files.page}")
    return record


def _evaluate(
    config: ml_collections.ConfigDict,
    workdir: Path,
    name: str,
    folder: Path,
    suites: Sequence[Suite],
) -> list[list[Generation]]:
    """The generations of one checkpoint on every suite, in process 0."""
    tokenizer = load_tokenizer(folder)
    dtype = jnp.dtype(config.compute_dtype)
    size = tokenizer_size(tokenizer)
    # Of several processes, each evaluates its blocks on its own devices.
    place = (
        Placement(mesh_from_string(config.mesh, jax.local_devices()))
        if config.mesh
        else ONE_DEVICE
    )
    loaded = load(
        folder, vocab_size=size, param_dtype=dtype, dtype=dtype, placement=place
    )
    model, params = loaded
    directory = workdir / name
    directory.mkdir(exist_ok=True)
    plans = []
    for suite in suites:
        keep_problems(directory / f"{suite.name}.problems.jsonl", suite.examples)
        context = model.config.text.max_position_embeddings
        encoded = _encode(config, suite, tokenizer, loaded)
        print(f"\n{name}, {suite.name}: {describe_first(encoded, tokenizer)}")
        drawing = _drawing(config, encoded, context, tokenizer, folder)
        task = Task(
            examples=encoded.examples,  # With `thinking`, which rewards ask for.
            token_ids=encoded.token_ids,
            samples=config.samples,
            # Some eight fillings of the rows: little is lost by a kill, and the rows
            # stand idle only at the end of a block.
            block=max(1, 8 * config.rows // config.samples),
            seed=config.seed,
            images_of=_images_of(encoded, loaded),
        )
        path = directory / f"{suite.name}.jsonl"
        plans.append((path, task, drawing, missing_blocks(path, task)))

    def make_all() -> None:
        turn = 0
        for suite, (path, task, drawing, blocks) in zip(suites, plans, strict=True):
            sampler = ContinuousSampler(model, params, drawing, rows=config.rows)
            make = partial(generate, path, task, blocks, turn, sampler, tokenizer)
            _with_progress(config, suite, task, blocks, make)
            turn += len(blocks)

    # A block may take longer than a process that is told to end is given.
    hosts.independently(make_all)
    return [collect(path, task) for path, task, _, _ in plans]


def _images_of(encoded: EncodedPrompts, loaded: Loaded) -> ImagesOf | None:
    """Reads the images of some problems; None where they have none."""
    if not has_images(encoded.examples):
        return None
    return read_images(encoded, loaded.image_reading, longest(encoded.token_ids))


def _drawing(
    config: ml_collections.ConfigDict,
    encoded: EncodedPrompts,
    context: int,
    tokenizer: Any,
    folder: Path,
) -> Drawing:
    """How completions are drawn, within the model's context."""
    most = longest(encoded.token_ids)
    room = min(config.max_new_tokens, context - most)
    if room < config.max_new_tokens:
        print(
            f"completions end at {room} tokens, where the context of {context} "
            f"leaves no more beside the longest prompt ({most})"
        )
    stops, pad = stop_token_ids(tokenizer, folder), tokenizer.pad_token_id
    return Drawing(
        max_new_tokens=room,
        stop_tokens=stops,
        temperature=config.temperature,
        top_p=config.top_p,
        pad_token=stops[0] if pad is None else pad,
    )


def _encode(
    config: ml_collections.ConfigDict, suite: Suite, tokenizer: Any, loaded: Loaded
) -> EncodedPrompts:
    """The suite's prompts; none is dropped, as that would change the accuracy."""
    chat = config.chat == "on" or (
        config.chat == "auto" and tokenizer.chat_template is not None
    )
    if (config.system or config.thinking != "default") and not chat:
        raise ValueError(
            "--system and --thinking are parts of a chat template, which is not in use"
        )
    examples, settings = suite.examples, {}
    if chat:
        examples = as_conversations(examples, system=config.system or None)
        modes = {"default": None, "on": True, "off": False}
        settings = dict(thinking_settings(tokenizer, modes[config.thinking]))
    limit = loaded.model.config.text.max_position_embeddings - 1
    return encode(
        examples,
        tokenizer,
        loaded,
        limit,
        images=has_images(examples),
        template_settings=settings,
    )


def _with_progress(
    config: ml_collections.ConfigDict,
    suite: Suite,
    task: Task,
    blocks: Sequence[int],
    make: Callable[..., None],
) -> None:
    """Lets `make` judge with the suite's reward, and shows how far it is."""
    total, scored = len(task.examples) * task.samples, [0, 0.0]
    left = sum(min(task.block, len(task.examples) - first) for first in blocks)
    with (
        RewardPool(
            suite.reward,
            workers=config.reward_workers,
            timeout_s=config.reward_timeout_s,
        ) as pool,
        tqdm(
            total=total,
            initial=total - left * task.samples,
            desc=suite.name,
            unit="sample",
            disable=not hosts.is_main(),
        ) as bar,
    ):

        def on_samples(block: Sequence[Generation]) -> None:
            scored[0] += len(block)
            scored[1] += sum(each.judged.judgement.score for each in block)
            bar.set_postfix(score=f"{scored[1] / scored[0]:.3f}", refresh=False)
            bar.update(len(block))

        make(pool, on_samples)


def _record(
    config: ml_collections.ConfigDict,
    results: Sequence[report.Result],
    differences: dict[str, Interval],
) -> dict[str, Any]:
    def plain(value: Any) -> Any:
        if isinstance(value, tuple) and hasattr(value, "_asdict"):
            return plain(value._asdict())
        if isinstance(value, dict):
            return {str(key): plain(each) for key, each in value.items()}
        if isinstance(value, list):
            return [plain(each) for each in value]
        return None if value != value else value  # JSON has no NaN.

    suites: dict[str, dict[str, Any]] = {}
    for result in results:
        suites.setdefault(result.suite.name, {})[result.model] = plain(result.summary)
    return {
        "suites": suites,
        "differences": plain(differences),
        "unparsed_references": unparsed_references(results),
        "rewards": {result.suite.name: result.suite.reward for result in results},
        "config": workdirs.resolved(config),
        "environment": environment(),
    }


def unparsed_references(results: Sequence[report.Result]) -> dict[str, list[int]]:
    """Lines of the problems whose own answer cannot be read, by suite."""
    return {
        result.suite.name: sorted(
            {
                result.suite.examples[generation.problem].line
                for generation in result.generations
                if generation.judged.judgement.status == "unparsed reference"
            }
        )
        for result in results
    }


def _print(results: Sequence[report.Result], differences: dict[str, Interval]) -> None:
    print()
    for result in results:
        summary, shown = result.summary, report.shown
        print(
            f"{result.suite.name:16} {result.model:10} mean@{summary.samples} "
            f"{shown(summary.mean)}  majority {shown(summary.majority)}  truncated "
            f"{shown(summary.truncated)}"
        )
        apart = {
            status: count
            for status, count in summary.statuses.items()
            if status in ("failed", "unparsed reference", "timed out")
        }
        if apart:
            print(f"  judgements to look at: {apart}")
    for name, where in unparsed_references(results).items():
        if where:
            print(f"{name}: left out, as their answers cannot be read: lines {where}")
    for name, found in differences.items():
        print(f"{name:16} compare - checkpoint: {report.shown(found)}")


if __name__ == "__main__":
    cli.main(main, define_flags, shared=True)
