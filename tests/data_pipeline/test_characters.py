import json

import pytest
from transformers import AutoTokenizer

from geomjax.data.characters import character_tokenizer

ALPHABET = "0123456789+-="


def test_ids_are_specials_then_alphabet():
    tokenizer = character_tokenizer(ALPHABET, pad="<pad>", bos="<bos>", eos="<eos>")
    assert tokenizer.get_vocab() == {
        token: i
        for i, token in enumerate(["<pad>", "<eos>", "<bos>", "<unk>", *ALPHABET])
    }
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (0, 1)
    assert (tokenizer.bos_token_id, tokenizer.unk_token_id) == (2, 3)


@pytest.mark.parametrize("text", ["7+3-8+2=", "0", "=" * 40, ""])
def test_decode_gives_the_text_back(text):
    tokenizer = character_tokenizer(ALPHABET, pad="<pad>", eos="<eos>")
    ids = tokenizer.encode(text)
    assert len(ids) == len(text)
    assert tokenizer.decode(ids) == text


def test_every_character_is_a_token():
    alphabet = "a \n\té漢\U0001d7d9'.,?s"
    tokenizer = character_tokenizer(alphabet, pad="<pad>", eos="<eos>")
    text = " a.\n\n漢\té\U0001d7d9 'a . , ? 's  "
    ids = tokenizer.encode(text)
    assert len(ids) == len(text)
    assert tokenizer.unk_token_id not in ids
    assert tokenizer.decode(ids) == text


def test_unknown_character_is_marked():
    tokenizer = character_tokenizer(ALPHABET, pad="<pad>", eos="<eos>")
    assert tokenizer.decode(tokenizer.encode("1*2")) == "1<unk>2"


@pytest.mark.parametrize("with_model_config", [False, True])
def test_auto_tokenizer_loads_an_equal_one(tmp_path, with_model_config):
    tokenizer = character_tokenizer(ALPHABET, pad="<pad>", bos="<bos>", eos="<eos>")
    tokenizer.save_pretrained(tmp_path)
    if with_model_config:  # Beside a model, its type must not choose the tokenizer.
        config = {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"]}
        (tmp_path / "config.json").write_text(json.dumps(config))
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()
    assert loaded.special_tokens_map == tokenizer.special_tokens_map
    assert loaded.encode("7+3=<eos>") == tokenizer.encode("7+3=<eos>")
    assert loaded.decode(loaded.encode("7+3=")) == "7+3="


@pytest.mark.parametrize(
    ("alphabet", "pad", "eos", "said"),
    [
        ("", "<pad>", "<eos>", "alphabet"),
        ("0120", "<pad>", "<eos>", "'0'"),
        ("012", "<eos>", "<eos>", "special tokens"),
        ("012", "<pad>", "0", "special tokens"),
        ("012", "<pad>", "", "special tokens"),
    ],
)
def test_bad_alphabets_and_specials(alphabet, pad, eos, said):
    with pytest.raises(ValueError, match=said):
        character_tokenizer(alphabet, pad=pad, eos=eos)
