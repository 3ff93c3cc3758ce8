"""The forms of the loss at their smallest, and what their names may be."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
from scipy.special import softmax

from configs.loss_forms import get_config
from configs.tiny_world import get_config as get_recipe
from experiments import loss_forms
from experiments.common.world import TINY_WORLD
from experiments.studies.begin import begin
from experiments.studies.forms import is_form, make_form
from experiments.studies.run import Run
from geomjax.data.arithmetic import alphabet
from geomjax.data.batches import PromptBatch
from geomjax.models.load import load, make_model
from geomjax.train.privileged import join_views
from geomjax.train.step import mini_batch

MODEL = load(TINY_WORLD / "anchor").model


@pytest.mark.parametrize(("variant", "size"), [("tiny", 136), ("smoke", 16)])
def test_every_form_of_the_configuration_is_one(variant, size):
    model = make_model(dataclasses.replace(MODEL.config, vocab_size=size))
    for name, arm in get_config(variant).arms.items():
        if name != "sampled_token":
            assert is_form(arm.kind)
            assert callable(make_form(arm.kind, model, model, 1.0))


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("top_k:reverse_kl:3:student", "expected one of"),
        ("privileged:hinge", "expected one of"),
        ("top_k:hinge:3:student:bucket", "expected one of"),
        ("top_k:reverse_kl:three:student:bucket", "expected one of"),
        ("top_k:reverse_kl:16:student:bucket", "k is 16"),
        ("top_k:reverse_kl:1:student:renormalise", "k is 1"),
        ("top_k:reverse_kl:3:both:bucket", "support 'both'"),
    ],
)
def test_bad_names_are_refused(kind, message):
    assert is_form(kind)
    with pytest.raises(ValueError, match=message):
        make_form(kind, MODEL, MODEL, 1.0)


def settings():
    """The smoke run with what it leaves out: self-distillation, and a second seed."""
    config = get_config("smoke")
    config.arms.opsd = get_config("tiny").arms.opsd
    config.seeds = (0, 1)
    return config


@pytest.mark.slow
def test_results_and_report(tmp_path):
    workdir = tmp_path / "finished"
    record = loss_forms.run(settings(), workdir)
    assert json.loads((workdir / "results.json").read_text()) == record
    assert set(record["arms"]) == {
        "sampled_token",
        "reverse_kl",
        "top_reverse_bucket",
        "opsd",
    }
    assert set(record["compilations"].values()) == {1}
    assert {"draw privileged", "learn privileged:jsd"} <= set(record["compilations"])
    assert len(record["claims"]) == 5
    (whole,) = record["moments"]["reverse_kl"].values()
    (sampled,) = record["moments"]["sampled_token"].values()
    assert len(sampled) == len(whole) == 2
    for ours, theirs in zip(sampled, whole, strict=True):
        assert ours["tokens"] == theirs["tokens"]
        for found in (ours, theirs):
            # Of some forty tokens the signal may be within its own noise.
            tokens, variance = found["tokens"], found["variance"]
            variance *= tokens / (tokens - 1)
            signal = found["mean_square"] - variance
            if signal > 0:
                assert found["noise_to_signal"] == pytest.approx(variance / signal)
            else:
                assert found["noise_to_signal"] is None
    text = (workdir / "report.md").read_text()
    assert "The sampled token's gradient" in text
    assert "Noise at equal cost" in text
    costs = record["flops_per_token"]
    assert set(costs) == set(record["arms"])
    # Both teachers score all tokens; of 16 entries or one, the model's share decides.
    assert costs["sampled_token"] == pytest.approx(costs["reverse_kl"], rel=0.2)
    # Its teacher reads the answer as well, in a view of its own.
    assert costs["opsd"] > costs["reverse_kl"]
    # The finished runs once more, without second moments.
    shutil.copytree(workdir / "arms", tmp_path / "run" / "arms")
    workdir = tmp_path / "run"
    config = settings()
    config.moment_matrices = ()
    again = loss_forms.run(config, workdir)
    assert again["claims"] == record["claims"][1:]
    assert again["moments"] == again["flops_per_token"] == {}
    assert "Noise of the gradients" not in (workdir / "report.md").read_text()


def test_the_larger_k_is_at_most_a_quarter_of_its_worlds_vocabulary():
    """k = 32 of P1 and 16 of thunlp/OPD, in a world of 136 tokens and not of 16."""
    size = len(alphabet(get_recipe(get_config("tiny").world).scripts)) + 3
    kinds = [arm.kind.split(":") for arm in get_config("tiny").arms.values()]
    largest = max(int(kind[2]) for kind in kinds if kind[0] == "top_k")
    assert largest == 32
    assert size / 5 < largest <= size / 4
    assert get_config("smoke").world == ""


def test_a_privileged_reader_of_prompts_with_images_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("experiments.studies.begin.has_images", lambda examples: True)
    with (
        pytest.raises(ValueError, match="arm opsd: privileged:jsd is of text, and the"),
        begin(settings(), tmp_path / "run", loss_forms.NAME),
    ):
        pass
    assert not (tmp_path / "run").exists()


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("forms")
    with begin(settings(), workdir, loss_forms.NAME) as begun:
        yield begun.study


def test_the_teacher_of_self_distillation_reads_the_answer_and_then_the_completion(
    study,
):
    run = Run("opsd", "privileged:jsd", 1e-4, 0)
    world = study.world
    drawn, _ = study.draw(run, world.student.params, 0)
    plain, _ = study.draw(run._replace(kind="distill"), world.student.params, 0)
    slots = study._sequences.privileged_slots
    student = jax.tree.map(lambda x: np.asarray(x)[:, slots:], drawn)
    for ours, theirs in zip(student, plain, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    answers = {e.prompt: e.answer for e in world.train.examples}
    last = world.sampling.max_new_tokens
    for row in range(len(drawn.tokens)):
        view, own = (
            [np.asarray(x)[row, part] for x in drawn[:3]]
            for part in (slice(slots), slice(slots, None))
        )
        text, prompt = (
            world.tokenizer.decode(tokens[:-last][segments[:-last] > 0])
            for tokens, _, segments in (view, own)
        )
        assert text == f"{answers[prompt]}={prompt}"
        for ours, theirs in zip(view[::2], own[::2], strict=True):
            np.testing.assert_array_equal(ours[-last:], theirs[-last:])
        real = view[2] > 0
        np.testing.assert_array_equal(view[1][real], np.arange(real.sum()))
    assert not np.asarray(drawn.completion)[:, :slots].any()
    index = np.zeros(len(plain.tokens), np.int32)
    prompts = PromptBatch(*plain[:3], index=index)
    with pytest.raises(ValueError, match="the prompts have images"):
        join_views(plain._replace(images=np.zeros(1)), prompts, last)


def test_self_distillation_is_the_divergence_between_the_two_views(study):
    """Student and teacher, each applied to its own view apart."""
    run = Run("opsd", "privileged:jsd", 1e-4, 0)
    world = study.world
    anchor, other = world.student.params, world.teacher.params
    drawn, _ = study.draw(run, anchor, 0)
    last, slots = world.sampling.max_new_tokens, study._sequences.privileged_slots
    objective, _ = study.loss(run.kind)
    loss, _ = objective(other, study.context(run.kind), mini_batch(drawn, last))

    def log_probs(params, part):
        model = world.student.model
        hidden = model.apply(params, *(x[:, part] for x in drawn[:3]))
        scores = np.asarray(hidden @ model.unembedding(params).T, np.float64)
        return np.log(softmax(scores[:, -last - 1 : -1], axis=-1))

    ours = log_probs(other, slice(slots, None))
    theirs = log_probs(anchor, slice(slots))
    mixture = np.log((np.exp(ours) + np.exp(theirs)) / 2)
    each = sum((np.exp(p) * (p - mixture)).sum(axis=-1) / 2 for p in (ours, theirs))
    targets = np.asarray(drawn.completion)[:, -last:]
    assert loss == pytest.approx(each[targets].mean(), rel=1e-4)
    # Another student than the anchor, so that the two views alone do not decide.
    same, _ = objective(anchor, study.context(run.kind), mini_batch(drawn, last))
    assert loss != pytest.approx(float(same), rel=1e-2)


def test_without_a_template_there_is_no_privileged_view(tmp_path):
    config = settings()
    config.privileged = ""
    with pytest.raises(ValueError, match="privileged is empty; expected such as"):
        loss_forms.run(config, tmp_path / "run")


def test_arms_that_others_are_compared_with_must_be_there(tmp_path):
    config = get_config("smoke")
    del config.arms["reverse_kl"]
    with pytest.raises(ValueError, match=r"no arms \['reverse_kl'\]"):
        loss_forms.run(config, tmp_path / "run")
