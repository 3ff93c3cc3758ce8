"""Matching two checkpoints by name, and reading their pairs."""

import json

import ml_dtypes
import numpy as np
import pytest

from geomjax.checkpoints import (
    CheckpointError,
    DictSource,
    SafetensorsSource,
    iter_pairs,
    match,
    write_safetensors,
)
from geomjax.checkpoints.matching import canonical_name

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def _array(*shape, seed=0, dtype=np.float32):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def _source(*names, shape=(3, 2), **options):
    tensors = {name: _array(*shape, seed=i) for i, name in enumerate(names)}
    return DictSource(tensors, **options)


def _matched(matching):
    return [(m.source_key, m.tuned_key, m.how) for m in matching.matched]


def test_equal_names_match_in_the_order_of_the_source():
    matching = match(_source("b", "a", "c"), _source("c", "b", "a"))
    assert _matched(matching) == [(k, k, "exact") for k in ("b", "a", "c")]
    assert matching.complete
    assert matching.summary() == "3 tensors matched (3 exact)"


def test_missing_and_extra_tensors_are_reported():
    matching = match(_source("a", "only_before"), _source("a", "only_after"))
    assert matching.missing == ("only_before",)
    assert matching.extra == ("only_after",)
    assert not matching.complete
    assert "1 missing from the tuned checkpoint: only_before" in matching.summary()
    assert "1 not in the source: only_after" in matching.summary()


@pytest.mark.parametrize(
    ("name", "canonical"),
    [
        ("model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.up_proj.weight"),
        ("model.language_model.layers.0.w", "model.layers.0.w"),
        ("language_model.model.layers.0.w", "model.layers.0.w"),
        ("model.language_model.model.layers.0.w", "model.layers.0.w"),
        ("language_model.lm_head.weight", "lm_head.weight"),
        ("layers.0.w", "model.layers.0.w"),
        ("norm.weight", "model.norm.weight"),
        ("embed_tokens.weight", "model.embed_tokens.weight"),
        ("model.visual.blocks.0.w", "visual.blocks.0.w"),
        ("module._orig_mod.model.layers.0.w", "model.layers.0.w"),
        ("base_model.model.model.layers.0.w", "model.layers.0.w"),
        ("modules.0.w", "modules.0.w"),
    ],
)
def test_canonical_names(name, canonical):
    assert canonical_name(name) == canonical


def test_prefixes_of_multimodal_wrappers_are_aliases():
    source = _source("model.layers.0.w", "visual.w", HEAD)
    tuned = _source("model.language_model.layers.0.w", "model.visual.w", HEAD)
    matching = match(source, tuned)
    assert _matched(matching) == [
        ("model.layers.0.w", "model.language_model.layers.0.w", "alias"),
        ("visual.w", "model.visual.w", "alias"),
        (HEAD, HEAD, "exact"),
    ]
    assert matching.matched[0].name == "model.layers.0.w"
    assert matching.complete


def test_an_exact_name_wins_over_an_alias():
    matching = match(
        _source("model.layers.0.w"),
        _source("model.layers.0.w", "model.language_model.layers.0.w"),
    )
    assert _matched(matching) == [("model.layers.0.w", "model.layers.0.w", "exact")]
    assert matching.extra == ("model.language_model.layers.0.w",)


def test_competing_aliases_are_ambiguous_and_not_guessed():
    source = _source("model.layers.0.w", "a")
    tuned = _source("module.model.layers.0.w", "language_model.model.layers.0.w", "a")
    matching = match(source, tuned)
    assert [m.name for m in matching.matched] == ["a"]
    assert matching.ambiguous == {
        "model.layers.0.w": {
            "source": ("model.layers.0.w",),
            "tuned": ("module.model.layers.0.w", "language_model.model.layers.0.w"),
        }
    }
    assert not matching.complete


@pytest.mark.parametrize("tied", [True, None])
def test_an_untied_head_is_matched_with_the_embedding_it_was_tied_to(tied):
    source = _source(EMBED, "a", tie_word_embeddings=tied)
    tuned = _source(EMBED, "a", HEAD)
    matching = match(source, tuned)
    assert _matched(matching)[-1] == (EMBED, HEAD, "tied")
    assert matching.matched[-1].name == HEAD
    assert matching.complete
    *_, last = iter_pairs(source, tuned, matching)
    np.testing.assert_array_equal(last.source, source.read(EMBED))
    np.testing.assert_array_equal(last.tuned, tuned.read(HEAD))
    back = match(tuned, source)
    assert (HEAD, EMBED, "tied") in _matched(back)


def test_a_head_that_no_config_ties_is_missing():
    source = _source(EMBED, HEAD)
    tuned = _source(EMBED, tie_word_embeddings=False)
    assert match(source, tuned).missing == (HEAD,)
    assert match(tuned, source).extra == (HEAD,)


def test_a_head_stored_twice_is_not_counted_twice():
    table = _array(3, 2)
    tuned = DictSource({EMBED: table, HEAD: table.copy()})
    matching = match(_source(EMBED), tuned)
    assert _matched(matching) == [(EMBED, EMBED, "exact")]
    assert matching.duplicates == (HEAD,)
    assert matching.extra == ()
    assert "1 a head equal to its embedding" in matching.summary()


def test_tied_heads_stored_on_both_sides_are_not_counted_twice():
    def side(seed, **options):
        table = _array(3, 2, seed=seed)
        return DictSource({EMBED: table, HEAD: table.copy()}, **options)

    tied = {"tie_word_embeddings": True}
    matching = match(side(0, **tied), side(1, **tied))
    assert _matched(matching) == [(EMBED, EMBED, "exact")]
    assert matching.duplicates == (HEAD,)
    assert len(match(side(0, **tied), side(1)).matched) == 2
    apart = _source(EMBED, HEAD, **tied)
    assert len(match(apart, apart).matched) == 2


