import json

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from geomjax.data.characters import character_tokenizer
from geomjax.data.tokenizers import load_tokenizer, stop_token_ids, tokenizer_size


@pytest.fixture
def tokenizer():
    return character_tokenizer("0123+=", pad="<pad>", eos="<eos>")


@pytest.fixture
def directory(tmp_path, tokenizer):
    tokenizer.save_pretrained(tmp_path)
    return tmp_path


def edit(path, **fields):
    config = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps(config | fields))


def test_loads_what_was_saved(directory, tokenizer):
    for source in (directory, str(directory)):
        loaded = load_tokenizer(source)
        assert loaded.get_vocab() == tokenizer.get_vocab()


def test_missing_directory(tmp_path):
    with pytest.raises(ValueError, match="nowhere is not a directory"):
        load_tokenizer(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="nowhere is not a directory"):
        load_tokenizer("./nowhere")
    file = tmp_path / "tokenizer.json"
    file.write_text("{}")
    with pytest.raises(ValueError, match="json is not a directory"):
        load_tokenizer(str(file))


def test_unreachable_name():
    with pytest.raises(ValueError, match="or a name on a hub that can be reached"):
        load_tokenizer("nobody/no-such-model")


def test_directory_without_a_tokenizer(tmp_path):
    edit(tmp_path / "config.json", model_type="qwen3")
    with pytest.raises(ValueError, match=r"has no tokenizer\.json"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_truncated_file(directory, name):
    text = (directory / name).read_text()
    (directory / name).write_text(text[: len(text) // 2])
    with pytest.raises(ValueError, match=f"{name}: is not JSON, perhaps truncated"):
        load_tokenizer(directory)


def test_another_kind_of_file(directory):
    (directory / "tokenizer.json").write_text('{"model": {}}')
    with pytest.raises(ValueError, match=r"tokenizer.json: has no \['added_tokens'\]"):
        load_tokenizer(directory)
    (directory / "tokenizer.json").write_text("[]")
    with pytest.raises(ValueError, match="holds a list, expected an object"):
        load_tokenizer(directory)


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
@pytest.mark.parametrize("form", ["dict", "list"])
def test_own_code_is_refused_by_name_and_not_run(directory, name, form):
    witness = directory / "was_run"
    (directory / "own.py").write_text(f"open({str(witness)!r}, 'w').close()\n")
    classes = ["own.OwnTokenizer", None]
    auto_map = {"AutoTokenizer": classes} if form == "dict" else classes
    edit(directory / name, tokenizer_class="OwnTokenizer", auto_map=auto_map)
    with pytest.raises(ValueError, match=rf"{name}: auto_map names .*own\.OwnTok"):
        load_tokenizer(directory)
    assert not witness.exists()


def test_own_code_of_the_model_does_not_concern_the_tokenizer(directory):
    edit(directory / "config.json", model_type="qwen3", auto_map={"AutoModel": "m.M"})
    assert load_tokenizer(directory).eos_token == "<eos>"


def test_own_code_behind_a_hub_name_is_refused(monkeypatch, tokenizer):
    tokenizer.init_kwargs["auto_map"] = {"AutoTokenizer": ["own.OwnTokenizer", None]}

    def from_pretrained(name):
        return tokenizer

    monkeypatch.setattr(PreTrainedTokenizerFast, "from_pretrained", from_pretrained)
    with pytest.raises(ValueError, match=r"somebody/model: auto_map names"):
        load_tokenizer("somebody/model")


@pytest.mark.parametrize(
    "name", ["Qwen2Tokenizer", "LlamaTokenizer", "PhobertTokenizer"]
)
def test_the_ids_are_those_of_tokenizer_json(tmp_path, name):
    """Numbers whole and no normal form, as no Qwen2 tokenizer splits."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<p>", "<e>"],
        show_progress=False,
    )
    backend.train_from_iterator(["1234567 and 1234567 and 1234"] * 9, trainer)
    made = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<p>", eos_token="<e>"
    )
    made.save_pretrained(tmp_path)
    edit(tmp_path / "tokenizer_config.json", tokenizer_class=name)
    edit(tmp_path / "config.json", model_type="qwen2")
    texts = ["1234567 and 12", "cafe\u0301, \u212b"]
    expected = [backend.encode(text).ids for text in texts]
    loaded = load_tokenizer(tmp_path)
    assert [loaded.encode(text) for text in texts] == expected
    assert (loaded.eos_token, loaded.pad_token) == ("<e>", "<p>")
    assert tokenizer_size(loaded) == backend.get_vocab_size()
    if name == "Qwen2Tokenizer":  # Or nothing is shown.
        theirs = AutoTokenizer.from_pretrained(tmp_path)
        assert [theirs.encode(text) for text in texts] != expected


def test_size_is_one_more_than_the_largest_id(tokenizer):
    assert tokenizer_size(tokenizer) == 3 + 6
    backend = Tokenizer(models.WordLevel({"a": 0, "b": 7}, unk_token="a"))
    with_holes = type(tokenizer)(tokenizer_object=backend)
    assert tokenizer_size(with_holes) == 8
    with_holes.add_tokens(["c"])
    assert tokenizer_size(with_holes) == max(with_holes.get_vocab().values()) + 1


@pytest.mark.parametrize(
    ("listed", "expected"),
    [(1, (1,)), (0, (0, 1)), ([4, 0], (0, 1, 4)), (None, (1,)), ([], (1,))],
)
def test_stop_ids_join_tokenizer_and_generation_config(
    directory, tokenizer, listed, expected
):
    assert stop_token_ids(tokenizer) == (1,)
    assert stop_token_ids(tokenizer, directory) == (1,)
    edit(directory / "generation_config.json", eos_token_id=listed)
    assert stop_token_ids(tokenizer, directory) == expected


@pytest.mark.parametrize("listed", [9, -1, "<eos>", [0, 99]])
def test_bad_stop_ids(directory, tokenizer, listed):
    edit(directory / "generation_config.json", eos_token_id=listed)
    with pytest.raises(ValueError, match="eos_token_id holds .*from 0 to 8"):
        stop_token_ids(tokenizer, directory)


def test_no_stop_id(directory, tokenizer):
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="no eos_token"):
        stop_token_ids(tokenizer, directory)
    (directory / "generation_config.json").write_text('{"eos_token_id": [')
    with pytest.raises(ValueError, match=r"generation_config\.json: is not JSON"):
        stop_token_ids(tokenizer, directory)
