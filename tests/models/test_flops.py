"""Operations counted from a configuration: by hand, and against published sizes."""

import pytest
from tiny_decoder import variant

from geomjax.models.config import DecoderConfig, ExpertSizes, LatentSizes
from geomjax.models.decoder import Decoder
from geomjax.models.flops import forward_flops, token_weights

SIZES = dict(
    vocab_size=11,
    hidden_size=8,
    intermediate_size=10,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=6,
)
DENSE = variant(**SIZES)
ATTENTION = 8 * 24 + 2 * 8 * 12 + 24 * 8  # q; k and v; o.
MLP = 3 * 8 * 10


def _decoder(config, vocab_size=11):
    return Decoder(config, vocab_size=vocab_size)


@pytest.mark.parametrize("tied", [True, False])
def test_a_dense_token_meets_every_matrix_once(tied):
    config = variant(**SIZES, tie_word_embeddings=tied)
    expected = 3 * (ATTENTION + MLP) + 11 * 8
    assert token_weights(_decoder(config)) == expected
    # Rows of the head that are not in use cost nothing.
    assert token_weights(_decoder(config, 9)) == expected - 2 * 8


def test_a_token_meets_its_own_experts_alone():
    experts = ExpertSizes(count=5, per_token=2, size=7, normalise_weights=True)
    config = variant(**SIZES, architecture="Qwen3MoeForCausalLM", experts=experts)
    each = ATTENTION + 8 * 5 + 2 * 3 * 8 * 7  # With the router.
    assert token_weights(_decoder(config)) == 3 * each + 11 * 8


def test_attention_is_counted_over_the_pairs_that_see_each_other():
    weights = token_weights(_decoder(DENSE))
    pairs = 3 * (1 + 2 + 3 + 4 + 5)
    expected = 2 * weights * 5 + 2 * pairs * 4 * (6 + 6)
    assert forward_flops(_decoder(DENSE), 5.0) == expected
    windows = variant(**SIZES, sliding_window=2, sliding_layers=(0, 2))
    pairs = (1 + 2 + 3 + 4 + 5) + 2 * (1 + 2 + 2 + 2 + 2)
    expected = 2 * weights * 5 + 2 * pairs * 4 * (6 + 6)
    assert forward_flops(_decoder(windows), 5.0) == expected
    assert forward_flops(_decoder(windows), 2.0) == forward_flops(_decoder(DENSE), 2.0)


def test_latent_attention_has_values_of_their_own_size():
    config = variant(
        **SIZES | {"num_kv_heads": 4, "head_dim": 9},
        architecture="MiniCPM3ForCausalLM",
        qk_norm=False,
        latent=LatentSizes(
            query_rank=7, kv_rank=5, plain_dim=5, rotary_dim=4, value_dim=6
        ),
    )
    projections = 8 * 7 + 7 * 36 + 8 * (5 + 4) + 5 * 4 * (5 + 6) + 4 * 6 * 8
    weights = 3 * (projections + MLP) + 11 * 8
    assert token_weights(_decoder(config)) == weights
    expected = 2 * weights * 2 + 2 * 3 * 3 * 4 * (9 + 6)
    assert forward_flops(_decoder(config), 2.0) == expected


def test_qwen3_1_7b_has_the_parameters_that_its_card_names():
    config = DecoderConfig(
        architecture="Qwen3ForCausalLM",
        vocab_size=151936,
        hidden_size=2048,
        intermediate_size=6144,
        num_layers=28,
        num_heads=16,
        num_kv_heads=8,
        head_dim=128,
        rms_norm_eps=1e-6,
        rope_theta=1e6,
        tie_word_embeddings=True,
        max_position_embeddings=40960,
    )
    head = 151936 * 2048
    # The card: 1.7B parameters, 1.4B without the embedding.
    assert (token_weights(_decoder(config, 151936)) - head) / 1e9 == pytest.approx(
        1.4, abs=0.05
    )
