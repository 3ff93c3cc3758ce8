import io
import json
import struct
import subprocess
import zlib

import pytest
from PIL import EpsImagePlugin, Image

from geomjax.data.adapters import ADAPTERS, load_examples
from geomjax.data.image_processor import open_image
from geomjax.data.images import FORMATS, check_image, image_bytes
from geomjax.data.prompts import read_prompts

FAILED = (OSError, subprocess.CalledProcessError)


def encoded(kind, size=(5, 4)):
    file = io.BytesIO()
    Image.new("RGB", size, (1, 2, 3)).save(file, kind)
    return file.getvalue()


def bomb(width, height):
    """A PNG that claims to be large and holds nothing."""

    def chunk(name, data):
        return (
            struct.pack(">I", len(data))
            + name
            + data
            + struct.pack(">I", zlib.crc32(name + data))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = chunk(b"IDAT", zlib.compress(b""))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + data + chunk(b"IEND", b"")


@pytest.fixture
def ghostscript(monkeypatch, tmp_path):
    """A stand-in for the program; the file that it leaves where it is started."""
    folder, started = tmp_path / "bin", tmp_path / "started"
    folder.mkdir()
    (folder / "gs").write_text(f"#!/bin/sh\n: > '{started}'\nexit 1\n")
    (folder / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)
    return started


@pytest.mark.parametrize("kind", FORMATS)
def test_good_images_give_their_size(kind):
    assert check_image(encoded(kind)) == (5, 4)


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (b"", "of no known format"),
        (b"<svg/>", "of no known format"),
        (encoded("PNG", (300, 300))[:-60], "damaged"),
        (encoded("JPEG", (300, 300))[:400], "damaged"),
        (bomb(100_000, 100_000), "too large"),
        (bomb(13_000, 10_000), "too large|expected at most"),
        (bomb(8_000, 8_000), "expected at most 50000000"),
    ],
)
def test_bad_images_are_refused(data, problem):
    with pytest.raises(ValueError, match=problem):
        check_image(data)


def test_no_image_starts_a_program(tmp_path, ghostscript):
    postscript = encoded("EPS")
    (tmp_path / "a.png").write_bytes(postscript)
    plain = {"prompt": "1", "answer": "1"}
    row = {"prompt": "<image>2", "answer": "2", "images": ["a.png"]}
    path = tmp_path / "prompts.jsonl"
    path.write_text(f"{json.dumps(plain)}\n{json.dumps(row)}\n")
    problem = f"of no known format; expected one of {', '.join(FORMATS)}"
    with pytest.raises(ValueError, match=rf"prompts\.jsonl:\n  line 2: .*{problem}"):
        read_prompts(path)
    named = tmp_path / "named.jsonl"
    row = {"problem": "<image>Find x.", "answer": "2", "images": ["a.png"]}
    named.write_text(json.dumps(row) + "\n")
    with pytest.raises(ValueError, match=rf"named\.jsonl, row 1: .*{problem}"):
        load_examples(ADAPTERS["geo3k"], named)
    with pytest.raises(ValueError, match="expected one of"):
        open_image(postscript)
    assert not ghostscript.exists()
    # Pillow alone would have started it.
    with Image.open(io.BytesIO(postscript)) as image, pytest.raises(FAILED):
        image.load()
    assert ghostscript.exists()


def test_the_limit_can_be_set():
    with pytest.raises(ValueError, match="5 x 4 pixels, expected at most 19 in all"):
        check_image(encoded("PNG"), max_pixels=19)


def test_bytes_come_from_what_datasets_store(tmp_path):
    (tmp_path / "a.png").write_bytes(b"file")
    for value in (
        b"file",
        {"bytes": b"file", "path": "no"},
        "a.png",
        {"path": "a.png"},
    ):
        assert image_bytes(value, tmp_path) == b"file"
    for value in (None, {}, "", {"bytes": b"", "path": ""}, 3):
        with pytest.raises(ValueError, match="there is no image"):
            image_bytes(value, tmp_path)
    with pytest.raises(ValueError, match=r"b\.png is missing"):
        image_bytes("b.png", tmp_path)
    with pytest.raises(ValueError, match="there is no image"):
        image_bytes("a.png")
