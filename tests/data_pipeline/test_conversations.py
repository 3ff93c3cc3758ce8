"""Only what the assistant says is a target, each reply up to its stop token."""

import numpy as np
import pytest

from geomjax.data.characters import character_tokenizer
from geomjax.data.conversations import encode_conversations
from geomjax.data.prompts import Example, Message

# As ChatML: a reply ends with the stop token, and a line break follows it.
TEMPLATE = (
    "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}<eos>;{% endfor %}"
    "{% if add_generation_prompt %}a:{% endif %}"
)
# As Qwen3's: of earlier replies, what stands before the bar is dropped.
FORGETS = (
    "{% for m in messages %}{{ m.role[0] }}:"
    "{% if loop.last %}{{ m.content }}{% else %}"
    "{{ m.content.split('|')[-1] }}{% endif %}"
    "<eos>;{% endfor %}{% if add_generation_prompt %}a:{% endif %}"
)
TURNS = (Message("user", "01"), Message("assistant", "0|1"), Message("user", "11"))


@pytest.fixture
def tokenizer():
    made = character_tokenizer("01au:;|", pad="<pad>", eos="<eos>")
    made.chat_template = TEMPLATE
    return made


def encode(examples, tokenizer, limit=99, **settings):
    stop = (tokenizer.eos_token_id,)
    return encode_conversations(
        examples, tokenizer, limit, stop_tokens=stop, **settings
    )


def shown(sequence, tokenizer):
    """The whole text, and that of the targets with _ for the others."""
    tokens = tokenizer.convert_ids_to_tokens(sequence.tokens.tolist())
    targets = [
        t if c else "_" for t, c in zip(tokens, sequence.completion, strict=True)
    ]
    return "".join(tokens), "".join(targets)


def test_plain_text_is_followed_by_its_answer_and_the_end(tokenizer):
    encoded = encode([Example("01", "10", 1)], tokenizer)
    assert shown(encoded.sequences[0], tokenizer) == ("0110<eos>", "__10<eos>")
    assert encoded.sequences[0].tokens.dtype == np.int32


def test_the_last_reply_or_all_are_targets(tokenizer):
    example = Example(TURNS, "00", 1)
    (last,) = encode([example], tokenizer).sequences
    text = "u:01<eos>;a:0|1<eos>;u:11<eos>;a:00<eos>"
    tokens = "u:01;a:0|1;u:11;a:"
    assert shown(last, tokenizer) == (text, "_" * (len(tokens) + 3) + "00<eos>")
    (both,) = encode([example], tokenizer, replies="all").sequences
    expected = "_" * 8 + "0|1<eos>" + "_" * 9 + "00<eos>"
    assert shown(both, tokenizer) == (text, expected)
    np.testing.assert_array_equal(both.tokens, last.tokens)


def test_a_template_that_forgets_thinking_is_found_out(tokenizer):
    tokenizer.chat_template = FORGETS
    example = Example(TURNS, "0|0", 3)
    (last,) = encode([example], tokenizer).sequences
    text, targets = shown(last, tokenizer)
    assert text == "u:01<eos>;a:1<eos>;u:11<eos>;a:0|0<eos>"
    assert targets.strip("_") == "0|0<eos>"
    with pytest.raises(ValueError, match=r"line 3: .*changes the reply of turn 2"):
        encode([example], tokenizer, replies="all")


def test_long_ones_are_dropped_and_counted_or_named(tokenizer):
    examples = [Example("01", "1", 1), Example("01", "1" * 9, 2)]
    encoded = encode(examples, tokenizer, 6, overlong="drop")
    assert encoded.dropped == 1
    assert encoded.examples == examples[:1]
    with pytest.raises(ValueError, match="line 2: 12 tokens, expected at most 6"):
        encode(examples, tokenizer, 6)
    with pytest.raises(ValueError, match="none is left; all 2"):
        encode(examples, tokenizer, 2, overlong="drop")


def test_what_cannot_be_trained_on_is_named(tokenizer):
    with pytest.raises(ValueError, match=r"line 4: has no answer"):
        encode([Example("01", None, 4)], tokenizer)
    tokenizer.chat_template = TEMPLATE.replace("<eos>", "")
    with pytest.raises(ValueError, match="ends a reply without a stop token"):
        encode([Example(TURNS, "1", 1)], tokenizer)
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="the tokenizer has no chat template"):
        encode([Example(TURNS, "1", 1)], tokenizer)
