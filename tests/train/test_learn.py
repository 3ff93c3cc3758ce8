"""Learning from a rollout: its signal by hand, and beside the one-program step."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from chain_model import ChainModel, chain_params

from geomjax.data.batches import pad_prompts
from geomjax.objectives.distill import sampled_token
from geomjax.objectives.sft import cross_entropy
from geomjax.objectives.surrogate import Clip, policy_gradient
from geomjax.optim import standard_promotion
from geomjax.rollout.sample import Rollout
from geomjax.train.learn import (
    Controls,
    PolicyExtras,
    imitate,
    make_draw,
    make_learn,
    policy_signal,
)
from geomjax.train.step import Sampling, init_state, make_distill_step, mini_batch

MODEL = ChainModel(9)
SAMPLING = Sampling(
    samples_per_prompt=2,
    max_new_tokens=4,
    temperature=0.8,
    stop_tokens=(8,),
    pad_token=0,
)
KEY = jax.random.key(3)


def prompts(count=4):
    ids = [np.arange(1 + i % 3, dtype=np.int32) + i % 5 for i in range(count)]
    return jax.tree.map(jnp.asarray, pad_prompts(ids, 3, 0))


def adamw():
    return standard_promotion(optax.adamw(1e-2))


def extras(rewards, **controls):
    return PolicyExtras(jnp.asarray(rewards, jnp.float32), Controls(**controls), KEY)


def log_prob_table(params):
    logits = params["table"] @ params["head"].T / SAMPLING.temperature
    return np.asarray(jax.nn.log_softmax(logits))


@pytest.fixture(scope="module")
def drawn():
    return make_draw(MODEL, SAMPLING)(chain_params(0, 9), prompts(2), KEY)


def gaps(drawn, student, teacher):
    """r_t by the definition, `[B, R]`."""
    tokens = np.asarray(drawn.tokens)
    before, after = tokens[:, 2:-1], tokens[:, 3:]
    gap = (
        log_prob_table(student)[before, after] - log_prob_table(teacher)[before, after]
    )
    return np.where(drawn.completion[:, 3:], gap, 0)


def test_the_signal_of_distillation_is_the_gap_to_the_teacher(drawn):
    student, teacher = chain_params(0, 9), chain_params(1, 9)
    signal = policy_signal(MODEL, MODEL, SAMPLING)(
        student, teacher, drawn, extras(np.zeros(4))
    )
    gap = gaps(drawn, student, teacher)
    np.testing.assert_allclose(signal.advantages, -gap, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(signal.targets, drawn.completion)
    assert signal.metrics["gap"] == pytest.approx(
        gap.sum() / float(drawn.completion.sum()), rel=1e-4
    )
    assert signal.metrics["groups_without_contrast"] == 1


def test_foreign_sequences_are_scored_by_the_student_first(drawn):
    """The recorded log-probabilities are the teacher's, and would give a gap of 0."""
    student, teacher = chain_params(1, 9), chain_params(0, 9)
    signal = policy_signal(MODEL, MODEL, SAMPLING, on_policy=False)(
        student, teacher, drawn, extras(np.zeros(4))
    )
    gap = gaps(drawn, student, teacher)
    assert abs(gap).max() > 0.5
    np.testing.assert_allclose(signal.advantages, -gap, rtol=1e-4, atol=1e-5)


