"""Builds the bundled tiny world: base, anchor and teacher checkpoints, and problems.

Three small Qwen3 checkpoints in the Hugging Face layout, trained here on chained
arithmetic modulo 10, and the prompts file that goes with them. The committed artifacts
under experiments/artifacts/tiny_world are the output of this program with its defaults.
"""

import json
from collections.abc import Callable, Collection
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_collections
import ml_dtypes
import numpy as np
from absl import flags
from ml_collections import config_flags
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from configs import tiny_world as recipe
from experiments.common import cli
from experiments.common.compilation_cache import cache_home
from experiments.common.kept import built_once, recipe_digest
from geomjax.checkpoints.writer import write_safetensors
from geomjax.data import arithmetic
from geomjax.data.characters import character_tokenizer
from geomjax.data.prompts import Example
from geomjax.data.splits import split_examples
from geomjax.data.supervised import pad_responses
from geomjax.models import hf
from geomjax.models.config import DecoderConfig
from geomjax.models.decoder import Decoder
from geomjax.models.load import make_decoder, new_config_json, stored_tensors
from geomjax.objectives.base import Batch, token_mean
from geomjax.objectives.sft import cross_entropy
from geomjax.optim.build import OptimizerSpec, build
from geomjax.rewards.judge import Judge
from geomjax.train.evaluate import make_accuracy
from geomjax.train.step import Sampling, init_state, make_supervised_step
from geomjax.typing import Params

ARTIFACTS = Path(__file__).parent / "artifacts" / "tiny_world"
RECIPE = Path(__file__).parent.parent / "configs" / "tiny_world.py"


def define_flags() -> None:
    """Defines the flags; not at import: experiments can be imported together."""
    config_flags.DEFINE_config_file("config", str(RECIPE), "The recipe.")
    flags.DEFINE_string("output", str(ARTIFACTS), "Folder to write.")


class Task:
    """The problems of the tiny world, encoded."""

    def __init__(
        self, config: ml_collections.ConfigDict, tokenizer: PreTrainedTokenizerFast
    ):
        self.operations = tuple(config.operations)
        self.scripts, self.hints = config.scripts, config.hints
        self.operators = config.operators
        self.tokenizer = tokenizer
        self.response_length = self.operations[1] + 1
        self.prompt_length = 2 * self.operations[1] + 2
        if self.hints:
            self.prompt_length += self.response_length

    def problems(
        self, generator: np.random.Generator, count: int, scripts: int | None = None
    ) -> list[Example]:
        """Random problems, in all scripts or the first so many."""
        return arithmetic.problems(
            generator, count, self.operations, scripts or self.scripts, self.operators
        )

    def encode(self, texts: list[str]) -> list[np.ndarray]:
        """Token ids of prompts or answers; all at once, as one by one takes longer."""
        return [np.array(ids, np.int32) for ids in self.tokenizer(texts).input_ids]

    def batch(
        self, examples: list[Example], generator: np.random.Generator, slips: float
    ) -> Batch:
        """Problems with their answers, every right token weighted equally.

        In a share `slips` of them one value is drawn at random and the chain goes on
        from it; that value is no target. So a model knows how to go on from a mistake,
        and a teacher has an opinion wherever a student may lead it. A share `hints` of
        the prompts has the answer in front.
        """
        stop = self.tokenizer.eos_token
        slipped = generator.random(len(examples)) < slips
        positions = generator.integers(0, [len(e.answer or "") for e in examples])
        digits = generator.integers(0, 10, len(examples))
        answers = [
            arithmetic.with_slip(example, position, digit) if slip else example.answer
            for example, slip, position, digit in zip(
                examples, slipped, positions.tolist(), digits.tolist(), strict=True
            )
        ]
        read = examples
        if self.hints:
            hinted = generator.random(len(examples)) < self.hints
            read = [
                arithmetic.hinted(example) if hint else example
                for example, hint in zip(examples, hinted, strict=True)
            ]
        padded = pad_responses(
            self.encode([str(example.prompt) for example in read]),
            self.encode([f"{answer}{stop}" for answer in answers]),
            prompt_length=self.prompt_length,
            response_length=self.response_length,
            pad_id=self.tokenizer.pad_token_id,
        )
        rows = np.flatnonzero(slipped)
        padded.completion[rows, self.prompt_length + positions[rows]] = False
        return Batch(
            tokens=jnp.asarray(padded.tokens),
            positions=jnp.asarray(padded.positions),
            segment_ids=jnp.asarray(padded.segment_ids),
            weights=token_mean(jnp.asarray(padded.completion)),
            behaviour_log_probs=jnp.zeros(padded.tokens.shape, jnp.float32),
        )

    def sampling(self) -> Sampling:
        """Greedy decoding of whole answers."""
        return Sampling(
            samples_per_prompt=1,
            max_new_tokens=self.response_length,
            temperature=1.0,
            stop_tokens=(self.tokenizer.eos_token_id,),
            pad_token=self.tokenizer.pad_token_id,
        )


