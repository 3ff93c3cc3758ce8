import pytest
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast, Qwen2Tokenizer

from geomjax.data.same_tokenizer import require_same_tokenizer
from geomjax.data.tokenizers import load_tokenizer

VOCABULARY = ["a", "b", "c", "ab", "bc", "<eos>"]
MERGES = [("a", "b"), ("b", "c")]


def build(
    vocabulary=VOCABULARY, merges=MERGES, added=(), bos=False, nfc=True, **settings
):
    model = models.BPE({t: i for i, t in enumerate(vocabulary)}, merges, **settings)
    backend = Tokenizer(model)
    backend.normalizer = normalizers.NFC() if nfc else None
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.add_tokens(list(added))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")
    if bos:
        backend.post_processor = TemplateProcessing(
            single="<eos> $A", special_tokens=[("<eos>", 5)]
        )
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
        tokenizer.eos_token = "<eos>"
    return tokenizer


def test_equal_tokenizers_pass():
    require_same_tokenizer(build(), build())


def test_saved_and_loaded_passes(tmp_path):
    build().save_pretrained(tmp_path)
    require_same_tokenizer(build(), PreTrainedTokenizerFast.from_pretrained(tmp_path))


def test_a_class_of_its_own_and_the_general_one_pass(tmp_path):
    # An exported student may come back as either, whatever the teacher's files say.
    vocabulary = {token: i for i, token in enumerate(VOCABULARY)}
    qwen = Qwen2Tokenizer(vocab=vocabulary, merges=MERGES)
    qwen.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "qwen3"}')
    general = load_tokenizer(tmp_path)
    assert type(general) is not type(qwen)
    require_same_tokenizer(qwen, general)


def test_roles_and_chat_templates_may_differ():
    base, chat = (build(added=[AddedToken("<end>", special=True)]) for _ in range(2))
    base.pad_token = "<eos>"
    chat.pad_token = "<end>"
    chat.eos_token = "<end>"
    chat.chat_template = "{{ messages[0].content }}"
    require_same_tokenizer(base, chat)


@pytest.mark.parametrize(
    ("teacher", "said"),
    [
        ({"vocabulary": [*VOCABULARY, "x"]}, r"vocabulary: 1 only in the teacher's.*x"),
        (
            {"vocabulary": ["b", "a", "c", "ab", "bc", "<eos>"]},
            r"vocabulary: 2 differ, such as 'a' \(0 and 1\), 'b'",
        ),
        (
            {"merges": MERGES[::-1]},
            r"merges: 2 and 2 entries, the first difference at 0: \['a', 'b'\]",
        ),
        ({"merges": MERGES[:1]}, "merges: 2 and 1 entries, the first difference at 1"),
        ({"added": ["<think>"]}, "added tokens: 1 only in the teacher's.*<think>"),
        ({"nfc": False}, "normalizer: .*NFC.* and null"),
        ({"unk_token": "a"}, r"model settings: 1 differ.*unk_token"),
        ({"bos": True}, r"tokens added to a text: 0 and 1 entries"),
    ],
)
def test_what_differs_is_named(teacher, said):
    with pytest.raises(ValueError, match=said):
        require_same_tokenizer(build(), build(**teacher))


def test_flags_of_added_tokens_are_compared():
    ours = build(added=[AddedToken("<x>", special=False, lstrip=False)])
    theirs = build(added=[AddedToken("<x>", special=False, lstrip=True)])
    with pytest.raises(ValueError, match="added tokens: 1 differ, such as '<x>'"):
        require_same_tokenizer(ours, theirs)


def test_pre_tokenizers_are_compared():
    theirs = build()
    theirs.backend_tokenizer.pre_tokenizer = pre_tokenizers.Digits()
    with pytest.raises(ValueError, match="pre-tokenizer: "):
        require_same_tokenizer(build(), theirs)


def test_all_differences_are_named_at_once():
    with pytest.raises(ValueError, match="different tokenizers") as error:
        require_same_tokenizer(build(), build(merges=MERGES[:1], nfc=False))
    assert "merges:" in str(error.value)
    assert "normalizer:" in str(error.value)
    assert "vocabulary:" not in str(error.value)
