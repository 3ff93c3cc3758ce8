"""check_model finds what differs, and says what it could not check."""

import dataclasses
import importlib.util
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from experiments import check_model
from experiments.check_model import FAILED_STATUS
from experiments.common.check_rows import ragged_rows, rows_with_images
from experiments.common.world import TINY_WORLD
from experiments.peers import transformers_logits
from geomjax.models.load import Loaded, load

GOLDEN = Path(__file__).parents[1] / "models" / "golden"
MOE, MINICPM = GOLDEN / "qwen3_moe", GOLDEN / "minicpm"
VL = GOLDEN.parent / "golden_vl"


@pytest.fixture(scope="module")
def moe():
    return load(MOE)


@pytest.fixture
def given(monkeypatch):
    """Sets the flags of a run, which other experiments may name too."""

    def give(**values):
        values = {"checkpoint": str(MOE), "tokens": 8, "seed": 0, "json": ""} | values
        named = SimpleNamespace(FLAGS=SimpleNamespace(**values))
        monkeypatch.setattr(check_model, "flags", named)

    return give


def test_rows_are_padded_on_either_side():
    rows = ragged_rows(24, 8, seed=0)
    np.testing.assert_array_equal(rows.segment_ids.sum(axis=1), [8, 6, 6])
    np.testing.assert_array_equal(rows.positions[1], [0, 0, 0, 1, 2, 3, 4, 5])
    assert rows.tokens.max() < 24


def test_rows_without_some_ids_hold_none_of_them():
    rows = ragged_rows(4, 64, seed=0, without=(0, 2))
    assert set(np.unique(rows.tokens)) == {1, 3}


def test_rows_with_images_hold_a_placeholder_for_each_token():
    config = load(VL).model.config
    rows = rows_with_images(config, config.text.vocab_size, seed=0)
    placeholders = (rows.tokens == config.image_token) & (rows.segment_ids != 0)
    np.testing.assert_array_equal(placeholders.sum(axis=1), [2 * 3 + 1, 3 * 2, 0])
    assert [len(row) for row in rows.images] == [2, 1, 0]
    assert not (rows.tokens == config.video_token).any()
    np.testing.assert_array_equal(rows.segment_ids[0], 1)
    assert rows.segment_ids[1, 0] == rows.segment_ids[2, -1] == 0


def test_divergence_worked_by_hand():
    logits, other = np.log([[0.5, 0.5]]), np.log([[0.25, 0.75]])
    expected = 0.5 * np.log(2) + 0.5 * np.log(2 / 3)
    np.testing.assert_allclose(check_model.divergence(logits, other), [expected])
    np.testing.assert_allclose(check_model.divergence(logits, logits + 3), [0])


@pytest.mark.parametrize(
    "directory", [*sorted(GOLDEN.iterdir()), VL], ids=lambda path: path.name
)
def test_a_checkpoint_of_every_family_passes(directory):
    """Against transformers where PyTorch is there; the cache and the bits anyway."""
    found = check_model.check_model(directory, 8, 0)
    checks = {check.name: check.passed for check in found}
    kinds = [", text", ", images"] if directory == VL else [""]
    compared = importlib.util.find_spec("torch") and directory != MINICPM
    for kind in kinds:
        assert checks.pop(f"logits against transformers{kind}") is (
            True if compared else None
        )
        assert checks.pop(f"KL of a position{kind}", True) is True
        assert checks.pop(f"cached decoding{kind}") is True
    assert checks.pop("round trip") is True
    assert checks.pop("tokenizer") is None
    assert checks == {"architecture": True, "parameters": True}


def test_images_that_are_read_wrongly_fail():
    """A tower whose rotary base is another one computes another function."""
    loaded = load(VL)
    rows = check_model.rows_for(loaded, 8, 0)[", images"]
    full = check_model.full_logits(loaded, rows)
    vision = dataclasses.replace(loaded.model.vision.config, rope_theta=2.0)
    tower = dataclasses.replace(loaded.model.vision, config=vision)
    wrong = Loaded(dataclasses.replace(loaded.model, vision=tower), loaded.params)
    assert check_model.check_cache(loaded, rows, full).passed is True
    assert check_model.check_cache(wrong, rows, full).passed is False


