import json
import re

import jax
import jax.numpy as jnp
import ml_collections
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file
from transformers import AutoTokenizer

from configs.optimizer_ablation import get_config
from configs.tiny_world import get_config as get_recipe
from experiments import tiny_world
from experiments.common.world import TINY_WORLD, load_world
from geomjax.data.answers import decode_completions, exact_match
from geomjax.data.prompts import read_prompts
from geomjax.data.splits import split_examples
from geomjax.models.load import load
from geomjax.rewards.judge import Judge
from geomjax.rollout.sample import sample
from geomjax.train.evaluate import make_accuracy

NAMES = ("base", "anchor", "teacher")
MEGABYTE = 10**6


@pytest.fixture(scope="module")
def recipe():
    return json.loads((TINY_WORLD / "recipe.json").read_text())


@pytest.fixture(scope="module")
def examples():
    return read_prompts(TINY_WORLD / "prompts.jsonl", require_answers=True)


@pytest.fixture(scope="module")
def splits(examples, recipe):
    config = recipe["config"]
    return split_examples(
        examples, validation=config["num_validation"], test=config["num_test"]
    )


def right_answer(prompt):
    """Running values of a chain, worked out apart from the generator."""
    assert re.fullmatch(r"\d([+-]\d)+=", prompt)
    ends = [match.end() for match in re.finditer(r"[+-]\d", prompt)]
    return "".join(str(eval(prompt[:end]) % 10) for end in ends)


# --- what is committed --------------------------------------------------------------


