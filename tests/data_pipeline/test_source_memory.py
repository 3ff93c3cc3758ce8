"""A data set is read without being held: peak memory against the file's size."""

import json
import subprocess
import sys
import textwrap

import pytest

pytest.importorskip("pyarrow", reason="needs the data extra")

WRITE = textwrap.dedent(
    """
    import io, json, sys
    import numpy as np, pyarrow as pa, pyarrow.parquet as pq
    from PIL import Image

    path, count = sys.argv[1], 700
    pixels = np.random.default_rng(0).integers(0, 256, (180, 180, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    row = {"problem": "<image>Find x.", "answer": "1"}
    if path.endswith(".jsonl"):  # A column that nobody asked for.
        with open(path, "w") as out:
            for i in range(count):
                out.write(json.dumps(row | {"images": [], "solution": "x" * 100_000}))
                out.write("\\n")
    else:
        images = [{"bytes": file.getvalue(), "path": None}]
        table = pa.Table.from_pylist([row | {"images": images}] * count)
        if path.endswith(".parquet"):
            plain = {"use_dictionary": False, "compression": "none"}
            # Groups as `datasets` writes them for images.
            pq.write_table(table, path, row_group_size=100, **plain)
        else:
            with pa.ipc.new_stream(path, table.schema) as writer:
                writer.write_table(table, max_chunksize=50)
    """
)
READ = textwrap.dedent(
    """
    import json, os, re, sys, threading, time
    import pyarrow.parquet
    from PIL import Image
    from geomjax.data.adapters import ADAPTERS, load_examples

    Image.init()

    def anonymous():  # Pages of a mapped file are the kernel's to drop.
        with open("/proc/self/status") as status:
            return int(re.search(r"RssAnon:\\s+(\\d+)", status.read())[1]) * 1024

    start = peak = anonymous()
    reading = True

    def watch():
        global peak
        while reading:
            peak = max(peak, anonymous())
            time.sleep(0.001)

    thread = threading.Thread(target=watch)
    thread.start()
    examples = load_examples(ADAPTERS["geo3k"], sys.argv[1])
    reading = False
    thread.join()
    held = [len(image.read()) for each in examples for image in each.images]
    print(json.dumps([len(examples), sum(held), peak - start]))
    """
)


def run(code, path):
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet", "a.arrow"])
def test_memory_does_not_grow_with_the_file(tmp_path, name):
    path = tmp_path / name
    run(WRITE, path)
    size = path.stat().st_size
    assert size > 60e6
    count, held, grown = json.loads(run(READ, path))
    assert count == 700
    assert held == 0 if name == "a.jsonl" else held > 60e6
    # What is held at a time: 16 rows of 0.1 MB, thrice at most, and their buffers.
    assert grown < size / 2, (grown, size)
