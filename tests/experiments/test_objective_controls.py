"""The controls at their smallest, and the figures of their second moments by hand."""

import json
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from configs.objective_controls import get_config
from experiments import objective_controls
from experiments.studies import sequences as sequences_module
from experiments.studies.begin import begin
from experiments.studies.moments import TokenGradients, figures, read_matrices
from experiments.studies.run import Run
from geomjax.models import hf
from geomjax.rewards.contract import Judgement
from geomjax.train.learn import Controls
from geomjax.train.log import read_rows
from geomjax.train.step import mini_batch


def test_figures_by_hand():
    """Two gradients along x, one of them reversed, and one along y, as reference."""
    each = np.array([[3.0, 0.0, 0.0], [-3.0, 0.0, 0.0], [0.0, 3.0, 0.0]])
    found = figures(each, each, directions=1)
    assert found["tokens"] == 3
    assert found["mean_square"] == pytest.approx(9)
    assert found["variance"] == pytest.approx(8)
    # Three tokens of variance 12 could have a mean of square 4: it is 1.
    assert found["noise_to_signal"] is None
    assert found["participation"] == pytest.approx(81 / 45)
    assert found["top_share"] == pytest.approx(2 / 3)
    assert found["alignment"] == pytest.approx(1)
    assert found["chance"] == pytest.approx(1 / 3)
    turned = figures(each[:, [2, 1, 0]], each, directions=1)
    assert turned["alignment"] == pytest.approx(0, abs=1e-12)


def test_noise_to_signal_by_hand():
    """Of two gradients the mean's square is 4, of which their variance of 2 has 1."""
    each = np.array([[3.0, 0.0], [1.0, 0.0]])
    assert figures(each, each)["noise_to_signal"] == pytest.approx(2 / 3)
    assert figures(each, each[:1])["noise_to_signal"] is None


def test_noise_to_signal_has_the_expectation_of_many_draws():
    """Where the signal is 1 and the variance 20, of as many tokens; seldom above N."""
    draws = np.random.default_rng(0).normal(size=(400, 40, 20))
    draws[..., 0] += 1.0
    found = [figures(each, each)["noise_to_signal"] for each in draws]
    assert None not in found
    assert np.median(found) == pytest.approx(20, rel=0.1)
    biased = [each.var(axis=0).sum() / (each.mean(axis=0) ** 2).sum() for each in draws]
    assert np.median(biased) < 15


def test_gradients_that_are_all_zero_have_no_directions():
    found = figures(np.ones((3, 4)), np.zeros((3, 4)), directions=2)
    assert found.get("alignment") is None
    assert found["chance"] == 0.5


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    config = get_config("smoke")
    workdir = tmp_path_factory.mktemp("study")
    with begin(config, workdir, objective_controls.NAME) as begun:
        yield begun.study


@pytest.mark.parametrize(
    "text",
    ["layers.mlp.up_proj", "layers.mlp.up_proj:2", "norm:0", "layers.mlp.up:0", "x:y"],
)
def test_what_is_no_matrix_of_the_model_is_refused(study, text):
    config = get_config("smoke")
    config.moment_matrices = (text,)
    with pytest.raises(ValueError, match=f"moment_matrices: '{text}' is no matrix"):
        read_matrices(config, study)


def settings():
    """The smoke run with what it leaves out: more arms, and a second seed."""
    config, whole = get_config("smoke"), get_config("tiny")
    for name in ("off_policy", "sft"):
        config.arms[name] = whole.arms[name]
    config.seeds = (0, 1)
    return config


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("controls") / "run"
    return workdir, objective_controls.run(settings(), workdir)


@pytest.mark.slow
def test_results_and_report(finished):
    workdir, record = finished
    assert json.loads((workdir / "results.json").read_text()) == record
    assert set(record["arms"]) == set(settings().arms)
    assert {len(found) for found in record["moments"]["sft"].values()} == {2}
    assert len(record["claims"]) == 6
    text = (workdir / "report.md").read_text()
    for part in ("alignment with OPD", "cos(m, g)", "moves the weights further"):
        assert part in text


