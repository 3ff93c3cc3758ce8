"""Rewards by token equality."""

import jax.numpy as jnp
import numpy as np
import pytest

from geomjax.rewards.tokens import pad_answers, token_match

ANSWERS = [np.array([4, 7, 9], np.int32), np.array([5, 9], np.int32)]


def test_answers_are_padded_after_their_stop_token():
    np.testing.assert_array_equal(
        pad_answers(ANSWERS, 4, 0), [[4, 7, 9, 0], [5, 9, 0, 0]]
    )


def test_only_the_whole_answer_is_rewarded():
    answers = jnp.asarray(pad_answers([ANSWERS[0]] * 5, 4, 0))
    completions = jnp.array(
        [
            [4, 7, 9, 0],
            [4, 7, 9, 1],  # Going on after the stop token is not possible; not right.
            [4, 9, 0, 0],  # Stopped early.
            [4, 7, 7, 9],  # Too long.
            [4, 7, 0, 0],  # Cut off.
        ]
    )
    np.testing.assert_array_equal(token_match(completions, answers), [1, 0, 0, 0, 0])


def test_an_answer_that_could_never_be_given_is_refused():
    with pytest.raises(ValueError, match="an answer has 3 tokens"):
        pad_answers(ANSWERS, 2, 0)