def test_the_config_beside_a_checkpoint_says_whether_heads_are_tied(tmp_path):
    write_safetensors(tmp_path, {EMBED: _array(3, 2)})
    assert SafetensorsSource(tmp_path).tie_word_embeddings is None
    config = tmp_path / "config.json"
    config.write_text('{"tie_word_embeddings": true}')
    assert SafetensorsSource(tmp_path).tie_word_embeddings is True
    config.write_text('{"text_config": {"tie_word_embeddings": false}}')
    assert SafetensorsSource(tmp_path / "model.safetensors").tie_word_embeddings is (
        False
    )
    config.write_text("{")
    with pytest.raises(CheckpointError, match="config.json"):
        SafetensorsSource(tmp_path)


def test_different_shapes_under_one_name_are_reported_and_left_out():
    source = DictSource({"a": _array(2), "w": _array(3, 2)})
    tuned = DictSource({"a": _array(2), "w": _array(2, 3)})
    matching = match(source, tuned)
    assert [m.name for m in matching.matched] == ["a"]
    assert matching.mismatched == {"w": ((3, 2), (2, 3))}
    assert not matching.complete


def test_common_rows_of_a_resized_vocabulary():
    source = DictSource({EMBED: _array(5, 2), "w": _array(5, 2)})
    tuned = DictSource({EMBED: _array(4, 2, seed=1), "w": _array(4, 2)})
    assert set(match(source, source).mismatched) == set()
    with pytest.raises(CheckpointError, match="no tensor has the same name and shape"):
        match(source, tuned)
    matching = match(source, tuned, common_rows=True)
    assert [(m.name, m.shape, m.rows) for m in matching.matched] == [(EMBED, (4, 2), 4)]
    assert matching.mismatched == {"w": ((5, 2), (4, 2))}
    assert matching.cut == {EMBED: ((5, 2), (4, 2))}
    assert not matching.complete
    assert "compared in their common rows only: " + EMBED in matching.summary()
    (pair,) = iter_pairs(source, tuned, matching)
    np.testing.assert_array_equal(pair.source, source.read(EMBED)[:4])
    np.testing.assert_array_equal(pair.tuned, tuned.read(EMBED))


def test_common_rows_do_not_hide_different_widths():
    source = DictSource({EMBED: _array(5, 2), "a": _array(1)})
    tuned = DictSource({EMBED: _array(4, 3), "a": _array(1)})
    assert set(match(source, tuned, common_rows=True).mismatched) == {EMBED}


def test_unrelated_architectures_are_refused_with_examples():
    with pytest.raises(CheckpointError) as caught:
        match(_source("transformer.h.0.w"), _source("model.layers.0.w"))
    assert "'transformer.h.0.w'" in str(caught.value)
    assert "'model.layers.0.w'" in str(caught.value)


def test_what_a_reader_left_out_is_reported_with_its_side():
    source = DictSource({"a": _array(2), "ids": np.arange(3)})
    matching = match(source, _source("a", shape=(2,)))
    assert list(matching.left_out["source"]) == ["ids"]
    assert "int64" in matching.left_out["source"]["ids"]
    assert matching.left_out["tuned"] == {}
    assert "1 left out of the source: ids" in matching.summary()


def test_json_holds_everything():
    source = DictSource({EMBED: _array(5, 2), "w": _array(5, 2), "i": np.arange(2)})
    tuned = DictSource({EMBED: _array(4, 2), "w": _array(4, 2), "x": _array(1)})
    data = json.loads(json.dumps(match(source, tuned, common_rows=True).to_json()))
    assert data["complete"] is False
    assert data["matched"] == [
        {
            "name": EMBED,
            "source_key": EMBED,
            "tuned_key": EMBED,
            "shape": [4, 2],
            "how": "exact",
            "rows": 4,
        }
    ]
    assert data["mismatched"] == {"w": {"source": [5, 2], "tuned": [4, 2]}}
    assert data["cut"] == {EMBED: {"source": [5, 2], "tuned": [4, 2]}}
    assert data["extra"] == ["x"]
    assert list(data["left_out"]["source"]) == ["i"]


def test_pairs_keep_each_side_s_own_dtype(tmp_path):
    write_safetensors(tmp_path / "a", {"w": _array(2, 2, dtype=ml_dtypes.bfloat16)})
    write_safetensors(tmp_path / "b", {"w": _array(2, 2)})
    source, tuned = SafetensorsSource(tmp_path / "a"), SafetensorsSource(tmp_path / "b")
    (pair,) = iter_pairs(source, tuned, match(source, tuned))
    assert pair.name == "w"
    assert (pair.source.dtype, pair.tuned.dtype) == (ml_dtypes.bfloat16, np.float32)


def test_pairs_are_read_one_ahead_and_released_behind():
    class Recording(DictSource):
        def __init__(self, tensors):
            super().__init__(tensors)
            self.events = []

        def read(self, key):
            self.events.append(("read", key))
            return super().read(key)

        def prefetch(self, key):
            self.events.append(("prefetch", key))

        def release(self, key):
            self.events.append(("release", key))

    tensors = {"a": _array(1), "b": _array(1)}
    source, tuned = Recording(tensors), Recording(tensors)
    list(iter_pairs(source, tuned, match(source, tuned)))
    assert source.events == tuned.events
    assert source.events == [
        ("prefetch", "b"),
        ("read", "a"),
        ("release", "a"),
        ("read", "b"),
        ("release", "b"),
    ]
