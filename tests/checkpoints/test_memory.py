"""Walking through a checkpoint keeps memory flat, however many tensors it has."""

import subprocess
import sys
import textwrap

import numpy as np
import pytest

from geomjax.checkpoints import write_safetensors

MIB = 1 << 20
PROGRAM = """
    import sys
    from pathlib import Path
    from geomjax.checkpoints import iter_pairs, match, open_source

    def resident():
        lines = Path("/proc/self/status").read_text().splitlines()
        table = dict(line.split(":", 1) for line in lines)
        return [int(table[name].split()[0]) for name in ("RssAnon", "RssFile")]

    source, tuned = open_source(sys.argv[1]), open_source(sys.argv[2])
    matching = match(source, tuned)
    before = resident()
    peak = before
    for pair in iter_pairs(source, tuned, matching):
        pair.source.sum(), pair.tuned.sum()
        peak = [max(a, b) for a, b in zip(peak, resident())]
    print(*(a - b for a, b in zip(peak, before)))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_resident_memory_does_not_grow_with_the_number_of_tensors(tmp_path):
    tensor_bytes = 4 * MIB
    for count in (3, 12):
        for side in ("source", "tuned"):
            write_safetensors(
                tmp_path / f"{side}{count}",
                ((f"t{i}", np.full(MIB, i, np.float32)) for i in range(count)),
                max_shard_bytes=3 * tensor_bytes,
            )
    grown = {}
    for count in (3, 12):
        sides = [str(tmp_path / f"{side}{count}") for side in ("source", "tuned")]
        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(PROGRAM), *sides],
            check=True,
            capture_output=True,
            text=True,
        )
        grown[count] = [1024 * int(kib) for kib in done.stdout.split()]
    for anonymous, mapped in grown.values():
        assert anonymous < 2 * MIB
        # One pair, and the pages that the kernel maps around what is touched.
        assert 2 * tensor_bytes <= mapped < 4 * tensor_bytes