@pytest.mark.parity
def test_a_sound_checkpoint_passes(given, tmp_path, capsys):
    pytest.importorskip("torch", reason="needs PyTorch: the parity extra")
    record = tmp_path / "record.json"
    given(json=str(record))
    check_model.main()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["architecture", "passed", "Qwen3MoeForCausalLM"]
    checks = {
        entry["name"]: entry for entry in json.loads(record.read_text())["checks"]
    }
    assert checks["logits against transformers"]["passed"] is True
    assert checks["KL of a position"]["passed"] is True
    assert checks["tokenizer"]["passed"] is None


@pytest.mark.parity
def test_another_function_of_the_same_weights_fails(moe, given, monkeypatch, capsys):
    pytest.importorskip("torch", reason="needs PyTorch: the parity extra")
    config = dataclasses.replace(moe.model.config, rope_theta=90.0)
    wrong = dataclasses.replace(moe.model, config=config)
    monkeypatch.setattr(check_model, "load", lambda _: Loaded(wrong, moe.params))
    given()
    with pytest.raises(SystemExit) as status:
        check_model.main()
    assert status.value.code == FAILED_STATUS
    verdicts = {
        line[:27].strip(): line for line in capsys.readouterr().out.splitlines()
    }
    assert "FAILED" in verdicts["logits against transformers"]
    assert "FAILED" in verdicts["KL of a position"]
    assert "passed" in verdicts["cached decoding"]


def test_changed_weights_fail_the_round_trip(moe):
    params = jax.tree.map(lambda leaf: leaf, moe.params)
    experts = params["layers"]["mlp"]["experts"]["up_proj"]
    experts["weight"] = experts["weight"].at[1, 3, 0, 0].add(1e-3)
    check = check_model.check_round_trip(MOE, Loaded(moe.model, params))
    assert check.passed is False
    assert check.found == (
        "1 tensors changed, model.layers.1.mlp.experts.3.up_proj.weight among them"
    )
    assert check_model.check_round_trip(MOE, moe).passed is True


def test_a_cache_that_differs_fails(moe):
    rows = ragged_rows(29, 6, seed=1)
    full = check_model.full_logits(moe, rows)
    assert check_model.check_cache(moe, rows, full).passed is True
    assert check_model.difference("cached", full + 1e-2, full).passed is False


@pytest.mark.parametrize("checkpoint", [MINICPM, MOE])
def test_what_cannot_be_compared_is_skipped_with_its_reason(checkpoint, monkeypatch):
    if checkpoint == MOE:
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
        reason = "needs PyTorch"
    elif importlib.util.find_spec("torch") is None:
        pytest.skip("needs PyTorch: the parity extra")
    else:
        reason = "no class of this architecture"
    (check,) = check_model.compare_with_transformers(checkpoint, None, None)
    assert check.passed is None
    assert reason in check.found
    with pytest.raises(ValueError, match=reason):
        transformers_logits.transformers_logits(checkpoint, None)


def test_a_tokenizer_larger_than_the_embedding_fails(tmp_path):
    anchor = shutil.copytree(TINY_WORLD / "anchor", tmp_path / "anchor")
    loaded = load(anchor)
    assert check_model.check_tokenizer(anchor, loaded).passed is True
    small = dataclasses.replace(loaded.model, vocab_size=9)
    check = check_model.check_tokenizer(anchor, Loaded(small, loaded.params))
    assert check.passed is False
    assert check.found.endswith("ids, 9 rows")


def test_a_checkpoint_is_needed(given):
    given(checkpoint=None)
    with pytest.raises(ValueError, match="--checkpoint is not given"):
        check_model.main()