def stored(params: Params) -> Params:
    """The parameters as a bfloat16 checkpoint returns them, in float32."""
    return jax.tree.map(
        lambda x: x.astype(jnp.bfloat16).astype(jnp.float32), jax.device_get(params)
    )


def scripts_at(config: ml_collections.ConfigDict, step: int) -> int:
    """Scripts that problems are in at a step: one at first, then ever more of them."""
    if not config.script_every:
        return config.scripts
    more = (step - config.one_script_steps) // config.script_every
    return min(1 + max(0, more), config.scripts)


def train(
    config: ml_collections.ConfigDict,
    model: Decoder,
    task: Task,
    held_out: set[str],
    evaluate: Callable[[Params], np.ndarray],
) -> dict[str, tuple[int, Params]]:
    """Trains one model from nothing and keeps three snapshots of it.

    Returns:
      (step, parameters as stored) of `base`, `anchor` and `teacher`.

    Raises:
      ValueError: The recipe ends before the base or the anchor is reached.
    """
    tx = build(
        OptimizerSpec(
            name="adamw",
            learning_rate=config.learning_rate,
            schedule="linear",
            warmup_steps=config.warmup_steps,
            total_steps=config.teacher_steps,
            clip_norm=1.0,
        ),
        hf.roles(model.config),
    )
    step = make_supervised_step(cross_entropy(model), tx)
    state = init_state(model.init(jax.random.key(config.seed)), tx)
    generator = np.random.default_rng(config.seed + 1)
    snapshots: dict[str, tuple[int, Params]] = {}
    progress = tqdm(range(1, config.teacher_steps + 1), desc="training", unit="step")
    for index in progress:
        scripts = scripts_at(config, index)
        examples = task.problems(generator, 2 * config.batch_size, scripts)
        fresh = [e for e in examples if e.prompt not in held_out][: config.batch_size]
        state, metrics = step(state, {}, task.batch(fresh, generator, config.slips))
        if index == config.base_steps:
            snapshots["base"] = index, stored(state.params)
        if "anchor" not in snapshots and index % config.evaluate_every == 0:
            candidate = stored(state.params)
            accuracy = float(evaluate(candidate).mean())
            progress.set_postfix(loss=float(metrics["loss"][0]), accuracy=accuracy)
            if accuracy >= config.anchor_accuracy:
                snapshots["anchor"] = index, candidate
            elif index >= config.max_anchor_steps:
                raise ValueError(
                    f"no snapshot reached an accuracy of {config.anchor_accuracy} in "
                    f"{index} steps; the last had {accuracy}"
                )
    snapshots["teacher"] = config.teacher_steps, stored(state.params)
    missing = {"base", "anchor"} - snapshots.keys()
    if missing:
        raise ValueError(
            f"{config.teacher_steps} steps (teacher_steps) ended before the snapshots "
            f"{sorted(missing)}; train longer, or lower base_steps or anchor_accuracy"
        )
    return snapshots


