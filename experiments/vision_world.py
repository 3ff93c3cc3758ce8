"""Builds the small vision-language world: anchor, teacher and problems with images.

Two Qwen2.5-VL checkpoints in the Hugging Face layout, trained here from nothing to
read drawn shapes (`geomjax.data.shapes`), and a prompts file with its images. The
weights are not committed: `world_folder` builds them on first use and keeps them.
"""

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import ml_dtypes
import numpy as np
from absl import flags
from ml_collections import config_flags
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from configs import vision_world as recipe
from experiments.common import cli
from experiments.common.compilation_cache import cache_home
from experiments.common.kept import built_once, recipe_digest
from geomjax.checkpoints.writer import write_safetensors
from geomjax.data import shapes
from geomjax.data.characters import character_tokenizer
from geomjax.data.image_processor import ImageProcessor
from geomjax.data.patches import ImagePatches
from geomjax.data.placeholders import expand_placeholders
from geomjax.data.prompts import Example
from geomjax.data.supervised import pad_responses
from geomjax.models import hf
from geomjax.models.families import model_config
from geomjax.models.load import make_model, stored_tensors
from geomjax.models.qwen2_5_vl import Images, Qwen25VL, place_images
from geomjax.objectives.base import Batch, token_mean
from geomjax.objectives.sft import cross_entropy
from geomjax.optim.build import OptimizerSpec, build
from geomjax.rewards.judge import Judge
from geomjax.train import evaluate
from geomjax.train.step import Sampling, init_state, make_supervised_step
from geomjax.typing import Params

