"""Reading onto a mesh keeps within its bound of host memory, and an excess is seen."""

import json
import sys
from types import SimpleNamespace

import jax
import pytest

from experiments import bench_loading
from experiments.bench_loading import Figures, measure, sized

pytestmark = pytest.mark.skipif(
    sys.platform != "linux", reason="reads /proc, which only Linux has"
)


@pytest.mark.parametrize("gigabytes", [0.05, 2.0, 8.0])
def test_sizes_are_as_asked(gigabytes):
    config = sized(gigabytes)
    model = bench_loading.make_decoder(config, config.vocab_size)
    found = 2 * sum(leaf.size for leaf in jax.tree.leaves(model.shapes))
    assert found == pytest.approx(gigabytes * 1e9, rel=0.2)


def test_a_checkpoint_is_read_within_the_bound():
    figures = measure(sized(0.3), "fsdp=4,tensor=2", 40 << 20)
    assert figures.devices >= figures.checkpoint > 250e6
    assert figures.bound < figures.checkpoint / 2
    assert figures.within, figures
    # All of it is held at the end, so the peak was seen.
    assert figures.peak > 0.9 * figures.devices


def test_an_excess_ends_with_its_status(monkeypatch, capsys, tmp_path):
    path = tmp_path / "figures.json"
    values = {"gigabytes": 0.05, "mesh": "fsdp=8", "shard_megabytes": 1}
    named = SimpleNamespace(FLAGS=SimpleNamespace(**values, json=str(path)))
    monkeypatch.setattr(bench_loading, "flags", named)
    over = Figures(10**9, 10**9, 3 * 10**9, 2 * 10**9, 10**9)
    monkeypatch.setattr(bench_loading, "measure", lambda *_: over)
    with pytest.raises(SystemExit) as status:
        bench_loading.main()
    assert status.value.code == bench_loading.EXCEEDED_STATUS
    assert "ABOVE THE BOUND" in capsys.readouterr().out
    assert json.loads(path.read_text())["figures"]["extra"] == 2 * 10**9


def test_a_process_that_fails_says_why(tmp_path):
    with pytest.raises(ValueError, match=r"reading failed:(.|\n)*no config.json"):
        bench_loading._in_child(tmp_path, "fsdp=2")