def write_checkpoint(
    directory: Path, params: Params, model: Decoder, tokenizer: PreTrainedTokenizerFast
) -> None:
    """Writes a checkpoint with its tokenizer, as transformers lays it out."""
    write_safetensors(directory, stored_tensors(params, model, ml_dtypes.bfloat16))
    special = {
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    files = {
        "config.json": new_config_json(model, dtype="bfloat16", **special),
        "generation_config.json": special,
    }
    for name, content in files.items():
        (directory / name).write_text(json.dumps(content, indent=2) + "\n")
    tokenizer.save_pretrained(directory)


def world_folder(variant: str) -> Path:
    """Folder of a variant of the recipe, built on first use in the user's cache."""
    config = recipe.get_config(variant)
    name = f"tiny_world-{variant}-{recipe_digest(config)}"
    folder = cache_home() / "geomjax" / name
    return built_once(folder, lambda made: build_world(config, made))


def main() -> None:
    """Builds the world that the flags describe."""
    build_world(flags.FLAGS.config, Path(flags.FLAGS.output))


def build_world(
    config: ml_collections.ConfigDict,
    output: Path,
    held_out_elsewhere: Collection[str] = (),
) -> None:
    """Builds the world and prints what it holds.

    Args:
      config: As `configs/tiny_world.py` makes it.
      output: Folder to write; made if missing.
      held_out_elsewhere: Further prompts that nothing is trained on.

    Raises:
      ValueError: The recipe ends before the base or the anchor is reached.
    """
    alphabet = arithmetic.alphabet(config.scripts, config.operators)
    tokenizer = character_tokenizer(alphabet, pad="<pad>", eos="<eos>")
    task = Task(config, tokenizer)
    decoder_config = DecoderConfig(
        architecture="Qwen3ForCausalLM",
        vocab_size=len(tokenizer),
        rms_norm_eps=1e-6,
        tie_word_embeddings=False,
        **config.model,
    )
    dtype = jnp.dtype(config.compute_dtype)
    model = make_decoder(decoder_config, len(tokenizer), dtype)

    # Numbered anew after duplicates are dropped: the line is the line of prompts.jsonl.
    generator = np.random.default_rng(config.seed)
    drawn = task.problems(generator, 2 * config.num_problems)
    unique = list({example.prompt: example for example in drawn}.values())
    examples = [
        example._replace(line=i)
        for i, example in enumerate(unique[: config.num_problems], 1)
    ]
    splits = split_examples(
        examples, validation=config.num_validation, test=config.num_test
    )
    held_out = {str(e.prompt) for e in (*splits.validation, *splits.test)}

    def accuracy_on(part: list[Example]) -> Callable[[Params], np.ndarray]:
        return make_accuracy(
            model,
            tokenizer,
            task.encode([str(example.prompt) for example in part]),
            part,
            task.sampling(),
            Judge("exact"),
            prompt_length=task.prompt_length,
            batch_size=256,
        )

    on_validation = accuracy_on(splits.validation)
    unseen = held_out.union(held_out_elsewhere)
    snapshots = train(config, model, task, unseen, on_validation)

    output.mkdir(parents=True, exist_ok=True)
    with (output / "prompts.jsonl").open("w") as file:
        for example in examples:
            row = {"prompt": example.prompt, "answer": example.answer}
            file.write(json.dumps(row) + "\n")
    on_test = accuracy_on(splits.test)
    table = {}
    for name, (step, params) in snapshots.items():
        write_checkpoint(output / name, params, model, tokenizer)
        table[name] = {
            "step": step,
            "validation_accuracy": round(float(on_validation(params).mean()), 4),
            "test_accuracy": round(float(on_test(params).mean()), 4),
        }
        print(f"{name:8} {table[name]}")
    recipe = {"snapshots": table, "config": config.to_dict()}
    (output / "recipe.json").write_text(json.dumps(recipe, indent=2) + "\n")
    print(f"written to {output}")


if __name__ == "__main__":
    cli.main(main, define_flags)
