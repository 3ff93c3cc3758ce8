"""Checkpoint folders as transformers writes them, with a tokenizer of their own."""

from pathlib import Path
from typing import Any

import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

TEXT = [
    "A ship sails at nine and arrives at four; how long does the voyage take?",
    "Seven birds sit on a wire, and two of them fly away: how many remain?",
    "The train covers sixty miles an hour, and the road is ninety miles long.",
]
TEMPLATE = (
    "{% for message in messages %}<s>{{ message.role }}\n{{ message.content }}<e>\n"
    "{% endfor %}{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)
PADDED = 16
"""Rows of the embeddings beyond the tokenizer's size."""


def bpe_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE with a chat template, as Qwen's but smaller."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<p>", "<s>", "<e>"],
        show_progress=False,
    )
    backend.train_from_iterator(TEXT, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<p>", eos_token="<e>"
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def save_model(
    folder: Path, tokenizer: PreTrainedTokenizerFast, family: str, **fields: Any
) -> None:
    """One random layer of a family, in bfloat16, and the tokenizer beside it."""
    import torch

    torch.manual_seed(fields["hidden_size"])
    config = getattr(transformers, f"{family}Config")(
        vocab_size=len(tokenizer) + PADDED,
        num_hidden_layers=1,
        num_key_value_heads=1,
        max_position_embeddings=128,
        initializer_range=0.2,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **fields,
    )
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