def test_artifacts_are_small():
    files = [path for path in TINY_WORLD.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 6 * MEGABYTE
    assert {path.name for path in TINY_WORLD.iterdir()} == {
        *NAMES,
        "prompts.jsonl",
        "recipe.json",
    }


def test_the_recipe_is_the_one_in_configs(recipe):
    assert recipe["config"] == json.loads(json.dumps(get_recipe().to_dict()))


@pytest.mark.parametrize("name", NAMES)
def test_checkpoints_are_in_the_hugging_face_layout(name):
    folder = TINY_WORLD / name
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["Qwen3ForCausalLM"]
    assert config["dtype"] == "bfloat16"
    tensors = load_file(folder / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {
        np.dtype(ml_dtypes.bfloat16)
    }
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert len(tokenizer) == config["vocab_size"]
    assert tokenizer.eos_token_id == config["eos_token_id"]
    assert tokenizer.decode(tokenizer.encode("7+3-8=")) == "7+3-8="
    assert len(tokenizer.encode("7+3-8=")) == 6


def test_the_checkpoints_differ():
    weights = [
        load_file(TINY_WORLD / name / "model.safetensors")["model.embed_tokens.weight"]
        for name in NAMES
    ]
    for i, j in ((0, 1), (1, 2), (0, 2)):
        assert np.any(weights[i] != weights[j])


def test_every_answer_is_right(examples):
    wrong = [e.line for e in examples if e.answer != right_answer(e.prompt)]
    assert wrong == []


def test_prompts_are_distinct_and_of_the_recipe_s_lengths(examples, recipe):
    assert len({e.prompt for e in examples}) == recipe["config"]["num_problems"]
    fewest, most = recipe["config"]["operations"]
    assert {len(e.answer) for e in examples} == set(range(fewest, most + 1))


def test_splits_are_disjoint(splits, examples):
    parts = [{e.prompt for e in part} for part in splits]
    assert sum(map(len, parts)) == len(examples)
    assert not parts[0] & parts[1] | parts[0] & parts[2] | parts[1] & parts[2]
    assert (len(parts[1]), len(parts[2])) == (512, 1024)


def test_the_ablation_holds_out_only_what_the_world_was_not_trained_on(splits):
    world = load_world(get_config())
    held_out = {e.prompt for e in (*splits.validation, *splits.test)}
    for part in (world.validation, world.test):
        assert {e.prompt for e in part.examples} <= held_out
    assert len(world.validation.examples) >= 250
    assert len(world.test.examples) >= 1000


# --- what the models can do ---------------------------------------------------------


@pytest.fixture(scope="module")
def accuracy(splits):
    """Greedy accuracy of a checkpoint on the test split, right or wrong by problem."""
    anchor = load(TINY_WORLD / "anchor")
    tokenizer = AutoTokenizer.from_pretrained(TINY_WORLD / "anchor")
    task = tiny_world.Task(get_recipe(), tokenizer)
    score = make_accuracy(
        anchor.model,
        tokenizer,
        task.encode([str(example.prompt) for example in splits.test]),
        splits.test,
        task.sampling(),
        Judge("exact"),
        prompt_length=task.prompt_length,
        batch_size=256,
    )
    return lambda name: score(load(TINY_WORLD / name).params)


@pytest.mark.parametrize("name", NAMES)
def test_accuracies_are_those_of_the_recipe(accuracy, recipe, name):
    recorded = recipe["snapshots"][name]["test_accuracy"]
    # Rounding on another platform may turn a few close decisions.
    assert accuracy(name).mean() == pytest.approx(recorded, abs=0.01)


def test_the_student_is_partly_competent_and_the_teacher_nearly_perfect(recipe):
    found = {
        name: recipe["snapshots"][name]["test_accuracy"] for name in recipe["snapshots"]
    }
    assert set(found) == set(NAMES)
    assert found["base"] < found["anchor"]
    assert 0.2 <= found["anchor"] <= 0.4
    assert found["teacher"] >= 0.95


@pytest.mark.parity
@pytest.mark.parametrize("name", NAMES)
def test_transformers_gives_the_same_answers(splits, name):
    torch = pytest.importorskip("torch", reason="needs PyTorch: the parity extra")
    from transformers import AutoModelForCausalLM

    chosen = [e for e in splits.test if len(e.answer) == 4][:48]
    tokenizer = AutoTokenizer.from_pretrained(TINY_WORLD / name)
    tokens = np.array([tokenizer.encode(e.prompt) for e in chosen], np.int32)
    peer = AutoModelForCausalLM.from_pretrained(TINY_WORLD / name, dtype=torch.float32)
    with torch.no_grad():
        theirs = peer.generate(
            torch.tensor(tokens, dtype=torch.long),
            attention_mask=torch.ones(tokens.shape, dtype=torch.long),
            max_new_tokens=5,
            do_sample=False,
        ).numpy()
    model, params = load(TINY_WORLD / name)
    positions = np.broadcast_to(
        np.arange(tokens.shape[1], dtype=np.int32), tokens.shape
    )
    ours = sample(
        model,
        params,
        jnp.asarray(tokens),
        jnp.asarray(positions),
        jnp.ones(tokens.shape, jnp.int32),
        jax.random.key(0),
        max_new_tokens=5,
        stop_tokens=(tokenizer.eos_token_id,),
        temperature=0.0,
        pad_token=tokenizer.pad_token_id,
    ).tokens

    def right(completions):
        texts = decode_completions(
            completions[:, tokens.shape[1] :], tokenizer, (tokenizer.eos_token_id,)
        )
        return [
            exact_match(text.text, e.answer).value
            for text, e in zip(texts, chosen, strict=True)
        ]

    assert right(np.asarray(ours)) == right(theirs.astype(np.int32))


# --- rebuilding ---------------------------------------------------------------------


@pytest.fixture
def short_recipe():
    config = get_recipe()
    config.update(
        warmup_steps=1,
        base_steps=1,
        evaluate_every=2,
        anchor_accuracy=0.0,
        teacher_steps=3,
        batch_size=8,
        num_problems=60,
        num_test=16,
        num_validation=8,
    )
    return config


def small(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    config.model.update(
        hidden_size=16, intermediate_size=16, num_layers=1, num_heads=1, num_kv_heads=1
    )
    return config


def test_a_short_rebuild_writes_the_whole_folder(short_recipe, tmp_path, monkeypatch):
    trained_on = []
    batch = tiny_world.Task.batch

    def record(task, examples, *rest, **options):
        trained_on.extend(example.prompt for example in examples)
        return batch(task, examples, *rest, **options)

    monkeypatch.setattr(tiny_world.Task, "batch", record)
    tiny_world.build_world(short_recipe, tmp_path)
    for name in NAMES:
        committed, built = (
            {path.name for path in (root / name).iterdir()}
            for root in (TINY_WORLD, tmp_path)
        )
        assert built == committed
        specs = [
            {n: (t.shape, t.dtype) for n, t in load_file(path).items()}
            for path in (
                TINY_WORLD / name / "model.safetensors",
                tmp_path / name / "model.safetensors",
            )
        ]
        assert specs[0] == specs[1]
        AutoTokenizer.from_pretrained(tmp_path / name)
    recipe = json.loads((tmp_path / "recipe.json").read_text())
    assert {n: s["step"] for n, s in recipe["snapshots"].items()} == {
        "base": 1,
        "anchor": 2,
        "teacher": 3,
    }
    assert recipe["config"]["teacher_steps"] == 3
    examples = read_prompts(tmp_path / "prompts.jsonl", require_answers=True)
    assert len(examples) == 60
    splits = split_examples(examples, validation=8, test=16)
    held_out = {e.prompt for e in (*splits.validation, *splits.test)}
    assert len(trained_on) == 3 * 8
    assert not held_out & set(trained_on)


@pytest.mark.parametrize(
    ("fields", "missing"),
    [({"base_steps": 9}, "base"), ({"evaluate_every": 9}, "anchor")],
)
def test_a_recipe_that_ends_too_soon_is_refused(
    short_recipe, tmp_path, fields, missing
):
    short_recipe.update(fields)
    with pytest.raises(ValueError, match=rf"ended before the snapshots \['{missing}'"):
        tiny_world.build_world(small(short_recipe), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_an_anchor_that_is_never_reached_is_refused(short_recipe, tmp_path):
    short_recipe.update(anchor_accuracy=1.0, max_anchor_steps=2)
    with pytest.raises(ValueError, match="no snapshot reached an accuracy of 1.0 in 2"):
        tiny_world.build_world(small(short_recipe), tmp_path)


def test_nothing_is_trained_on_what_is_held_out_elsewhere(
    short_recipe, tmp_path, monkeypatch
):
    trained_on = []
    batch = tiny_world.Task.batch

    def record(task, examples, *rest, **options):
        trained_on.append({example.prompt for example in examples})
        return batch(task, examples, *rest, **options)

    monkeypatch.setattr(tiny_world.Task, "batch", record)
    recipe = small(short_recipe)
    tiny_world.build_world(recipe, tmp_path / "first")
    first, *_ = trained_on
    held_out = set(sorted(first)[:3])
    assert len(held_out) == 3
    trained_on.clear()
    tiny_world.build_world(recipe, tmp_path / "second", held_out)
    again, *_ = trained_on
    assert not held_out & set.union(*trained_on)
    assert first - held_out <= again
    assert all(len(prompts) == 8 for prompts in trained_on)


def test_hints_stand_in_front_of_their_share_of_the_prompts():
    config = get_recipe("scripts")
    config.update(scripts=2, hints=0.5)
    tokenizer = tiny_world.character_tokenizer(
        tiny_world.arithmetic.alphabet(2), pad="<pad>", eos="<eos>"
    )
    task = tiny_world.Task(config, tokenizer)
    examples = task.problems(np.random.default_rng(0), 200)
    batch = task.batch(examples, np.random.default_rng(1), slips=0.0)
    texts = [
        tokenizer.decode([t for t, s in zip(row, segment, strict=True) if s])
        for row, segment in zip(
            batch.tokens.tolist(), batch.segment_ids.tolist(), strict=True
        )
    ]
    plain = [f"{e.prompt}{e.answer}<eos>" for e in examples]
    hinted = [f"{e.answer}={e.prompt}{e.answer}<eos>" for e in examples]
    assert all(t in pair for t, *pair in zip(texts, plain, hinted, strict=True))
    share = np.mean([t == h for t, h in zip(texts, hinted, strict=True)])
    assert abs(share - 0.5) < 0.15  # Four standard deviations.


def test_a_variant_is_built_once_and_kept(short_recipe, tmp_path, monkeypatch):
    """Its folder goes by the recipe: another recipe has another one."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    built = []

    def build(config, folder):
        built.append(config.scripts)
        (folder / "prompts.jsonl").touch()

    monkeypatch.setattr(tiny_world, "build_world", build)
    first = tiny_world.world_folder("scripts")
    assert tiny_world.world_folder("scripts") == first
    assert first.parent == tmp_path / "geomjax"
    assert built == [13]
    with pytest.raises(ValueError, match="variant 'script'; known: scripts"):
        tiny_world.world_folder("script")
