"""Drawn shapes: a verifiable task for small models that see, learnt in minutes.

An image is a grid of 2 x 2 cells, each with a shape in a colour, at a random place in
its cell, on a grey ground with noise. A question asks to read a row or a column, colour
and shape of each cell:

    <image>2=     the second row: `rsgd`
    <image>b=     the second column, from the top
"""

import io
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from geomjax.data.placeholders import IMAGE_MARK

COLOURS = {"r": (220, 50, 50), "g": (40, 180, 70), "b": (60, 80, 230)}
SHAPES = {
    "s": ("######", "######", "######", "######", "######", "######"),
    "d": ("..##..", ".####.", "######", "######", ".####.", "..##.."),
    "x": ("##..##", "######", "..##..", "..##..", "######", "##..##"),
    "t": ("..##..", "..##..", ".####.", ".####.", "######", "######"),
}
"""Letter -> pixels: square, disc, cross, triangle."""

SIDE = 2
"""Cells in a row."""

CELL = 8
"""Pixels along a cell."""

ROWS, COLUMNS = "12", "ab"
QUESTIONS = tuple(f"{name}=" for name in ROWS + COLUMNS)
"""What can be asked of an image."""

ALPHABET = "".join(dict.fromkeys("".join((*QUESTIONS, *COLOURS, *SHAPES))))
"""Every character of questions and answers."""

LONGEST_ANSWER = 2 * SIDE
"""Characters of an answer."""


class Drawn(NamedTuple):
    """An image and what is on it.

    Attributes:
      pixels: `[24, 24, 3]`.
      cells: Colour and shape of each cell, row by row.
    """

    pixels: UInt8[np.ndarray, "height width 3"]
    cells: tuple[str, ...]


def draw(generator: np.random.Generator) -> Drawn:
    """A random image."""
    size = SIDE * CELL
    ground = generator.uniform(0, 80)
    canvas = ground + generator.normal(0, 12, (size, size, 3))
    cells = []
    for place in range(SIDE**2):
        colour = str(generator.choice(list(COLOURS)))
        shape = str(generator.choice(list(SHAPES)))
        cells.append(colour + shape)
        mask = np.array([[c == "#" for c in row] for row in SHAPES[shape]])
        corner = np.array(divmod(place, SIDE)) * CELL
        top, left = corner + generator.integers(0, CELL - len(mask) + 1, 2)
        area = canvas[top : top + len(mask), left : left + len(mask)]
        area[mask] = np.array(COLOURS[colour]) + generator.normal(0, 20, 3)
    return Drawn(np.clip(canvas, 0, 255).astype(np.uint8), tuple(cells))


def answer(cells: tuple[str, ...], question: str) -> str:
    """The right answer to one of `QUESTIONS`.

    >>> answer(("rs", "gd", "bx", "rt"), "1=")
    'rsgd'
    >>> answer(("rs", "gd", "bx", "rt"), "a=")
    'rsbx'
    """
    asked = question[0]
    if asked in ROWS:
        first = SIDE * ROWS.index(asked)
        return "".join(cells[first : first + SIDE])
    return "".join(cells[COLUMNS.index(asked) :: SIDE])


def prompt(question: str) -> str:
    """A question with the mark of its image."""
    return IMAGE_MARK + question


def png(pixels: UInt8[np.ndarray, "height width 3"]) -> bytes:
    """The image as a PNG file."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()
