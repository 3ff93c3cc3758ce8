"""Which tokens a token sees."""

import dataclasses

import jax
from jaxtyping import Array, Bool, Int

from geomjax.models.config import DecoderConfig


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Visible:
    """Which keys each query sees; what a kernel reads of it is the kernel's choice.

    Attributes:
      mask: True where a query sees a key.
      segment_ids: Of the keys, 0 for padding, where a real query sees exactly the keys
        of its own segment in its own and earlier slots, the queries being the last T of
        the S slots; None where the mask alone says what is seen.
      window: With `segment_ids`, how many slots back, itself among them, a query sees;
        None for all.
    """

    mask: Bool[Array, "B 1 T S"]
    segment_ids: Int[Array, "B S"] | None = None
    window: int | None = dataclasses.field(default=None, metadata={"static": True})

    def last(self, count: int) -> "Visible":
        """What the last `count` queries see."""
        return dataclasses.replace(self, mask=self.mask[:, :, -count:])


def attention_mask(
    query_positions: Int[Array, "B T"],
    query_segments: Int[Array, "B T"],
    key_positions: Int[Array, "B S"],
    key_segments: Int[Array, "B S"],
    window: int | None = None,
) -> Bool[Array, "B 1 T S"]:
    """True where a query sees a key: earlier or same position of its own segment.

    With a window, only those less than `window` positions away.
    """
    distance = query_positions[:, :, None] - key_positions[:, None, :]
    near = distance >= 0
    if window is not None:
        near &= distance < window
    same = key_segments[:, None, :] == query_segments[:, :, None]
    return (near & same & (key_segments != 0)[:, None, :])[:, None]


def visible_by_layer(
    config: DecoderConfig,
    positions: Int[Array, "B T"],
    segment_ids: Int[Array, "B T"],
    cached: tuple[Int[Array, "B S"], Int[Array, "B S"]] | None = None,
) -> tuple[Visible, ...]:
    """What each layer sees, as `attention_mask`; layers that see the same share it.

    Args:
      config: Says which layers have windows.
      positions: Place of each query in its own sequence, in order within a segment.
      segment_ids: Its segment.
      cached: Positions and segments of the keys, where they are not the queries' own.

    Returns:
      One for each layer.
    """
    keys = (positions, segment_ids) if cached is None else cached
    sliding = [i in config.sliding_layers for i in range(config.num_layers)]
    seen = {}
    for slides in sorted(set(sliding)):
        window = config.sliding_window if slides else None
        mask = attention_mask(positions, segment_ids, *keys, window)
        whole = cached is None
        seen[slides] = Visible(mask, segment_ids, window) if whole else Visible(mask)
    return tuple(seen[slides] for slides in sliding)
