import numpy as np
import pytest
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from geomjax.data.characters import character_tokenizer
from geomjax.data.encode import encode_prompts
from geomjax.data.prompts import Example, Message

TEMPLATE = (
    "{{ bos_token }}"
    "{% for m in messages %}{{ m.role[0] }}:{{ m.content }};{% endfor %}"
    "{% if add_generation_prompt %}a:{% endif %}"
)
CHAT = (Message("system", "0"), Message("user", "1+1"))


def plain():
    return character_tokenizer("01+=aus:;", pad="<pad>", bos="<bos>", eos="<eos>")


def with_bos_and_eos():
    """A tokenizer whose post-processor adds both to a text."""
    backend = plain().backend_tokenizer
    backend.post_processor = TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", 2), ("<eos>", 1)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
    )
    tokenizer.chat_template = TEMPLATE
    assert tokenizer.encode("1") == [2, 5, 1]
    return tokenizer


def texts(encoded, tokenizer):
    return [tokenizer.decode(ids) for ids in encoded.token_ids]


def test_text_is_encoded_as_it_is():
    tokenizer = plain()
    examples = [Example("1+0=", "1", 1), Example("1=", "1", 2)]
    encoded = encode_prompts(examples, tokenizer, 4)
    assert encoded.examples == examples
    assert encoded.dropped == 0
    assert texts(encoded, tokenizer) == ["1+0=", "1="]
    np.testing.assert_array_equal(encoded.token_ids[0], [5, 6, 4, 7])
    assert encoded.token_ids[0].dtype == np.int32


def test_bos_is_added_once_and_eos_never():
    tokenizer = with_bos_and_eos()
    examples = [Example("1+1", None, 1), Example("<bos>1+1", None, 2)]
    encoded = encode_prompts(examples, tokenizer, 4)
    assert texts(encoded, tokenizer) == ["<bos>1+1", "<bos>1+1"]


def test_conversation_ends_where_the_reply_begins():
    tokenizer = with_bos_and_eos()
    encoded = encode_prompts([Example(CHAT, None, 1)], tokenizer, 20)
    assert texts(encoded, tokenizer) == ["<bos>s:0;u:1+1;a:"]


def test_nothing_is_added_to_what_the_template_renders():
    tokenizer = with_bos_and_eos()
    tokenizer.chat_template = TEMPLATE.replace("{{ bos_token }}", "")
    encoded = encode_prompts([Example(CHAT, None, 1)], tokenizer, 20)
    assert texts(encoded, tokenizer) == ["s:0;u:1+1;a:"]


@pytest.mark.parametrize(
    ("reply", "opened"),
    [("<think>", True), ("<think>\n", True), ("<think>\n\n</think>\n", False)],
)
@pytest.mark.parametrize("special", [True, False])
def test_whether_a_prompt_opens_a_thought(reply, opened, special):
    letters = sorted({*"01+=aus:;\n", *("" if special else "</think>")})
    tokenizer = character_tokenizer(
        "".join(letters), pad="<pad>", bos="<bos>", eos="<eos>"
    )
    if special:
        tokenizer.add_tokens(["<think>", "</think>"])
    tokenizer.chat_template = TEMPLATE.replace("a:{%", f"a:{reply}{{%")
    examples = [Example(CHAT, None, 1), Example("1<think>", None, 2)]
    encoded = encode_prompts(examples, tokenizer, 40)
    assert [each.thinking for each in encoded.examples] == [opened, True]
    tokenizer.chat_template = TEMPLATE
    plainly = encode_prompts([Example(CHAT, None, 1)], tokenizer, 40)
    assert plainly.examples == [Example(CHAT, None, 1)]


def test_conversation_without_a_template():
    examples = [Example("1", None, 1), Example(CHAT, None, 2), Example(CHAT, None, 5)]
    with pytest.raises(ValueError, match="line 2: .*no chat template") as error:
        encode_prompts(examples, plain(), 20)
    assert "line 5:" in str(error.value)


def test_conversation_that_the_template_refuses():
    tokenizer = plain()
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(ValueError, match="line 3: roles must alternate"):
        encode_prompts([Example(CHAT, None, 3)], tokenizer, 20)


def test_overlong_prompts_are_errors_with_lengths():
    examples = [Example("1" * n, None, n) for n in (4, 5, 9)]
    with pytest.raises(ValueError, match="line 5: 5 tokens, expected at most 4") as e:
        encode_prompts(examples, plain(), 4)
    assert "line 9: 9 tokens" in str(e.value)
    assert "line 4:" not in str(e.value)


def test_overlong_prompts_are_dropped_and_counted_if_asked():
    examples = [Example("1" * n, None, n) for n in (5, 4, 9, 1)]
    encoded = encode_prompts(examples, plain(), 4, overlong="drop")
    assert encoded.dropped == 2
    assert [example.line for example in encoded.examples] == [4, 1]
    assert [len(ids) for ids in encoded.token_ids] == [4, 1]


def test_dropping_all_prompts_is_an_error():
    with pytest.raises(ValueError, match="all 1 are longer than 2 tokens"):
        encode_prompts([Example("111", None, 1)], plain(), 2, overlong="drop")


def test_nothing_is_truncated_though_the_tokenizer_file_asks_for_it(tmp_path):
    tokenizer = plain()
    tokenizer.backend_tokenizer.enable_truncation(2)
    tokenizer.backend_tokenizer.enable_padding(length=8)
    tokenizer.save_pretrained(tmp_path)
    loaded = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    encoded = encode_prompts([Example("1+0=", None, 1)], loaded, 8)
    assert texts(encoded, loaded) == ["1+0="]


def test_unknown_characters_are_named():
    examples = [Example("1+1", None, 1), Example("1*1", None, 2)]
    with pytest.raises(ValueError, match=r"line 2: the tokenizer does not know '\*'"):
        encode_prompts(examples, plain(), 4)


def test_prompt_without_tokens():
    with pytest.raises(ValueError, match="line 7: encodes to no token"):
        encode_prompts([Example("", None, 7)], plain(), 4)
