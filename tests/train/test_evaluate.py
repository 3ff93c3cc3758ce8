"""Greedy accuracy and divergence on held-out prompts, with a model worked by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from chain_model import ChainModel, chain_params

from geomjax.data.characters import character_tokenizer
from geomjax.data.prompts import Example
from geomjax.rewards.contract import Judgement
from geomjax.rewards.judge import Judge
from geomjax.train.evaluate import make_accuracy, make_divergence
from geomjax.train.step import Sampling

JUDGE = Judge("exact")


@pytest.fixture(scope="module")
def tokenizer():
    return character_tokenizer("abcd", pad="<pad>", eos="<eos>")


def successor(tokenizer, chain):
    """Parameters of a model that follows `chain`, a dict from token to next token."""
    size = len(tokenizer)
    head = np.zeros((size, size), np.float32)
    for token, following in chain.items():
        head[following, token] = 5.0
    return {"table": jnp.eye(size, dtype=jnp.float32), "head": jnp.asarray(head)}


def accuracy_of(tokenizer, prompts, answers, batch_size, judge=JUDGE):
    sampling = Sampling(
        samples_per_prompt=7,  # Neither this nor the temperature is used.
        max_new_tokens=3,
        temperature=9.0,
        stop_tokens=(tokenizer.eos_token_id,),
        pad_token=tokenizer.pad_token_id,
    )
    return make_accuracy(
        ChainModel(len(tokenizer)),
        tokenizer,
        [np.array(tokenizer.encode(prompt), np.int32) for prompt in prompts],
        [Example("?", answer, 1) for answer in answers],
        sampling,
        judge,
        prompt_length=2,
        batch_size=batch_size,
    )


def test_accuracy_by_hand(tokenizer):
    """a -> b -> c -> end; d goes on for ever."""
    a, b, c, d = (tokenizer.convert_tokens_to_ids(x) for x in "abcd")
    chain = {a: b, b: c, c: tokenizer.eos_token_id, d: d}
    params = successor(tokenizer, chain)
    prompts = ["a", "ab", "da", "c", "d"]
    # "d" produces "ddd", but is cut off and never stops: it is not right.
    answers = ["bc", "c", "b", "", "ddd"]
    expected = [1.0, 1.0, 0.0, 1.0, 0.0]
    for batch_size in (2, 5, 8):
        accuracy = accuracy_of(tokenizer, prompts, answers, batch_size)
        got = accuracy(params)
        assert got.dtype == np.float32
        np.testing.assert_array_equal(got, expected, err_msg=f"batches of {batch_size}")
    lost = successor(tokenizer, chain | {a: a})
    np.testing.assert_array_equal(accuracy(lost), [0.0, 1.0, 0.0, 1.0, 0.0])


def test_scores_are_the_judges_and_silence_is_nan(tokenizer):
    a, b, d = (tokenizer.convert_tokens_to_ids(x) for x in "abd")
    stop = tokenizer.eos_token_id
    params = successor(tokenizer, {a: stop, b: stop, d: d, stop: stop})
    asked = []

    def judge(examples, completions):
        asked.extend(zip(examples, completions, strict=True))
        status = ["failed" if e.answer == "?" else "judged" for e in examples]
        return [Judgement(0.25, "because", each) for each in status]

    scores = accuracy_of(tokenizer, ["a", "d", "b"], ["x", "y", "?"], 2, judge)(params)
    np.testing.assert_array_equal(scores, np.float32([0.25, 0.0, np.nan]))
    # The one that was cut off is not asked about.
    assert [(e.answer, text) for e, text in asked] == [("x", ""), ("?", "")]


@pytest.mark.parametrize(
    ("prompts", "answers", "message"),
    [
        (["a", "b"], ["b"], "2 prompts and 1 examples"),
        (["a"], ["b", "c"], "1 prompts and 2 examples"),
        ([], [], "0 prompts"),
    ],
)
def test_prompts_without_their_answers_are_refused(
    tokenizer, prompts, answers, message
):
    with pytest.raises(ValueError, match=message):
        accuracy_of(tokenizer, prompts, answers, batch_size=2)


def divergence_of(seed, count=400, temperature=1.0, batch_size=512):
    sampling = Sampling(
        samples_per_prompt=3,
        max_new_tokens=2,
        temperature=temperature,
        stop_tokens=(),
        pad_token=0,
    )
    model = ChainModel(6)
    ids = [np.array([1 + i % 2], np.int32) for i in range(count)]
    return make_divergence(
        model,
        model,
        ids,
        sampling,
        prompt_length=1,
        batch_size=batch_size,
        seed=seed,
    )


@pytest.mark.parametrize("batch_size", [512, 150])
def test_divergence_is_the_mean_reverse_kl_of_the_contexts_visited(batch_size):
    params, teacher = chain_params(0, 6), chain_params(1, 6)
    log_p, log_q = (
        np.asarray(jax.nn.log_softmax(x["table"] @ x["head"].T / 0.8))
        for x in (params, teacher)
    )
    kl = (np.exp(log_p) * (log_p - log_q)).sum(axis=1)
    first = np.array([0, 0.5, 0.5, 0, 0, 0])
    expected = (first @ kl + first @ np.exp(log_p) @ kl) / 2
    divergence = divergence_of(0, temperature=0.8, batch_size=batch_size)
    got = float(divergence(params, teacher))
    assert got == pytest.approx(expected, rel=0.1)  # Of 400 draws of the second token.
    assert abs(expected) > 0.1
    assert float(divergence(params, teacher)) == got
    assert float(divergence(params, params)) == pytest.approx(0, abs=1e-6)
    assert float(divergence_of(1, temperature=0.8)(params, teacher)) != got


def test_rows_that_fill_up_a_batch_do_not_count():
    params, teacher = chain_params(0, 6), chain_params(1, 6)
    # One token a row: what is left of the draws is where the prompt stands, so 3 rows
    # in batches of 2 must give what 3 rows in one batch give.
    sampling = Sampling(3, 1, 0.8, (), 0)
    model, ids = ChainModel(6), [np.array([1 + i % 2], np.int32) for i in range(3)]
    got = [
        make_divergence(
            model, model, ids, sampling, prompt_length=1, batch_size=rows, seed=0
        )(params, teacher)
        for rows in (2, 3)
    ]
    assert got[0] == pytest.approx(got[1], rel=1e-6)


class SeeingModel(ChainModel):
    """Takes images and does not look at them."""

    def with_images(self, images):
        return self

    def later_offsets(self, images):
        return jnp.zeros(len(images), jnp.int32)


def test_batches_with_images_are_read_one_by_one(tokenizer, monkeypatch):
    """Or the device would hold the images of many; the results are those without."""
    done, read = [], jax.device_get
    monkeypatch.setattr(jax, "device_get", lambda x: (done.append("read"), read(x))[1])

    def images_of(rows):
        done.append("images")
        return np.zeros((len(rows), 4), np.float32)

    model = SeeingModel(len(tokenizer))
    ids = [np.array([1 + i % 2], np.int32) for i in range(6)]
    examples = [Example("?", "", 1) for _ in ids]
    sampling = Sampling(1, 2, 0.8, (tokenizer.eos_token_id,), tokenizer.pad_token_id)
    params, teacher = (chain_params(i, len(tokenizer)) for i in range(2))
    found = []
    for images in (None, images_of):
        place = {"prompt_length": 1, "batch_size": 2, "images_of": images}
        accuracy = make_accuracy(
            model, tokenizer, ids, examples, sampling, JUDGE, **place
        )
        divergence = make_divergence(model, model, ids, sampling, seed=0, **place)
        done.clear()
        found.append(accuracy(params).tolist())
        if images:
            assert done[:6] == ["images", "read"] * 3
        done.clear()
        found.append(divergence(params, teacher))
        if images:
            assert done[:6] == ["images", "read"] * 3
    assert found[:2] == found[2:]
