"""Drawn shapes: what is on an image, and what is asked of it."""

import io

import numpy as np
import pytest
from PIL import Image

from geomjax.data import shapes

CELLS = ("rs", "gd", "bx", "rt")


@pytest.mark.parametrize(
    ("question", "answer"),
    [("1=", "rsgd"), ("2=", "bxrt"), ("a=", "rsbx"), ("b=", "gdrt")],
)
def test_answers_are_read_off_the_cells(question, answer):
    assert question in shapes.QUESTIONS
    assert shapes.answer(CELLS, question) == answer


def test_every_cell_shows_its_colour_and_its_shape():
    drawn = shapes.draw(np.random.default_rng(0))
    assert drawn.pixels.shape == (16, 16, 3)
    for place, (colour, shape) in enumerate(drawn.cells):
        top, left = np.array(divmod(place, shapes.SIDE)) * shapes.CELL
        cell = drawn.pixels[top : top + shapes.CELL, left : left + shapes.CELL]
        far = np.abs(cell.astype(int) - np.array(shapes.COLOURS[colour]))
        # Within the spread of its colour are as many pixels as the shape has.
        painted = (far.max(axis=-1) < 80).sum()
        expected = sum(row.count("#") for row in shapes.SHAPES[shape])
        assert painted == pytest.approx(expected, abs=2)


def test_images_come_from_the_generator_and_survive_as_png():
    first, again = (shapes.draw(np.random.default_rng(3)) for _ in range(2))
    assert first.cells == again.cells
    other = shapes.draw(np.random.default_rng(4))
    assert (first.pixels != other.pixels).any()
    with Image.open(io.BytesIO(shapes.png(first.pixels))) as image:
        np.testing.assert_array_equal(np.asarray(image), again.pixels)


def test_the_alphabet_has_every_character_once():
    assert len(set(shapes.ALPHABET)) == len(shapes.ALPHABET)
    drawn = (shapes.draw(np.random.default_rng(seed)).cells for seed in range(20))
    letters = {*"".join(shapes.QUESTIONS), *"".join(map("".join, drawn))}
    assert letters == set(shapes.ALPHABET)
