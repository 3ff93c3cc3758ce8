"""Prompts joined with their responses."""

import numpy as np
import pytest

from geomjax.data.supervised import pad_responses


def ids(*values):
    return np.array(values, np.int32)


def test_every_response_starts_in_one_column():
    got = pad_responses(
        [ids(5, 6, 7), ids(8)],
        [ids(1, 2), ids(3)],
        prompt_length=4,
        response_length=3,
        pad_id=9,
    )
    np.testing.assert_array_equal(
        got.tokens, [[9, 5, 6, 7, 1, 2, 9], [9, 9, 9, 8, 3, 9, 9]]
    )
    np.testing.assert_array_equal(
        got.positions, [[0, 0, 1, 2, 3, 4, 0], [0, 0, 0, 0, 1, 0, 0]]
    )
    np.testing.assert_array_equal(
        got.segment_ids, [[0, 1, 1, 1, 1, 1, 0], [0, 0, 0, 1, 1, 0, 0]]
    )
    np.testing.assert_array_equal(
        got.completion, np.array([[0, 0, 0, 0, 1, 1, 0], [0, 0, 0, 0, 1, 0, 0]], bool)
    )


def test_an_empty_response_has_no_target():
    got = pad_responses([ids(5)], [ids()], prompt_length=1, response_length=2, pad_id=0)
    assert not got.completion.any()
    np.testing.assert_array_equal(got.segment_ids, [[1, 0, 0]])


@pytest.mark.parametrize(
    ("prompts", "responses", "message"),
    [
        ([ids(1)], [ids(1), ids(2)], "1 prompts and 2 responses"),
        ([ids(1), ids(1)], [ids(1), ids(1, 2, 3)], "response 1 has 3 .* at most 2"),
        ([ids(1, 2, 3)], [ids(1)], "prompt 0 has 3 tokens"),
    ],
)
def test_what_does_not_fit_is_refused(prompts, responses, message):
    with pytest.raises(ValueError, match=message):
        pad_responses(prompts, responses, prompt_length=2, response_length=2, pad_id=0)
