"""A character-level tokenizer, for small models over a small alphabet."""

from collections import Counter

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast


def character_tokenizer(
    alphabet: str,
    *,
    pad: str,
    eos: str,
    bos: str | None = None,
    unk: str = "<unk>",
) -> PreTrainedTokenizerFast:
    """Builds a tokenizer with one id per character.

    The ids are `pad`, `eos`, `bos` (if any), `unk`, then the characters of `alphabet`
    in their order. Decoding joins the characters with nothing in between. `bos` is
    only defined, not added when text is encoded. A character outside the alphabet
    becomes `unk`; without one it would vanish, or stop the encoder with a bare error.

    `save_pretrained` writes a directory that `transformers.AutoTokenizer` loads.

    Args:
        alphabet: the characters, each once.
        pad: the padding token.
        eos: the token that ends a completion.
        bos: the token that begins a sequence, or None for none.
        unk: the token that stands for every other character.

    Returns:
        A fast tokenizer with `len(alphabet)` ids plus those of the special tokens.

    Raises:
        ValueError: if the alphabet is empty or repeats a character, or if the special
            tokens are not distinct strings of at least two characters.

    Examples:
        >>> tokenizer = character_tokenizer("01+=", pad="<pad>", eos="<eos>")
        >>> tokenizer.encode("1+1=")
        [4, 5, 4, 6]
        >>> tokenizer.decode([4, 5, 4, 6])
        '1+1='
    """
    repeated = [character for character, n in Counter(alphabet).items() if n > 1]
    if not alphabet or repeated:
        raise ValueError(
            f"alphabet: got {alphabet!r} ({repeated} repeated), expected at least one "
            "character, and each of them once"
        )
    specials = [token for token in (pad, eos, bos, unk) if token is not None]
    if len(set(specials)) < len(specials) or min(map(len, specials)) < 2:
        raise ValueError(
            f"special tokens: got {specials}, expected distinct strings of two or more "
            "characters, so that none is taken for a character of the alphabet"
        )
    vocabulary = {token: i for i, token in enumerate([*specials, *alphabet])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token=unk))
    # Not ".", which leaves line breaks out.
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=pad,
        eos_token=eos,
        bos_token=bos,
        unk_token=unk,
        clean_up_tokenization_spaces=False,
    )
