"""Images of prompts: opened safely, and preprocessed as the model expects them.

Preprocessing is that of the checkpoint's own image processor in transformers, the one
that needs Pillow and NumPy alone: resizing to multiples of a token's pixels between two
limits, normalising, cutting into patches.
"""

import io
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import transformers
from jaxtyping import UInt8
from PIL import Image, ImageOps, UnidentifiedImageError

from geomjax.data.images import FORMATS
from geomjax.data.patches import ImagePatches

MAX_SOURCE_PIXELS = 50_000_000
"""Largest image that is decoded, in pixels: 200 MB while it is composed with white."""

MAX_ASPECT_RATIO = 200
"""Longest side over shortest that the processor of Qwen2.5-VL takes."""


class ImageProcessor:
    """The image processor of a checkpoint, on Pillow and NumPy.

    Args:
      source: A checkpoint folder with preprocessor_config.json, or its name on the hub.
      min_pixels: Smaller images are enlarged to about this size; by default the
        checkpoint's limit.
      max_pixels: Larger ones are reduced to it; by default the checkpoint's limit,
        which for Qwen2.5-VL is 12.8 million pixels, 16,384 tokens an image.

    Attributes:
      merge_size: Side, in patches, of the square that becomes one token.

    Raises:
      ValueError: There is no such file, or the limits are not in order.
    """

    def __init__(
        self,
        source: str | Path,
        *,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
    ):
        try:
            self._processor = _processor_class().from_pretrained(source)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"image processor: {source} cannot be loaded; expected a checkpoint of "
                "a vision-language model with a preprocessor_config.json, or a name on "
                f"a hub that can be reached. transformers says: {error}"
            ) from error
        size = self._processor.size
        low = size["shortest_edge"] if min_pixels is None else min_pixels
        high = size["longest_edge"] if max_pixels is None else max_pixels
        token = (self._processor.patch_size * self._processor.merge_size) ** 2
        if not token <= low <= high:
            raise ValueError(
                f"image processor: min_pixels={low}, max_pixels={high}; expected "
                f"{token} (one token) or more, and the first not above the second"
            )
        # Both names are the library's: the limits are areas, not edges.
        self._size = {"shortest_edge": low, "longest_edge": high}
        self.merge_size: int = self._processor.merge_size

    def __call__(self, image: UInt8[np.ndarray, "height width 3"]) -> ImagePatches:
        """Resizes, normalises and cuts one image as `open_image` returns it."""
        out = self._processor(
            images=[image],
            size=self._size,
            input_data_format="channels_last",
            return_tensors="np",
        )
        time, height, width = out["image_grid_thw"][0].tolist()
        return ImagePatches(out["pixel_values"], (time, height, width))


def _processor_class() -> Any:
    """The class that needs neither torch nor torchvision, under either of its names."""
    if hasattr(transformers, "Qwen2VLImageProcessorPil"):
        return transformers.Qwen2VLImageProcessorPil
    return transformers.Qwen2VLImageProcessor  # In early releases of 5.


def open_image(
    source: Path | bytes | Image.Image,
    *,
    name: str | None = None,
    max_pixels: int = MAX_SOURCE_PIXELS,
) -> UInt8[np.ndarray, "height width 3"]:
    """Decodes an image to RGB, after looking at its size.

    The size is read from the file's header, so that a file of a few bytes that would
    decode to gigabytes is refused before it is decoded. Transparency is composed with
    white: figures are often black on nothing. An orientation stored by a camera is
    applied; of an animation, the first frame is taken.

    Args:
      source: A path, the bytes of a file, or an image that is open already.
      name: What to call it in messages; by default its path.
      max_pixels: Most pixels, width times height.

    Returns:
      The pixels.

    Raises:
      ValueError: The image cannot be read or is no image, is of another format than
        `FORMATS`, or is too large or too long for its width.
    """
    if name is None:
        name = str(source) if isinstance(source, Path) else "image"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            if isinstance(source, Image.Image):
                return _decode(source, name, max_pixels)
            with _file(source) as file:
                return _decode(Image.open(file, formats=FORMATS), name, max_pixels)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ValueError(
            f"{name}: {error}; expected at most {max_pixels} pixels, reduce it first"
        ) from error
    except UnidentifiedImageError as error:
        raise ValueError(f"{name}: is no image; expected one of {FORMATS}") from error
    except (OSError, SyntaxError, EOFError) as error:
        raise ValueError(f"{name}: cannot be read, is it truncated? {error}") from error


def _file(source: Path | bytes) -> io.BytesIO | io.BufferedReader:
    return io.BytesIO(source) if isinstance(source, bytes) else source.open("rb")


def _decode(
    image: Image.Image, name: str, max_pixels: int
) -> UInt8[np.ndarray, "height width 3"]:
    _check_size(image.size, name, max_pixels)
    image = ImageOps.exif_transpose(image)
    # Versions of transformers differ in what becomes of transparency, so it ends here.
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image)
    return np.asarray(image.convert("RGB"))


def _check_size(size: tuple[int, int], name: str, max_pixels: int) -> None:
    width, height = size
    if min(size) < 1 or width * height > max_pixels:
        raise ValueError(
            f"{name}: is {width} x {height} pixels; expected 1 to {max_pixels} in all, "
            "reduce it first"
        )
    if max(size) > MAX_ASPECT_RATIO * min(size):
        raise ValueError(
            f"{name}: is {width} x {height} pixels; expected a longer side of at most "
            f"{MAX_ASPECT_RATIO} times the shorter"
        )
