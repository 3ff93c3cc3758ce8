"""The splash kernel against the written-out attention, and who gets which attention."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_decoder import on_device, ragged, random_params, variant

from geomjax.meshes import RULES, Placement, mesh_from_string
from geomjax.models import choose_attention as chooser
from geomjax.models.attention import dot_product_attention
from geomjax.models.choose_attention import choose_attention
from geomjax.models.decoder import Decoder
from geomjax.models.masks import Visible, visible_by_layer
from geomjax.models.splash import splash_attention

HIGHEST = jax.lax.Precision.HIGHEST
interpreted = partial(splash_attention, interpret=True)


def packed(batch, length):
    """Rows of two sequences with padding before, between or after them."""
    segments = np.zeros((batch, length), np.int32)
    for b in range(batch):
        segments[b, b : length // 2] = 1
        segments[b, length // 2 + b : length - b] = 2
    first = np.cumsum(segments == 1, axis=1)
    second = np.cumsum(segments == 2, axis=1)
    positions = np.where(segments == 1, first, second) - (segments != 0)
    return jnp.asarray(positions.astype(np.int32)), jnp.asarray(segments)


def inputs(batch, length, heads, groups, size):
    generator = np.random.default_rng(heads)
    draw = lambda n: jnp.asarray(  # noqa: E731
        generator.standard_normal((batch, length, n, size)), jnp.float32
    )
    return draw(heads), draw(groups), draw(groups)


def with_gradients(attend, arrays, segments):
    """Attended values of real slots, and the gradients of a function of them."""
    real = (segments != 0)[:, :, None, None]

    def loss(*arrays):
        out = attend(*arrays)
        out = jnp.where(jnp.broadcast_to(real, out.shape), out, 0)
        return jnp.sin(out).sum(), out

    (_, out), gradients = jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(
        *arrays
    )
    return out, gradients


@pytest.mark.parametrize(
    ("length", "heads", "groups", "window", "mesh"),
    [
        (128, 2, 2, None, None),
        (200, 4, 2, None, None),
        (256, 2, 1, 9, None),
        (130, 4, 2, None, "data=2,fsdp=2,tensor=2"),
    ],
    ids=["plain", "grouped, filled up", "window, two blocks", "on a mesh"],
)
def test_values_and_gradients_are_those_of_attention(
    length, heads, groups, window, mesh
):
    batch = 4 if mesh else 2
    positions, segments = packed(batch, length)
    fields = {} if window is None else {"sliding_window": window}
    layers = () if window is None else (0, 1)
    config = variant(sliding_layers=layers, **fields)
    visible = visible_by_layer(config, positions, segments)[0]
    assert visible.window == window
    arrays = inputs(batch, length, heads, groups, 16)
    placement = Placement(mesh and mesh_from_string(mesh))
    got = with_gradients(
        lambda *x: interpreted(*x, visible, placement), arrays, segments
    )
    expected = with_gradients(
        lambda *x: dot_product_attention(*x, visible, HIGHEST), arrays, segments
    )
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5),
        got,
        expected,
    )


def test_a_model_takes_it_in_place_of_its_own():
    """Ragged rows, a scan over many layers, and the last slots alone."""
    config = variant(num_layers=9)
    model = Decoder(config, config.vocab_size)

    def attend(query, key, value, visible, precision):
        if query.shape != (2, key.shape[1], *query.shape[2:]):
            return dot_product_attention(query, key, value, visible, precision)
        return interpreted(query, key, value, visible)

    other = Decoder(config, config.vocab_size, attention=attend)
    params = random_params(model, seed=2)
    rows = ragged(1, 24, [(0, 0), (3, 2)], length=10)
    real = rows[2] != 0
    expected = np.asarray(jax.jit(model.apply)(params, *on_device(rows)))
    got = np.asarray(jax.jit(other.apply)(params, *on_device(rows)))
    np.testing.assert_allclose(got[real], expected[real], rtol=1e-4, atol=1e-4)


def test_sequences_without_segments_are_refused():
    arrays = inputs(1, 8, 2, 2, 8)
    mask = jnp.ones((1, 1, 8, 8), bool)
    with pytest.raises(ValueError, match="8 queries and 8 keys, without segments"):
        splash_attention(*arrays, Visible(mask))
    segments = jnp.ones((1, 8), jnp.int32)
    with pytest.raises(ValueError, match="got 3 queries and 8 keys, with segments"):
        splash_attention(arrays[0][:, :3], *arrays[1:], Visible(mask, segments))


class TestChoice:
    def arrays(self, length, dtype, queries=None, size=64):
        of = lambda t: jnp.zeros((1, t, 2, size), dtype)  # noqa: E731
        visible = Visible(
            jnp.ones((1, 1, queries or length, length), bool),
            jnp.ones((1, length), jnp.int32),
        )
        return of(queries or length), of(length), of(length), visible

    def test_a_cpu_keeps_its_own(self):
        assert choose_attention("cpu") is dot_product_attention
        model = Decoder(variant(), 24)
        assert model.attention is dot_product_attention

    @pytest.mark.parametrize(
        ("length", "dtype", "queries", "taken"),
        [
            (2048, jnp.bfloat16, None, True),
            (1000, jnp.bfloat16, None, False),
            (2048, jnp.float32, None, False),
            (2048, jnp.bfloat16, 1, False),
        ],
        ids=["long", "short", "float32", "one query"],
    )
    def test_splash_is_for_long_sequences_in_bfloat16(
        self, monkeypatch, length, dtype, queries, taken
    ):
        calls = []
        monkeypatch.setattr(
            chooser, "splash_attention", lambda *x: calls.append(x) or x[0]
        )
        placement = Placement(mesh_from_string("data=8"))
        attend = choose_attention("tpu", placement)
        query, key, value, visible = self.arrays(length, dtype, queries)
        precision = jax.lax.Precision.DEFAULT
        if taken:
            attend(query, key, value, visible, precision)
            assert calls[0][4] is placement
        else:
            jax.eval_shape(lambda *x: attend(*x, visible, precision), query, key, value)
            assert not calls

    def test_splash_is_not_for_keys_that_are_not_split_with_their_queries(self):
        query, key, _, visible = self.arrays(2048, jnp.bfloat16)
        mesh = mesh_from_string("data=4,tensor=2")
        whole = Placement(mesh, {**RULES, "kv_heads": None})
        takes = chooser.takes_splash
        assert takes(query, key, visible, Placement(mesh))
        assert not takes(query, key, visible, whole)

    @pytest.mark.parametrize(
        ("length", "dtype", "size", "implementation"),
        [
            (16, jnp.bfloat16, 64, "cudnn"),
            (15, jnp.bfloat16, 64, "xla"),
            (16, jnp.float32, 64, "xla"),
            (16, jnp.bfloat16, 256, "xla"),
            (16, jnp.bfloat16, 20, "xla"),
        ],
    )
    def test_cudnn_is_asked_for_what_it_takes(
        self, monkeypatch, length, dtype, size, implementation
    ):
        asked = []
        monkeypatch.setattr(
            jax.nn, "dot_product_attention", lambda *_, **given: asked.append(given)
        )
        arrays = self.arrays(length, dtype, size=size)
        choose_attention("gpu")(*arrays, jax.lax.Precision.DEFAULT)
        assert asked[0]["implementation"] == implementation
        assert asked[0]["mask"] is arrays[3].mask

    @pytest.mark.parametrize("backend", ["gpu", "tpu"])
    def test_float32_keeps_its_precision(self, backend):
        arrays = inputs(2, 12, 4, 2, 8)
        positions, segments = packed(2, 12)
        visible = visible_by_layer(variant(), positions, segments)[0]
        attend = choose_attention(backend)
        lowered = jax.jit(lambda *x: attend(*x, visible, HIGHEST)).lower(*arrays)
        assert "precision = [HIGHEST, HIGHEST]" in lowered.as_text()
        got = with_gradients(lambda *x: attend(*x, visible, HIGHEST), arrays, segments)
        expected = with_gradients(
            lambda *x: dot_product_attention(*x, visible, HIGHEST), arrays, segments
        )
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5),
            got,
            expected,
        )
