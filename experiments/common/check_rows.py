"""Ragged rows of random tokens, with images or without, to compare models on."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from geomjax.data.patches import ImagePatches, num_image_tokens
from geomjax.models.qwen2_5_vl_config import Qwen25VLConfig


class Rows(NamedTuple):
    """Sequences padded to a common length, `[B, T]` each.

    Attributes:
      tokens: Token ids, random in padding too.
      positions: Place of each token in its own sequence.
      segment_ids: 1, and 0 for padding.
      images: Of each row; None where the rows are text.
      last_image_slot: The last slot in which a row has a token of an image.
    """

    tokens: np.ndarray
    positions: np.ndarray
    segment_ids: np.ndarray
    images: list[list[ImagePatches]] | None = None
    last_image_slot: int = -1

    @property
    def prompts(self) -> list[np.ndarray]:
        """The rows without their padding."""
        pairs = zip(self.tokens, self.segment_ids, strict=True)
        return [tokens[segments != 0] for tokens, segments in pairs]


def ragged_rows(
    vocab_size: int, length: int, seed: int, without: Sequence[int] = ()
) -> Rows:
    """One full row, one padded on the left, one on the right.

    Args:
      vocab_size: Ids are below it.
      length: Of the rows; at least 4.
      seed: Of the draws.
      without: Ids that are not drawn, such as placeholders of images.

    Returns:
      Three rows.
    """
    tokens = _draw(np.random.default_rng(seed), vocab_size, (3, length), without)
    segment_ids = np.ones((3, length), np.int32)
    segment_ids[1, : length // 4] = 0
    segment_ids[2, length - length // 4 :] = 0
    return Rows(tokens, _places(segment_ids), segment_ids)


def rows_with_images(config: Qwen25VLConfig, vocab_size: int, seed: int) -> Rows:
    """Three rows with two images, one and none, all of different sizes.

    Text stands before, between and after the images, whose values are random. The
    second row is padded on the left, the third on the right.

    Args:
      config: Of the model that will read them.
      vocab_size: Ids of text are below it.
      seed: Of the draws.

    Returns:
      The rows, each image's placeholder repeated for each of its tokens.
    """
    generator = np.random.default_rng(seed)
    side = config.vision.merge_size
    cells = [[(2, 3), (1, 1)], [(3, 2)], []]
    without = (config.image_token, config.video_token)
    rows: list[list[int]] = []
    images: list[list[ImagePatches]] = []
    for sizes in cells:
        row = _draw(generator, vocab_size, 3, without).tolist()
        images.append([])
        for height, width in sizes:
            grid = (1, height * side, width * side)
            shape = (grid[1] * grid[2], config.vision.patch_values)
            values = generator.standard_normal(shape).astype(np.float32)
            images[-1].append(ImagePatches(values, grid))
            row += [config.image_token] * num_image_tokens(grid, side)
            row += _draw(generator, vocab_size, 2, without).tolist()
        rows.append(row + _draw(generator, vocab_size, 6, without).tolist())
    length = max(map(len, rows))
    tokens = _draw(generator, vocab_size, (3, length), without)
    segment_ids = np.zeros((3, length), np.int32)
    for b, row in enumerate(rows):
        start = length - len(row) if b == 1 else 0
        tokens[b, start : start + len(row)] = row
        segment_ids[b, start : start + len(row)] = 1
    slots = np.flatnonzero((tokens == config.image_token).any(axis=0))
    return Rows(tokens, _places(segment_ids), segment_ids, images, int(slots[-1]))


def _draw(generator, vocab_size, shape, without):
    allowed = np.setdiff1d(np.arange(vocab_size, dtype=np.int32), without)
    return generator.choice(allowed, shape)


def _places(segment_ids):
    return np.maximum(np.cumsum(segment_ids, axis=1) - 1, 0).astype(np.int32)
