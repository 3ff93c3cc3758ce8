"""Images of a dataset: their bytes, checked before anything is computed on them."""

import io
from pathlib import Path
from typing import Any

FORMATS = ("BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP")
"""What is decoded. Others, such as EPS, would be handed to programs outside Pillow."""

MAX_PIXELS = 50_000_000


def image_bytes(value: Any, folder: Path | None = None) -> bytes:
    """The bytes of an image as datasets store it.

    Args:
        value: bytes, a path, or an object with `bytes` and `path` of which one is set.
        folder: what relative paths start from; without one, paths are refused.

    Raises:
        ValueError: if there is no image, or its path leads out of the folder.
    """
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes) and value:
        return value
    if isinstance(value, str) and value and folder is not None:
        path = folder / value
        if not path.resolve().is_relative_to(folder.resolve()):
            raise ValueError(f"the image {value} lies outside the file's folder")
        if not path.is_file():
            raise ValueError(f"the image {path} is missing")
        return path.read_bytes()
    raise ValueError(f"there is no image, but {type(value).__name__} {value!r:.80}")


def check_image(data: bytes, *, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """Decodes an image once, so that a bad one is known before training.

    Args:
        data: the bytes of an image file.
        max_pixels: more are refused before they are decoded: a file of a few kB can
            claim to hold gigabytes.

    Returns:
        Width and height, in pixels.

    Raises:
        ValueError: if the image is too large, damaged, cut off or of another format
            than `FORMATS`.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            width, height = image.size
            if width * height > max_pixels:
                raise ValueError(
                    f"the image has {width} x {height} pixels, expected at most "
                    f"{max_pixels} in all; scale it down"
                )
            image.load()
    except UnidentifiedImageError as error:
        raise ValueError(
            f"the image ({len(data)} bytes, beginning {data[:8]!r}) is of no known "
            f"format; expected one of {', '.join(FORMATS)}"
        ) from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ValueError(f"the image is too large: {error}") from error
    except (OSError, SyntaxError, EOFError) as error:  # As Pillow's decoders raise.
        raise ValueError(f"the image is damaged: {error}") from error
    return width, height
