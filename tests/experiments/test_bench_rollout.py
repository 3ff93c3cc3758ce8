import dataclasses
import importlib.util

import jax
import numpy as np
import pytest

from experiments import bench_rollout
from experiments.common import benchmarks
from experiments.common.benchmarks import Size
from geomjax.models.load import load

MICRO = Size(32, 48, 1, 2, 1, batch=2, prompt_tokens=3, new_tokens=2, turns=2, calls=1)


@pytest.fixture
def small_square(monkeypatch):
    monkeypatch.setattr(benchmarks, "SQUARE", 64)


def test_operations_of_a_rollout_worked_by_hand():
    # One row, one layer, widths of one head: D 32, F 2, N = K = 1, H 32, V 17.
    size = Size(
        32, 2, 1, 1, 1, batch=1, prompt_tokens=2, new_tokens=2, turns=1, calls=1
    )
    # Three tokens pass; of the last two, in the only block, more than keys and values.
    keys_and_values, others = 2 * 32 * 32, 2 * 32 * 32 + 3 * 32 * 2
    products = 2 * (3 * keys_and_values + 2 * others)
    attention, head = 4 * 32 * (2 + 3), 2 * 2 * 32 * 17
    assert benchmarks.rollout_operations(size) == products + attention + head
    whole = 2 * 3 * (keys_and_values + others) + 4 * 32 * (1 + 2 + 3)
    two_layers = size._replace(num_layers=2)
    assert benchmarks.rollout_operations(two_layers) == (
        whole + products + attention + head
    )


def test_operations_of_a_step_hold_the_rollout_and_four_forward_passes():
    size = MICRO._replace(batch=1)
    forward = benchmarks.forward_operations(size.config(), rows=1, tokens=4, scored=2)
    rollout = benchmarks.rollout_operations(size)
    assert benchmarks.step_operations(size) == rollout + 4 * forward
    assert benchmarks.step_operations(MICRO) == 2 * (rollout + 4 * forward)


def test_contestants_take_turns_and_first_calls_do_not_count():
    order = []

    def contestant(name, seconds):
        values = iter(seconds)

        def call():
            order.append(name)
            return next(values)

        return call

    runs = {
        "a": contestant("a", [9.0, 1.0, 2.0, 9.0, 3.0, 4.0]),
        "b": contestant("b", [9.0, 5.0, 5.0, 9.0, 5.0, 5.0]),
    }
    medians = benchmarks.interleaved(runs, turns=2, calls=2)
    assert medians == {"a": 2.5, "b": 5.0}
    assert order == ["a"] * 3 + ["b"] * 3 + ["a"] * 3 + ["b"] * 3


def test_a_rate_is_that_of_the_machine():
    # Anything from a slow emulator to an accelerator; off by a factor of a thousand is
    # a unit or a product that was optimised away.
    assert 1e7 < benchmarks.matmul_rate(64, 64, 64) < 1e14


def test_the_checkpoint_loads_with_its_own_float32_weights(tmp_path):
    benchmarks.write_checkpoint(tmp_path, MICRO, seed=3)
    loaded = load(tmp_path)
    expected = loaded.model.init(jax.random.key(3))
    jax.tree.map(np.testing.assert_array_equal, loaded.params, expected)


def test_prompts_are_one_token_a_character():
    batch = benchmarks.prompt_batch(MICRO)
    texts = benchmarks.prompt_texts(MICRO)
    assert batch.segment_ids.all()
    assert benchmarks.tokenizer().batch_decode(batch.tokens) == texts


@pytest.mark.usefixtures("small_square")
def test_figures_of_a_rollout_agree_with_each_other(capsys):
    figures = bench_rollout.measure(MICRO, peer=False)
    assert set(figures) == {
        "seconds",
        "tokens_per_s",
        "first_call_s",
        "operations",
        "matmul_rate",
        "floor_s",
        "times_floor",
    }
    assert set(figures["seconds"]) == set(figures["tokens_per_s"]) == {"ours"}
    seconds = figures["seconds"]["ours"]
    assert figures["tokens_per_s"]["ours"] == pytest.approx(4 / seconds)
    assert figures["floor_s"] * figures["matmul_rate"]["square"] == pytest.approx(
        figures["operations"]
    )
    assert figures["times_floor"] == pytest.approx(seconds / figures["floor_s"])
    assert figures["first_call_s"] > seconds
    bench_rollout.print_figures("micro", MICRO, figures)
    printed = capsys.readouterr().out
    for part in ("micro: width 32", "geomjax", "floor", "first call", "2 x 32 x 48"):
        assert part in printed
    assert "times faster" not in printed


def test_a_peer_without_pytorch_names_the_extra(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"geomjax\[parity\]"):
        bench_rollout.peer_versions()


@pytest.mark.parity
@pytest.mark.usefixtures("small_square")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_generate_runs_the_same_model(capsys):
    pytest.importorskip("torch")
    figures = bench_rollout.measure(MICRO, peer=True)
    seconds = figures["seconds"]
    assert figures["ratio"] == pytest.approx(seconds["peer"] / seconds["ours"])
    bench_rollout.print_figures("micro", MICRO, figures)
    assert "times faster" in capsys.readouterr().out


@pytest.mark.parity
def test_another_model_is_not_compared(tmp_path):
    pytest.importorskip("torch")
    benchmarks.write_checkpoint(tmp_path, MICRO, seed=0)
    loaded = load(tmp_path)
    other = dataclasses.replace(loaded, params=loaded.model.init(jax.random.key(1)))
    prompts = benchmarks.prompt_batch(MICRO)
    with pytest.raises(ValueError, match="do not run the same model"):
        bench_rollout.transformers_generate(tmp_path, other, prompts, MICRO)