def test_the_signal_of_a_reward_alone_leaves_groups_without_contrast_out(drawn):
    signal = policy_signal(MODEL, None, SAMPLING)(
        chain_params(0, 9), {}, drawn, extras([1, 1, 0, 1], alpha=0.0)
    )
    half = np.sqrt(0.5)
    expected = np.array([0, 0, -half, half])[:, None] * np.asarray(
        drawn.completion[:, 3:]
    )
    np.testing.assert_allclose(signal.advantages, expected, rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(
        signal.targets, drawn.completion & np.array([[0], [0], [1], [1]], bool)
    )
    assert signal.metrics["reward"] == 0.75
    assert signal.metrics["groups_without_contrast"] == 0.5


def test_completions_of_unknown_reward_are_left_out_and_counted(drawn):
    """Here the third of four, whose group then has no contrast."""
    known = jnp.array([True, True, False, True])
    given = extras([1, 0, 0, 1], alpha=0.0)._replace(known=known)
    signal = policy_signal(MODEL, None, SAMPLING)(chain_params(0, 9), {}, drawn, given)
    half = np.sqrt(0.5)
    expected = np.array([half, -half, 0, 0])[:, None] * np.asarray(
        drawn.completion[:, 3:]
    )
    np.testing.assert_allclose(signal.advantages, expected, rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(
        signal.targets, drawn.completion & np.array([[1], [1], [0], [0]], bool)
    )
    assert signal.metrics["silent_rewards"] == 1
    assert signal.metrics["reward"] == pytest.approx(2 / 3)
    assert signal.metrics["groups_without_contrast"] == 0.5


def test_the_mixture_keeps_the_distillation_of_groups_without_contrast(drawn):
    student, teacher = chain_params(0, 9), chain_params(1, 9)
    signal = policy_signal(MODEL, MODEL, SAMPLING)(
        student, teacher, drawn, extras([1, 1, 0, 1], alpha=0.25)
    )
    reward = np.array([0, 0, -1, 1])[:, None] * np.sqrt(0.5)
    expected = -0.25 * gaps(drawn, student, teacher) + 0.75 * reward
    real = np.asarray(drawn.completion[:, 3:])
    got = np.asarray(signal.advantages)
    np.testing.assert_allclose(got[real], expected[real], rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(signal.targets, drawn.completion)


def test_sparsified_tokens_are_those_of_the_largest_gap_and_rescaled(drawn):
    student, teacher = chain_params(0, 9), chain_params(1, 9)
    signal = policy_signal(MODEL, MODEL, SAMPLING)(
        student, teacher, drawn, extras(np.zeros(4), keep=0.25)
    )
    gap, real = gaps(drawn, student, teacher), np.asarray(drawn.completion[:, 3:])
    for row in range(4):  # Of up to four tokens, one is kept.
        best = np.where(real[row], gap[row], -np.inf).argmax()
        expected = np.zeros(4)
        expected[best] = -gap[row, best] * real[row].sum()
        np.testing.assert_allclose(signal.advantages[row], expected, rtol=1e-4)


def test_the_gradient_of_sparsified_tokens_is_that_of_finite_differences(drawn):
    """In float64: -1/N of the sum of A_t times the ratio, one token kept a row."""
    student, teacher = chain_params(0, 9), chain_params(1, 9)
    signal = policy_signal(MODEL, MODEL, SAMPLING)(
        student, teacher, drawn, extras(np.zeros(4), keep=0.25)
    )
    batch = mini_batch(drawn._replace(completion=signal.targets), 4)
    objective = policy_gradient(MODEL, temperature=0.8, clip=Clip(0.2, 0.2))
    gradient = jax.grad(objective, has_aux=True)(
        student, {}, batch._replace(advantages=signal.advantages)
    )[0]

    gap, real = gaps(drawn, student, teacher), np.asarray(drawn.completion[:, 3:])
    best = np.where(real, gap, -np.inf).argmax(axis=1)
    rows, tokens = np.arange(4), np.asarray(drawn.tokens)
    kept = -gap[rows, best] * real.sum(axis=1)

    def log_probs(params):
        scores = params["table"] @ params["head"].T / 0.8
        scores -= np.log(np.exp(scores).sum(axis=1, keepdims=True))
        return scores[tokens[rows, 2 + best], tokens[rows, 3 + best]]

    point = {name: np.asarray(x, np.float64) for name, x in student.items()}
    before = log_probs(point)

    def loss(params):
        return -(kept * np.exp(log_probs(params) - before)).sum() / real.sum()

    generator = np.random.default_rng(0)
    for name, leaf in point.items():
        direction, step = generator.normal(size=leaf.shape), 1e-5
        up, down = (
            loss(point | {name: leaf + sign * step * direction}) for sign in (1, -1)
        )
        slope = float((np.asarray(gradient[name]) * direction).sum())
        assert slope == pytest.approx((up - down) / (2 * step), rel=1e-3)


def test_random_tokens_differ_from_those_of_the_largest_gap(drawn):
    prepare = jax.jit(policy_signal(MODEL, MODEL, SAMPLING))
    student, teacher = chain_params(0, 9), chain_params(1, 9)
    chosen = []
    for seed in range(20):
        one = extras(np.zeros(4), keep=0.25, by_gap=False)._replace(
            key=jax.random.key(seed)
        )
        advantages = prepare(student, teacher, drawn, one).advantages
        assert ((np.asarray(advantages) != 0).sum(axis=1) == 1).all()
        chosen.append((np.asarray(advantages) != 0).argmax(axis=1))
    long = np.asarray(drawn.completion.sum(axis=1)) == 4
    assert long.any()
    assert (np.std(chosen, axis=0)[long] > 0.5).all()


def test_two_programs_do_what_one_does():
    """On-policy distillation in two mini-batches, beside `make_distill_step`."""
    student, teacher = chain_params(0, 9), chain_params(1, 9)
    tx = adamw()
    whole = make_distill_step(
        MODEL,
        sampled_token(MODEL, MODEL, temperature=0.8, clip=0.2),
        tx,
        SAMPLING,
        mini_batches=2,
    )
    learn = make_learn(
        policy_gradient(MODEL, temperature=0.8, clip=Clip(0.2, 0.2)),
        tx,
        policy_signal(MODEL, MODEL, SAMPLING),
        SAMPLING,
        mini_batches=2,
    )
    expected, ours = init_state(student, tx), init_state(student, tx)
    draw = make_draw(MODEL, SAMPLING)
    for step in range(3):
        key = jax.random.fold_in(KEY, step)
        expected, metrics = whole(expected, teacher, prompts(), key)
        rollout = draw(ours.params, prompts(), key)
        ours, got = learn(ours, teacher, rollout, extras(np.zeros(8)))
    for name in ("table", "head"):
        np.testing.assert_allclose(
            ours.params[name], expected.params[name], rtol=1e-4, atol=1e-5
        )
        assert abs(ours.params[name] - student[name]).max() > 0.01
    for name in ("loss", "grad_norm", "ratio", "completion_tokens"):
        np.testing.assert_allclose(got[name], metrics[name], rtol=1e-3, atol=1e-5)
    assert (got["skipped"] == 0).all()
    assert int(ours.step) == 3


def test_a_part_without_contrast_is_skipped_and_the_other_is_not():
    tx = adamw()
    learn = make_learn(
        policy_gradient(MODEL, temperature=0.8, clip=Clip(0.2, 0.28)),
        tx,
        policy_signal(MODEL, None, SAMPLING),
        SAMPLING,
        mini_batches=2,
    )
    student = chain_params(0, 9)
    rollout = make_draw(MODEL, SAMPLING)(student, prompts(), KEY)
    # A first step, so that the optimizer has momentum that a zero gradient would move.
    state, _ = learn(
        init_state(student, tx), {}, rollout, extras([0, 1] * 4, alpha=0.0)
    )
    before = jax.tree.map(np.asarray, state)
    state, metrics = learn(state, {}, rollout, extras([1] * 8, alpha=0.0))
    np.testing.assert_array_equal(metrics["skipped"], [1, 1])
    for got, expected in zip(
        jax.tree.leaves(state[1:]), jax.tree.leaves(before[1:]), strict=True
    ):
        np.testing.assert_array_equal(got, expected)
    half = [1] * 4 + [0, 1, 0, 1]
    state, metrics = learn(state, {}, rollout, extras(half, alpha=0.0))
    np.testing.assert_array_equal(metrics["skipped"], [1, 0])
    assert (np.asarray(state.params["head"]) != before.params["head"]).any()
    assert learn._cache_size() == 1


def test_rewards_move_the_student_towards_what_is_rewarded():
    """A reward for starting with token 5 makes it likelier, step after step."""
    tx = standard_promotion(optax.adamw(3e-2))
    learn = make_learn(
        policy_gradient(MODEL, temperature=0.8, clip=Clip(0.2, 0.28)),
        tx,
        policy_signal(MODEL, None, SAMPLING),
        SAMPLING,
        mini_batches=1,
    )
    draw = make_draw(MODEL, SAMPLING)
    state, rewards = init_state(chain_params(0, 9), tx), []
    for step in range(60):
        key = jax.random.fold_in(KEY, step)
        rollout = draw(state.params, prompts(16), key)
        reward = (rollout.tokens[:, 3] == 5).astype(jnp.float32)
        rewards.append(float(reward.mean()))
        state, _ = learn(state, {}, rollout, extras(reward, alpha=0.0))
    assert np.mean(rewards[-10:]) > np.mean(rewards[:10]) + 0.3


def test_arms_that_differ_in_their_controls_share_one_program():
    tx = adamw()
    learn = make_learn(
        policy_gradient(MODEL, temperature=0.8, clip=Clip(0.2, 0.28)),
        tx,
        policy_signal(MODEL, MODEL, SAMPLING),
        SAMPLING,
        mini_batches=1,
    )
    student, teacher = chain_params(0, 9), chain_params(1, 9)
    rollout = make_draw(MODEL, SAMPLING)(student, prompts(2), KEY)
    ends = []
    for controls in (
        {},
        {"keep": 0.25},
        {"keep": 0.25, "by_gap": False},
        {"alpha": 0.5},
        {"alpha": 0.0},
    ):
        state = init_state(student, tx)
        state, _ = learn(state, teacher, rollout, extras([0, 1, 1, 0], **controls))
        ends.append(np.asarray(state.params["head"]))
    assert learn._cache_size() == 1
    for i, end in enumerate(ends):
        assert all((end != other).any() for other in ends[:i])


def test_imitation_is_supervised_training_on_whatever_was_drawn(drawn):
    tx = standard_promotion(optax.sgd(1.0))
    learn = make_learn(cross_entropy(MODEL), tx, imitate, SAMPLING, mini_batches=1)
    params = chain_params(1, 9)
    state, metrics = learn(init_state(params, tx), {}, drawn, ())
    tokens = np.asarray(drawn.tokens)
    logits = params["table"] @ params["head"].T
    each = np.asarray(jax.nn.log_softmax(logits))[tokens[:, 2:-1], tokens[:, 3:]]
    real = np.asarray(drawn.completion[:, 3:])
    assert metrics["loss"][0] == pytest.approx(-each[real].mean(), rel=1e-5)
    assert (state.params["head"] != params["head"]).any()


@pytest.mark.parametrize("bad", [{"alpha": 1.5}, {"alpha": -0.1}, {"keep": 0.0}])
def test_controls_out_of_range_are_refused(bad):
    with pytest.raises(ValueError, match="expected alpha from 0 to 1"):
        Controls(**bad).check()


def test_groups_of_one_are_refused(drawn):
    one = SAMPLING._replace(samples_per_prompt=1)
    with pytest.raises(ValueError, match="groups have 1 completion"):
        policy_signal(MODEL, None, one)(
            chain_params(0, 9), {}, drawn, extras(np.zeros(4))
        )


def test_rows_that_do_not_split_are_refused():
    tx = adamw()
    learn = make_learn(cross_entropy(MODEL), tx, imitate, SAMPLING, mini_batches=3)
    rollout = make_draw(MODEL, SAMPLING)(chain_params(0, 9), prompts(2), KEY)
    assert isinstance(rollout, Rollout)
    with pytest.raises(ValueError, match="4 sequences cannot be split into 3"):
        learn(init_state(chain_params(0, 9), tx), {}, rollout, ())
