"""One configuration for every decoder."""

import dataclasses
from collections.abc import Mapping
from typing import Protocol, runtime_checkable

from geomjax.models.rope import RopeScaling


@runtime_checkable
class ModelConfig(Protocol):
    """What loading, export and role tables need to know of a configuration."""

    @property
    def architecture(self) -> str:
        """Name of the Hugging Face class."""

    @property
    def text(self) -> "DecoderConfig":
        """The configuration of the decoder: this one, or a part of it."""

    @property
    def stack_sizes(self) -> Mapping[str, int]:
        """How many there are of each field of a rule's pattern, such as `layer`."""


@dataclasses.dataclass(frozen=True)
class ExpertSizes:
    """A feed-forward layer of several experts, of which each token takes a few.

    Attributes:
      count: Number E of experts.
      per_token: How many of them a token takes.
      size: Width F of one expert.
      normalise_weights: Whether the weights of the experts taken are divided by their
        sum.
    """

    count: int
    per_token: int
    size: int
    normalise_weights: bool

    def __post_init__(self) -> None:
        if min(self.count, self.per_token, self.size) < 1:
            raise ValueError(f"{self} has a size below 1")
        if self.per_token > self.count:
            raise ValueError(
                f"a token takes {self.per_token} experts, but there are {self.count}"
            )


@dataclasses.dataclass(frozen=True)
class LatentSizes:
    """Attention whose queries, keys and values pass through narrow latents.

    Attributes:
      query_rank: Width of the queries' latent; None for one full projection.
      kv_rank: Width of the latent that keys and values share.
      plain_dim: Part of each query and key head that is not rotated.
      rotary_dim: Part that is rotated; one rotated key serves all heads.
      value_dim: Size of a value head.
    """

    query_rank: int | None
    kv_rank: int
    plain_dim: int
    rotary_dim: int
    value_dim: int

    def __post_init__(self) -> None:
        sizes = (self.kv_rank, self.plain_dim, self.rotary_dim, self.value_dim)
        if min(sizes) < 1 or (self.query_rank is not None and self.query_rank < 1):
            raise ValueError(f"{self} has a size below 1")


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Shape and constants of a decoder.

    The fields that have a default say what sets a family apart; the defaults are those
    of dense Qwen3 models.

    Attributes:
      architecture: Name of the Hugging Face class, such as `Qwen3ForCausalLM`.
      vocab_size: Rows of the embedding as stored, padding rows included.
      hidden_size: Width D of the residual stream.
      intermediate_size: Width F of a dense feed-forward layer.
      num_layers: Number L of blocks.
      num_heads: Number N of query heads.
      num_kv_heads: Number K of key and value heads; divides `num_heads`.
      head_dim: Size H of a query or key head, apart from `hidden_size // num_heads`.
      rms_norm_eps: Added to the mean square in every norm.
      rope_theta: Base of the rotary frequencies.
      tie_word_embeddings: Whether the embedding is also the output head.
      max_position_embeddings: Longest context in tokens.
      rope_scaling: How the rotary frequencies are stretched; None for not at all.
      qk_norm: Whether each query and key head has an RMS norm.
      qkv_bias: Whether the query, key and value projections have biases.
      out_bias: Whether the projection out of attention has one.
      mlp_bias: Whether the projections of the feed-forward layer have them.
      sliding_window: How many tokens, itself among them, a token sees in the layers of
        `sliding_layers`; None where all layers see everything.
      sliding_layers: Indices of the layers with a window, in order.
      experts: The experts of the feed-forward layers; None for dense ones.
      latent: The sizes of latent attention; None for grouped-query attention.
      embedding_scale: Multiplies the embedding of each token.
      residual_scale: Multiplies what each attention and feed-forward layer adds.
      logit_divisor: Divides the hidden state before the output head.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    tie_word_embeddings: bool
    max_position_embeddings: int
    rope_scaling: RopeScaling | None = None
    qk_norm: bool = True
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    sliding_window: int | None = None
    sliding_layers: tuple[int, ...] = ()
    experts: ExpertSizes | None = None
    latent: LatentSizes | None = None
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    logit_divisor: float = 1.0

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type is int and value < 1:
                raise ValueError(f"{field.name} is {value}; it must be at least 1")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads ({self.num_heads}) is not a multiple of "
                f"num_kv_heads ({self.num_kv_heads})"
            )
        if self.rotary_dim % 2:
            raise ValueError(f"head_dim is {self.rotary_dim}; rotary heads are even")
        if self.latent is not None:
            self._check_latent(self.latent)
        self._check_windows()

    def _check_latent(self, latent: LatentSizes) -> None:
        if self.head_dim != latent.plain_dim + latent.rotary_dim:
            raise ValueError(
                f"head_dim is {self.head_dim}, but the heads of latent attention have "
                f"{latent.plain_dim} + {latent.rotary_dim} coordinates"
            )
        if latent.value_dim > self.head_dim:
            raise ValueError(
                f"value_dim is {latent.value_dim}; latent attention is computed with "
                f"values no larger than keys, which have {self.head_dim} coordinates"
            )
        if self.num_kv_heads != self.num_heads:
            raise ValueError(
                f"num_kv_heads is {self.num_kv_heads}; latent attention makes a key "
                f"for each of the {self.num_heads} query heads"
            )

    def _check_windows(self) -> None:
        if (self.sliding_window is None) != (not self.sliding_layers):
            raise ValueError(
                f"sliding_window is {self.sliding_window} and sliding_layers is "
                f"{self.sliding_layers}; give both or neither"
            )
        if self.sliding_window is not None and self.sliding_window < 1:
            raise ValueError(f"sliding_window is {self.sliding_window}, not 1 or more")
        if not set(self.sliding_layers) <= set(range(self.num_layers)):
            raise ValueError(
                f"sliding_layers {self.sliding_layers} are not all among the "
                f"{self.num_layers} layers"
            )

    @property
    def text(self) -> "DecoderConfig":
        """Itself; see `ModelConfig`."""
        return self

    @property
    def stack_sizes(self) -> Mapping[str, int]:
        """Numbers of layers and of experts."""
        experts = 0 if self.experts is None else self.experts.count
        return {"layer": self.num_layers, "expert": experts}

    @property
    def rotary_dim(self) -> int:
        """How many coordinates of each head are rotated."""
        return self.head_dim if self.latent is None else self.latent.rotary_dim

    @property
    def untied_head(self) -> bool:
        """Whether the output head is a parameter of its own."""
        return not self.tie_word_embeddings

    @property
    def full_query(self) -> bool:
        """Whether queries come from one projection."""
        return self.latent is None or self.latent.query_rank is None

    @property
    def latent_query(self) -> bool:
        """Whether queries pass through a latent."""
        return not self.full_query