@pytest.mark.slow
def test_all_controls_of_the_students_rollouts_share_a_program(finished):
    counts = finished[1]["compilations"]
    assert set(counts.values()) == {1}
    learnt = {name for name in counts if name.startswith("learn")}
    assert learnt == {"learn distill", "learn foreign", "learn imitate"}


@pytest.mark.slow
def test_plain_opd_agrees_with_itself_better_than_chance(finished):
    for found in finished[1]["moments"]["opd"].values():
        for seed in found:
            assert seed["alignment"] > 5 * seed["chance"]
            assert 1 <= seed["participation"] <= seed["tokens"]


@pytest.mark.slow
def test_the_controls_differ_where_they_should(finished):
    workdir, record = finished

    def first(arm):
        rows = read_rows(workdir / "arms" / arm / "seed_0")
        return next(row for row in rows if row["kind"] == "train")

    # The same first rollout: the same gap and reward, another gradient.
    for name in ("top_25", "random_25", "mix_50", "rlvr"):
        assert first(name)["gap"] == pytest.approx(first("opd")["gap"], rel=1e-4)
        assert first(name)["grad_norm"] != first("opd")["grad_norm"]
    assert first("off_policy")["gap"] < first("opd")["gap"]
    norms = [a["geometry"]["master"]["delta_frobenius"] for a in _values(record)]
    assert len(set(norms)) == len(norms)


def _values(record):
    return record["arms"].values()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["distill", "responses"])
def test_token_gradients_sum_to_the_gradient_of_the_first_update(study, kind):
    """Weighted equally, as the token mean does; beside the loss's own gradient."""
    keep = 0.25 if kind == "distill" else 1.0
    spec = Run("arm", kind, 1e-4, 0, controls=Controls(keep=keep))
    (matrix,) = read_matrices(study.config, study)
    each = TokenGradients(study)(spec, matrix)
    params, teacher = study.world.student.params, study.world.teacher.params
    objective, prepare = study.loss(kind)
    rollout, extras = study.draw(spec, params, 0)
    signal = prepare(params, teacher, rollout, extras)
    batch = mini_batch(rollout, study.world.sampling.max_new_tokens)
    batch = batch._replace(advantages=signal.advantages)
    gradient = jax.grad(objective, has_aux=True)(params, teacher, batch)[0]
    expected = np.asarray(hf.leaf(gradient, matrix.path)[matrix.place])
    # Where the terms of a sum cancel, what is left of it is their rounding.
    difference = np.abs(each.mean(axis=0).reshape(expected.shape) - expected)
    terms = np.abs(each).mean(axis=0).reshape(expected.shape)
    assert (difference <= 1e-3 * np.abs(expected) + 1e-5 * terms).all()
    dropped = (each == 0).all(axis=1).mean()
    assert (0.5 < dropped < 0.8) if kind == "distill" else dropped == 0


@pytest.mark.slow
def test_rewards_of_texts_are_those_of_tokens(study, monkeypatch):
    """The judge on the host, beside token equality on the device."""
    spec = Run("rlvr", "distill", 1e-4, 0, controls=Controls(alpha=0.0))
    params = study.world.student.params
    on_device = np.asarray(study.draw(spec, params, 0)[1].rewards)
    monkeypatch.setattr(study._sequences, "_padded", None)
    on_host = np.asarray(study.draw(spec, params, 0)[1].rewards)
    np.testing.assert_array_equal(on_device, on_host)
    assert 0 < on_device.mean() < 1


def test_a_reward_that_raises_is_unknown_and_no_zero(study, monkeypatch):
    """A text that was cut off is wrong whatever its reward says."""
    sequences = study._sequences
    texts = [SimpleNamespace(text=str(i), stopped=i != 3) for i in range(4)]
    judged = [
        Judgement(1.0, ""),
        Judgement(0.0, "raised", "failed"),
        Judgement(0.0, "no number", "unparsed reference"),
        Judgement(0.0, "raised", "failed"),
    ]
    monkeypatch.setattr(sequences_module, "decode_completions", lambda *_: texts)
    monkeypatch.setattr(sequences, "_judge", lambda *_: judged)
    assert sequences._scores(np.zeros((4, 1)), np.zeros(4, int)) == [1.0, None, None, 0]