RECIPE = Path(__file__).parent.parent / "configs" / "vision_world.py"
PROMPTS = "prompts.jsonl"
START, END, IMAGE, VIDEO = MARKS = (
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
TEMPLATE = (
    "{% for m in messages %}{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for part in m.content %}{% if part.type == 'image' %}"
    f"{START}{IMAGE}{END}"
    "{% else %}{{ part.text }}{% endif %}{% endfor %}{% endif %}{% endfor %}"
)


def define_flags() -> None:
    """Defines the flags; not at import: experiments can be imported together."""
    config_flags.DEFINE_config_file("config", str(RECIPE), "The recipe.")
    flags.DEFINE_string("output", "runs/vision_world", "Folder to write.")


def world_folder(changes: dict[str, Any] | None = None) -> Path:
    """Folder of the world, built on first use in the user's cache.

    Args:
      changes: Fields of the recipe with other values; each recipe has its own folder.
    """
    config = changed_recipe(changes or {})
    folder = cache_home() / "geomjax" / f"vision_world-{recipe_digest(config)}"
    return built_once(folder, lambda output: build_world(config, output))


def changed_recipe(changes: dict[str, Any]) -> ml_collections.ConfigDict:
    """The recipe with other values of some fields."""
    config = recipe.get_config()
    config.update(changes)
    return config


class Task:
    """Questions about drawn shapes, as tokens and patches."""

    def __init__(self, config: ml_collections.ConfigDict, processor: ImageProcessor):
        self.tokenizer = make_tokenizer()
        self.processor = processor
        model = make_model(model_config(config_json(config, self.tokenizer)))
        assert isinstance(model, Qwen25VL)
        self.model = model
        self.response_length = shapes.LONGEST_ANSWER + 1
        grid = self.patches(shapes.draw(np.random.default_rng(0))).grid
        rendered = f"{START}{IMAGE}{END}"
        self.questions = {
            question: expand_placeholders(
                self.tokenizer.encode(rendered + question),
                [grid],
                image_token=self.model.config.image_token,
                video_token=self.model.config.video_token,
                merge_size=processor.merge_size,
            )
            for question in shapes.QUESTIONS
        }
        self.prompt_length = max(map(len, self.questions.values()))
        self.sampling = Sampling(
            samples_per_prompt=1,
            max_new_tokens=self.response_length,
            temperature=1.0,
            stop_tokens=(self.tokenizer.eos_token_id,),
            pad_token=self.tokenizer.pad_token_id,
        )

    def patches(self, drawn: shapes.Drawn) -> ImagePatches:
        """The image as the model reads it."""
        return self.processor(drawn.pixels)

    def answer_ids(self, text: str) -> np.ndarray:
        """Token ids of an answer and the stop token."""
        return np.array(
            [*self.tokenizer.encode(text), self.tokenizer.eos_token_id], np.int32
        )


class Problems(NamedTuple):
    """Images with a question each.

    Attributes:
      patches: The images.
      questions: One an image.
      answers: The right answers.
    """

    patches: list[ImagePatches]
    questions: list[str]
    answers: list[str]

    def prompts(self, task: Task) -> list[np.ndarray]:
        """Token ids of the questions, with their images' placeholders."""
        return [task.questions[question] for question in self.questions]

    def images(self, task: Task, rows: Sequence[int]) -> Images:
        """The images of some of them, as the model takes them."""
        prompts = self.prompts(task)
        return place_images(
            task.model.config,
            [prompts[i] for i in rows],
            [[self.patches[i]] for i in rows],
            task.prompt_length,
        )


class Pool:
    """Images that problems are drawn from."""

    def __init__(self, task: Task, generator: np.random.Generator, count: int):
        self._drawn = [shapes.draw(generator) for _ in range(count)]
        self._patches = [task.patches(drawn) for drawn in self._drawn]

    def problems(self, generator: np.random.Generator, count: int) -> Problems:
        """Random questions about random images."""
        which = generator.integers(0, len(self._drawn), count).tolist()
        asked = [str(q) for q in generator.choice(shapes.QUESTIONS, count)]
        return Problems(
            [self._patches[i] for i in which],
            asked,
            [
                shapes.answer(self._drawn[i].cells, question)
                for i, question in zip(which, asked, strict=True)
            ],
        )


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Characters, marks of images, and a template that puts an image in its place."""
    tokenizer = character_tokenizer(shapes.ALPHABET, pad="<pad>", eos="<eos>")
    tokenizer.add_special_tokens({"additional_special_tokens": list(MARKS)})
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def config_json(
    config: ml_collections.ConfigDict, tokenizer: PreTrainedTokenizerFast
) -> dict[str, Any]:
    """The config.json of the recipe's model."""
    vocabulary = tokenizer.get_vocab()
    ids = {mark: vocabulary[mark] for mark in MARKS}
    return {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "model_type": "qwen2_5_vl",
        "dtype": "bfloat16",
        "vocab_size": len(tokenizer),
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "vision_start_token_id": ids[START],
        "vision_end_token_id": ids[END],
        "image_token_id": ids[IMAGE],
        "video_token_id": ids[VIDEO],
        **config.text.to_dict(),
        "vision_config": config.vision.to_dict(),
    }


def training_batch(
    task: Task, problems: Problems, generator: np.random.Generator, slips: float
) -> Batch:
    """Right answers as targets; in a share `slips` one token is wrong and no target."""
    answers = [task.answer_ids(text) for text in problems.answers]
    slipped = generator.random(len(answers)) < slips
    places = generator.integers(0, [len(ids) - 1 for ids in answers])
    letters = task.tokenizer.encode(shapes.ALPHABET)
    drawn = generator.choice(letters, len(answers))
    rows = np.flatnonzero(slipped)
    for row in rows:
        answers[row][places[row]] = drawn[row]
    padded = pad_responses(
        problems.prompts(task),
        answers,
        prompt_length=task.prompt_length,
        response_length=task.response_length,
        pad_id=task.tokenizer.pad_token_id,
    )
    padded.completion[rows, task.prompt_length + places[rows]] = False
    return Batch(
        tokens=jnp.asarray(padded.tokens),
        positions=jnp.asarray(padded.positions),
        segment_ids=jnp.asarray(padded.segment_ids),
        weights=token_mean(jnp.asarray(padded.completion)),
        behaviour_log_probs=jnp.zeros(padded.tokens.shape, jnp.float32),
        images=problems.images(task, range(len(answers))),
    )


def make_accuracy(task: Task, problems: Problems) -> Callable[[Params], float]:
    """Share of greedy completions that are the answer."""
    pairs = zip(problems.questions, problems.answers, strict=True)
    examples = [Example(q, answer, i) for i, (q, answer) in enumerate(pairs, start=1)]
    scores = evaluate.make_accuracy(
        task.model,
        task.tokenizer,
        problems.prompts(task),
        examples,
        task.sampling,
        Judge("exact"),
        prompt_length=task.prompt_length,
        batch_size=min(256, len(examples)),
        images_of=partial(problems.images, task),
    )
    return lambda params: float(scores(params).mean())


def stored(params: Params) -> Params:
    """The parameters as a bfloat16 checkpoint returns them, in float32."""
    return jax.tree.map(
        lambda x: x.astype(jnp.bfloat16).astype(jnp.float32), jax.device_get(params)
    )


def train(
    config: ml_collections.ConfigDict,
    task: Task,
    accuracy: Callable[[Params], float],
) -> dict[str, tuple[int, Params]]:
    """Trains one model from nothing and keeps two snapshots of it.

    Returns:
      (step, parameters as stored) of `anchor` and `teacher`.

    Raises:
      ValueError: The recipe ends before the anchor is reached.
    """
    model = task.model
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
    images_from, problems_from = np.random.default_rng(config.seed + 1).spawn(2)
    pool = Pool(task, images_from, config.num_training_images)
    snapshots: dict[str, tuple[int, Params]] = {}
    progress = tqdm(range(1, config.teacher_steps + 1), desc="training", unit="step")
    for index in progress:
        problems = pool.problems(problems_from, config.batch_size)
        batch = training_batch(task, problems, problems_from, config.slips)
        state, metrics = step(state, {}, batch)
        if "anchor" not in snapshots and index % config.evaluate_every == 0:
            candidate = stored(state.params)
            reached = accuracy(candidate)
            progress.set_postfix(loss=float(metrics["loss"][0]), accuracy=reached)
            if reached >= config.anchor_accuracy:
                snapshots["anchor"] = index, candidate
    snapshots["teacher"] = config.teacher_steps, stored(state.params)
    if "anchor" not in snapshots:
        raise ValueError(
            f"no snapshot reached an accuracy of {config.anchor_accuracy} in "
            f"{config.teacher_steps} steps (teacher_steps); train longer, or lower "
            "anchor_accuracy"
        )
    return snapshots


def write_checkpoint(directory: Path, params: Params, task: Task, fields: Any) -> None:
    """Writes a checkpoint with its tokenizer; its image processor is there already."""
    write_safetensors(directory, stored_tensors(params, task.model, ml_dtypes.bfloat16))
    special = {name: fields[name] for name in ("eos_token_id", "pad_token_id")}
    for name, content in (("config", fields), ("generation_config", special)):
        text = json.dumps(content, indent=2) + "\n"
        (directory / f"{name}.json").write_text(text)
    task.tokenizer.save_pretrained(directory)


def write_processor(directory: Path, config: ml_collections.ConfigDict) -> None:
    """The image processor's file: images of the grid's size are taken as they are."""
    vision = config.vision
    size = (shapes.SIDE * shapes.CELL) ** 2
    fields = {
        "image_processor_type": "Qwen2VLImageProcessor",
        "min_pixels": size,
        "max_pixels": size,
        "patch_size": vision.patch_size,
        "temporal_patch_size": vision.temporal_patch_size,
        "merge_size": vision.spatial_merge_size,
    }
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "preprocessor_config.json"
    path.write_text(json.dumps(fields, indent=2) + "\n")


def write_problems(output: Path, generator: np.random.Generator, count: int) -> None:
    """Writes prompts, answers and images, a new image for each."""
    images = output / "images"
    images.mkdir(parents=True, exist_ok=True)
    with (output / PROMPTS).open("w") as file:
        for i in range(count):
            drawn = shapes.draw(generator)
            question = str(generator.choice(shapes.QUESTIONS))
            name = f"images/{i:05d}.png"
            (output / name).write_bytes(shapes.png(drawn.pixels))
            row = {
                "prompt": shapes.prompt(question),
                "answer": shapes.answer(drawn.cells, question),
                "images": [name],
            }
            file.write(json.dumps(row) + "\n")


def main() -> None:
    """Builds the world that the flags describe."""
    build_world(flags.FLAGS.config, Path(flags.FLAGS.output))


def build_world(config: ml_collections.ConfigDict, output: Path) -> None:
    """Builds the world and prints what it holds.

    Args:
      config: As `configs/vision_world.py` makes it.
      output: Folder to write; made if missing.

    Raises:
      ValueError: The recipe ends before the anchor is reached.
    """
    for name in ("anchor", "teacher"):
        write_processor(output / name, config)
    task = Task(config, ImageProcessor(output / "anchor"))
    held_out, problems_from = np.random.default_rng([config.seed, 1]).spawn(2)
    validation = Pool(task, held_out, config.num_validation).problems(
        held_out, config.num_validation
    )
    accuracy = make_accuracy(task, validation)
    snapshots = train(config, task, accuracy)
    write_problems(output, problems_from, config.num_problems)
    fields = config_json(config, task.tokenizer)
    table = {}
    for name, (step, params) in snapshots.items():
        write_checkpoint(output / name, params, task, fields)
        table[name] = {"step": step, "accuracy": round(accuracy(params), 4)}
        print(f"{name:8} {table[name]}")
    made = {"snapshots": table, "config": config.to_dict()}
    (output / "recipe.json").write_text(json.dumps(made, indent=2) + "\n")
    print(f"written to {output}")


if __name__ == "__main__":
    cli.main(main, define_flags)
