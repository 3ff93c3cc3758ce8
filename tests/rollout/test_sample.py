"""Sampling against the full forward pass, and what each draw depends on."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from geomjax.models.config import DecoderConfig
from geomjax.models.decoder import Decoder
from geomjax.objectives.vocabulary import token_log_probs
from geomjax.rollout.sample import nucleus, sample, sample_token

VOCAB, PAD = 13, 12
CONFIG = DecoderConfig(
    architecture="Qwen3ForCausalLM",
    vocab_size=16,  # Padding rows: no draw may come from them.
    hidden_size=16,
    intermediate_size=20,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=4,
    rms_norm_eps=1e-6,
    rope_theta=1e4,
    tie_word_embeddings=False,
    max_position_embeddings=32,
)
MODEL = Decoder(CONFIG, VOCAB)
APPLY = jax.jit(MODEL.apply)
NEW = 6


def draw(params, prompts, key=0, width=5, **kwargs):
    """Samples from prompts, lists of ids, padded on the left to `width`."""
    tokens = np.full((len(prompts), width), PAD, np.int32)
    segment_ids = np.zeros((len(prompts), width), np.int32)
    for row, ids in enumerate(prompts):
        tokens[row, width - len(ids) :] = ids
        segment_ids[row, width - len(ids) :] = 1
    positions = np.maximum(np.cumsum(segment_ids, axis=1) - 1, 0).astype(np.int32)
    out = _compiled(**kwargs)(
        params, tokens, positions, segment_ids, jax.random.key(key)
    )
    return jax.tree.map(np.asarray, out)


_programs = {}


def _compiled(max_new_tokens=NEW, stop_tokens=(), temperature=1.0, top_p=1.0):
    static = (max_new_tokens, stop_tokens, temperature, top_p)
    if static not in _programs:
        _programs[static] = jax.jit(
            lambda *args: sample(
                MODEL,
                *args,
                max_new_tokens=max_new_tokens,
                stop_tokens=stop_tokens,
                temperature=temperature,
                pad_token=PAD,
                top_p=top_p,
            )
        )
    return _programs[static]


PROMPTS = [[1, 2, 3, 4, 5], [6, 7], [8, 9, 10]]


@pytest.fixture(scope="module")
def params():
    return MODEL.init(jax.random.key(5))


def test_greedy_is_the_argmax_of_repeated_full_passes(params):
    out = draw(params, PROMPTS, temperature=0.0)
    head = np.asarray(MODEL.unembedding(params))
    for row, prompt in enumerate(PROMPTS):
        ids = list(prompt)
        for _ in range(NEW):
            # One shape for all lengths, padded on the right.
            tokens = np.zeros((1, 11), np.int32)
            tokens[0, : len(ids)] = ids
            segment_ids = (np.arange(11) < len(ids)).astype(np.int32)[None]
            positions = np.arange(11, dtype=np.int32)[None]
            hidden = np.asarray(APPLY(params, tokens, positions, segment_ids))
            ids.append(int(np.argmax(hidden[0, len(ids) - 1] @ head.T)))
        assert out.tokens[row, 5:].tolist() == ids[len(prompt) :]
    # More than one token repeated, or the comparison would show little.
    assert len(np.unique(out.tokens[:, 5:])) > 3


def test_layout_of_a_rollout(params):
    out = draw(params, PROMPTS)
    assert out.tokens.shape == (3, 5 + NEW)
    np.testing.assert_array_equal(out.tokens[1, :5], [PAD, PAD, PAD, 6, 7])
    np.testing.assert_array_equal(out.positions[1], [0, 0, 0, *range(2 + NEW)])
    np.testing.assert_array_equal(out.segment_ids[1], [0] * 3 + [1] * (2 + NEW))
    np.testing.assert_array_equal(out.completion, [[False] * 5 + [True] * NEW] * 3)
    assert (out.log_probs[:, :5] == 0).all()
    assert (out.log_probs[:, 5:] < 0).all()
    assert out.tokens.max() < VOCAB


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_recorded_log_probs_are_those_of_the_full_pass(params, temperature):
    out = draw(params, PROMPTS, temperature=temperature)
    hidden = APPLY(params, out.tokens, out.positions, out.segment_ids)
    again = token_log_probs(
        MODEL,
        params,
        hidden[:, :-1],
        jnp.asarray(out.tokens[:, 1:]),
        temperature=temperature,
    )
    target = out.completion[:, 1:]
    np.testing.assert_allclose(
        out.log_probs[:, 1:][target], np.asarray(again)[target], atol=1e-5
    )


def test_greedy_tokens_are_scored_at_temperature_1(params):
    out = draw(params, PROMPTS, temperature=0.0)
    hidden = APPLY(params, out.tokens, out.positions, out.segment_ids)
    again = token_log_probs(
        MODEL, params, hidden[:, :-1], jnp.asarray(out.tokens[:, 1:]), temperature=1.0
    )
    target = out.completion[:, 1:]
    np.testing.assert_allclose(
        out.log_probs[:, 1:][target], np.asarray(again)[target], atol=1e-5
    )


def cut_at(free, stops):
    """What a rollout without stop tokens becomes if rows end at their first stop."""
    tokens, completion = free.tokens.copy(), free.completion.copy()
    for row in range(len(tokens)):
        hits = [s for s in range(5, tokens.shape[1]) if tokens[row, s] in stops]
        if hits:
            tokens[row, hits[0] + 1 :] = PAD
            completion[row, hits[0] + 1 :] = False
    return tokens, completion


@pytest.mark.parametrize("early", [False, True], ids=["one row goes on", "all stop"])
def test_stop_tokens_end_rows_and_early_exit_changes_nothing(params, early):
    free = draw(params, PROMPTS)
    third = [int(free.tokens[row, 7]) for row in range(3)]
    stops = tuple(sorted(set(third if early else third[:1])))
    if early:
        stops = tuple(sorted({*stops, *third}))
    out = draw(params, PROMPTS, stop_tokens=stops)
    tokens, completion = cut_at(free, stops)
    np.testing.assert_array_equal(out.tokens, tokens)
    np.testing.assert_array_equal(out.completion, completion)
    if early:
        assert not completion[:, 8:].any()
    # The stop token itself belongs to the completion, what follows is padding.
    assert completion[0].sum() <= 3
    after = ~completion & (np.arange(tokens.shape[1]) >= 5)
    assert (out.segment_ids[after] == 0).all()
    assert (out.positions[after] == 0).all()
    assert (out.log_probs[after] == 0).all()
    np.testing.assert_allclose(
        out.log_probs[completion], free.log_probs[completion], atol=1e-6
    )
    np.testing.assert_array_equal(out.segment_ids[:, 5:] == 1, completion[:, 5:])


def test_a_draw_depends_on_key_row_and_step_alone(params):
    out = draw(params, PROMPTS)
    np.testing.assert_array_equal(draw(params, PROMPTS).tokens, out.tokens)
    other = draw(params, [[3, 3, 3], *PROMPTS[1:]])
    assert (other.tokens[0] != out.tokens[0]).any()
    np.testing.assert_array_equal(other.tokens[1:], out.tokens[1:])
    np.testing.assert_array_equal(
        draw(params, PROMPTS, width=8).tokens[:, 8:], out.tokens[:, 5:]
    )
    np.testing.assert_array_equal(
        draw(params, PROMPTS[:2]).tokens, out.tokens[:2], err_msg="a smaller batch"
    )
    fewer = draw(params, PROMPTS, max_new_tokens=1)
    np.testing.assert_array_equal(fewer.tokens, out.tokens[:, :6])
    np.testing.assert_array_equal(fewer.completion.sum(axis=1), [1, 1, 1])
    assert (draw(params, PROMPTS, key=1).tokens != out.tokens).any()


def test_equal_prompts_draw_different_completions(params):
    out = draw(params, [[1, 2, 3]] * 3)
    assert len({tuple(row) for row in out.tokens.tolist()}) == 3


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_draws_follow_the_distribution_at_the_temperature(temperature):
    """A chi-square test with fixed keys: 1 % of keys would fail it."""
    count = 4000
    logits = np.array([0.0, 0.5, 1.0, -1.0, 1.5], np.float32)
    keys = jax.random.split(jax.random.key(3), count)
    token, log_prob = jax.jit(sample_token, static_argnums=2)(
        jnp.tile(logits, (count, 1)), keys, temperature
    )
    probabilities = np.exp(logits / temperature)
    probabilities /= probabilities.sum()
    np.testing.assert_allclose(log_prob, np.log(probabilities)[token], rtol=1e-5)
    observed = np.bincount(token, minlength=5)
    expected = count * probabilities
    chi_square = ((observed - expected) ** 2 / expected).sum()
    assert chi_square < 13.28  # 99 % of the distribution with four degrees of freedom.
    wrong = (
        np.exp(logits) / np.exp(logits).sum() if temperature < 1 else np.full(5, 0.2)
    )
    assert ((observed - count * wrong) ** 2 / (count * wrong)).sum() > 100


def nucleus_by_hand(probabilities, top_p):
    """Kept tokens: those whose betters hold less than `top_p`, by the definition."""
    return np.array(
        [probabilities[probabilities > p].sum() < top_p for p in probabilities]
    )


@pytest.mark.parametrize(
    ("probabilities", "top_p", "kept"),
    [
        ([0.5, 0.3, 0.15, 0.05], 0.8001, 3),  # The third makes the mass complete.
        ([0.5, 0.3, 0.15, 0.05], 0.79, 2),
        ([0.5, 0.3, 0.15, 0.05], 0.2, 1),
        ([0.5, 0.3, 0.15, 0.05], 1e-6, 1),
        ([0.25, 0.25, 0.25, 0.25], 0.3, 4),  # Equals share one fate.
        ([0.4, 0.2, 0.2, 0.2], 0.5, 4),
    ],
)
def test_nucleus_of_hand_worked_cases(probabilities, top_p, kept):
    order = np.random.default_rng(0).permutation(4)
    given = np.array(probabilities, np.float32)[order]
    got = np.asarray(nucleus(jnp.log(given)[None], top_p))[0]
    expected = np.array(probabilities) * (np.arange(4) < kept)
    np.testing.assert_allclose(
        np.exp(got), (expected / expected.sum())[order], rtol=1e-6
    )


def test_nucleus_of_many_tokens_is_that_of_the_definition():
    logits = np.random.default_rng(1).normal(size=(5, 3000)).astype(np.float32)
    log_probs = jax.nn.log_softmax(jnp.asarray(logits))
    for top_p in (0.1, 0.7, 0.95):
        got = np.asarray(nucleus(log_probs, top_p))
        for row, exact in zip(got, np.exp(np.asarray(log_probs, float)), strict=True):
            np.testing.assert_array_equal(
                np.isfinite(row), nucleus_by_hand(exact, top_p)
            )
        np.testing.assert_allclose(np.exp(got).sum(axis=-1), 1, rtol=1e-5)


def test_draws_come_from_the_nucleus_with_its_probabilities():
    """A chi-square test with fixed keys: 1 % of keys would fail it."""
    count, kept = 4000, np.array([True, True, True, False, True])
    logits = np.array([0.0, 0.5, 1.0, -1.0, 1.5], np.float32)
    keys = jax.random.split(jax.random.key(4), count)
    token, log_prob = jax.jit(sample_token, static_argnums=(2, 3))(
        jnp.tile(logits, (count, 1)), keys, 1.0, 0.96
    )
    expected = np.exp(logits) * kept
    expected /= expected.sum()
    np.testing.assert_allclose(log_prob, np.log(expected[token]), rtol=1e-5)
    observed = np.bincount(token, minlength=5)
    assert observed[3] == 0
    chi = ((observed - count * expected)[kept] ** 2 / (count * expected[kept])).sum()
    assert chi < 11.35  # 99 % of the distribution with three degrees of freedom.


def test_the_whole_distribution_takes_todays_path(params):
    """The compiled program of `top_p` 1 is the one without it, bit for bit."""
    logits = jax.random.normal(jax.random.key(2), (64, 50))
    keys = jax.random.split(jax.random.key(3), 64)

    def plain(logits, keys):
        log_probs = jax.nn.log_softmax(logits / 0.7)
        token = jax.vmap(jax.random.categorical)(keys, log_probs).astype(jnp.int32)
        return token, jnp.take_along_axis(log_probs, token[:, None], axis=-1)[:, 0]

    for got, expected in zip(
        jax.jit(sample_token, static_argnums=(2, 3))(logits, keys, 0.7, 1.0),
        jax.jit(plain)(logits, keys),
        strict=True,
    ):
        np.testing.assert_array_equal(got, expected)
    narrow = draw(params, PROMPTS, top_p=1e-6)
    np.testing.assert_array_equal(
        narrow.tokens, draw(params, PROMPTS, temperature=0.0).tokens
    )
    assert (narrow.log_probs[narrow.completion] == 0).all()


def test_later_steps_follow_the_distribution_too(params):
    """Steps and rows use different keys: counts over both are as expected."""
    flat = params | {"lm_head": {"weight": jnp.zeros((16, 16))}}
    out = draw(flat, [[1, 2]] * 200, key=9)
    observed = np.bincount(out.tokens[:, 5:].ravel(), minlength=VOCAB)
    expected = 200 * NEW / VOCAB
    assert ((observed - expected) ** 2 / expected).sum() < 26.22  # 99 %, 12 degrees.
    steps = out.tokens[:, 5:]
    assert abs((steps[:, 1:] == steps[:, :-1]).mean() - 1 / VOCAB) < 0.03
    assert abs((steps[1:] == steps[:-1]).mean() - 1 / VOCAB) < 0.03


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens is 0; expected 1 or more"),
        ({"temperature": -0.5}, "temperature is -0.5; expected 0"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_p": 0.0}, "top_p is 0.0; expected above 0"),
        ({"top_p": 1.5}, "top_p is 1.5"),
    ],
)
def test_settings_without_a_meaning_are_refused(params, kwargs, message):
    with pytest.raises(ValueError, match=message):
        draw(params, PROMPTS, **kwargs)
