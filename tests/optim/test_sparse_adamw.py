"""Sparse AdamW ends with the bits of masked AdamW, and holds a fifth of the state."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from geomjax.compiled import collectives
from geomjax.meshes import mesh_from_string
from geomjax.optim import (
    OptimizerSpec,
    SparseAdamWState,
    adam_state_figures,
    apply_updates,
    build,
    coordinate_mask,
    learning_rate_schedule,
    sparse_adamw,
    standard_promotion,
)
from geomjax.train.layout import state_layout
from geomjax.train.step import init_state

# A stack whose rows fill several vector registers with a remainder, and a vector.
SHAPES = {"stack": (3, 40, 257), "table": (64, 48), "vector": (16,)}
SPECS = {
    "stack": PartitionSpec(),
    "table": PartitionSpec("tensor", "fsdp"),
    "vector": PartitionSpec("fsdp"),
}


def _tree(seed, dtype=jnp.float32, shapes=SHAPES):
    rng = np.random.default_rng(seed)
    return {k: jnp.asarray(rng.normal(size=s), dtype) for k, s in shapes.items()}


def _masks(density=0.175, shapes=SHAPES):
    rng = np.random.default_rng(5)
    return {k: rng.random(s) < density for k, s in shapes.items()}


def _masked(mask, schedule, clip_norm, **kwargs):
    tx = optax.adamw(schedule, **kwargs)
    if clip_norm is not None:
        tx = optax.chain(optax.clip_by_global_norm(clip_norm), tx)
    return standard_promotion(coordinate_mask(mask, tx))


def _sparse(mask, schedule, clip_norm, **kwargs):
    return standard_promotion(
        sparse_adamw(mask, schedule, clip_norm=clip_norm, **kwargs)
    )


def _run(tx, params, gradients):
    state = tx.init(params)

    @jax.jit
    def step(params, state, gradients):
        updates, state = tx.update(gradients, state, params)
        return apply_updates(params, updates), state, optax.tree.norm(updates)

    for each in gradients:
        params, state, norm = step(params, state, each)
    return params, state, norm


def _adam(state):
    def is_adam(node):
        return isinstance(node, optax.ScaleByAdamState)

    return next(n for n in jax.tree.leaves(state, is_leaf=is_adam) if is_adam(n))


def _bytes(tree):
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def _assert_same_bits(a, b, bits):
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(bits(x), bits(y)), a, b)


@pytest.mark.parametrize(
    ("dtype", "clip_norm", "decay"),
    [
        (jnp.float32, None, {"weight_decay": 0.3}),
        (jnp.float32, 0.1, {"weight_decay": 0.3}),
        (jnp.float32, 0.1, {"weight_decay": 0.0, "b2": 0.95}),
        (jnp.bfloat16, 0.1, {"weight_decay": 0.3}),
    ],
)
def test_bits_are_those_of_masked_adamw(bits, dtype, clip_norm, decay):
    mask = _masks()
    schedule = learning_rate_schedule("cosine", 1e-2, warmup_steps=2, total_steps=8)
    gradients = [_tree(seed, dtype) for seed in range(6)]
    runs = [
        _run(make(mask, schedule, clip_norm, **decay), _tree(9, dtype), gradients)
        for make in (_masked, _sparse)
    ]
    (dense, dense_state, dense_norm), (packed, state, norm) = runs
    _assert_same_bits(packed, dense, bits)
    np.testing.assert_array_equal(bits(norm), bits(dense_norm))
    expected, got = _adam(dense_state), _adam(state)
    assert int(got.count) == int(expected.count) == 6
    for moment in ("mu", "nu"):
        for name, chosen in mask.items():
            places = getattr(got, moment)[name].reshape(-1)
            of_chosen = getattr(expected, moment)[name][chosen]
            np.testing.assert_array_equal(bits(places[: chosen.sum()]), bits(of_chosen))


def test_the_gradients_differ_enough_to_tell():
    """The comparison above would notice an update that skipped clipping or decay."""
    mask, params = _masks(), _tree(9)
    gradients = [_tree(seed) for seed in range(6)]
    runs = [
        _run(_sparse(mask, 1e-2, clip, weight_decay=decay), params, gradients)[0]
        for clip, decay in ((None, 0.3), (None, 0.0), (0.1, 0.3))
    ]
    for other in runs[1:]:
        assert (runs[0]["stack"] != other["stack"]).mean() > 0.1


@pytest.mark.parametrize(
    ("axes", "clip_norm"),
    [
        ((None, "tensor", "fsdp"), None),
        ((None, "tensor", "fsdp"), 0.1),
        (("fsdp", None, None), 0.1),
        ((None, ("data", "fsdp"), None), 0.1),
    ],
)
def test_bits_are_the_same_on_a_mesh(bits, axes, clip_norm):
    shapes = SHAPES | {"stack": (4, 40, 256)}
    mesh = mesh_from_string("data=2,fsdp=2,tensor=2")
    specs = SPECS | {"stack": PartitionSpec(*axes)}
    shardings = {k: NamedSharding(mesh, spec) for k, spec in specs.items()}

    def place(tree):
        return jax.device_put(tree, shardings)

    mask = _masks(shapes=shapes)
    gradients = [place(_tree(seed, shapes=shapes)) for seed in range(4)]
    runs = [
        _run(
            make(placed, 1e-2, clip_norm, weight_decay=0.3),
            place(_tree(9, shapes=shapes)),
            gradients,
        )
        for make, placed in ((_masked, place(mask)), (_sparse, mask))
    ]
    _assert_same_bits(runs[1][0], runs[0][0], bits)
    state = runs[1][1]
    for name, sharding in shardings.items():
        parts = [state.packings[name].columns, state.packings[name].offsets]
        parts += [_adam(state).mu[name], _adam(state).nu[name]]
        for part in parts:
            assert part.sharding.is_equivalent_to(sharding, part.ndim)
            shard = part.sharding.shard_shape(part.shape)
            assert shard[:-1] == (1,) * (part.ndim - 1)


@pytest.mark.parametrize("clip_norm", [None, 0.1])
def test_nothing_travels_on_a_mesh_but_the_norm(clip_norm):
    mesh = mesh_from_string("fsdp=4,tensor=2")
    spec = PartitionSpec(None, "tensor", "fsdp")
    params = {
        "w": jax.device_put(jnp.ones((2, 8, 64)), NamedSharding(mesh, spec)),
    }
    tx = _sparse(_masks(0.4, {"w": (2, 8, 64)}), 1e-2, clip_norm)
    text = jax.jit(tx.update).lower(params, tx.init(params), params).compile().as_text()
    moved = {(c.kind, c.shape) for c in collectives(text)}
    assert moved == (set() if clip_norm is None else {("all-reduce", ())})


def test_a_training_state_keeps_the_shards():
    """`state_layout` knows shapes alone; the state it lays out is packed by shard."""
    mesh = mesh_from_string("fsdp=4,tensor=2")
    layout = NamedSharding(mesh, PartitionSpec(None, "tensor", "fsdp"))
    params = {"w": jax.device_put(jnp.ones((2, 8, 64)), layout)}
    tx = _sparse(_masks(0.4, {"w": (2, 8, 64)}), 1e-2, None)
    opt_state = init_state(params, tx, state_layout(params, tx)).opt_state
    packing = opt_state.packings["w"]
    for leaf in (*packing, _adam(opt_state).mu["w"], _adam(opt_state).nu["w"]):
        assert leaf.shape[:-1] == (1, 2, 4)
        assert leaf.sharding.shard_shape(leaf.shape)[:-1] == (1, 1, 1)


def test_frozen_and_fully_trained_leaves(draw, draw_mask, roles, bits):
    """Through `build`, with the decay and the frozen groups of a run."""
    mask = draw_mask(1)
    mask["layers"]["mlp"]["up_proj"] = None
    trained = []
    for name in ("adamw", "sparse_adamw"):
        spec = OptimizerSpec(
            name=name,
            learning_rate=1e-2,
            schedule="linear",
            total_steps=9,
            clip_norm=0.5,
            frozen=("embed_tokens", r"^norm\."),
            decay_kinds=("matrix",),
            kwargs={"weight_decay": 0.3, "b2": 0.95},
        )
        gradients = [draw(seed) for seed in range(1, 5)]
        trained.append(_run(build(spec, roles, mask), draw(0), gradients))
    _assert_same_bits(trained[1][0], trained[0][0], bits)
    state = trained[1][1].inner_state
    assert isinstance(state, SparseAdamWState)
    assert state.packings["layers"]["mlp"]["up_proj"]["weight"] is None
    assert isinstance(state.packings["embed_tokens"]["weight"], optax.MaskedNode)


def test_without_a_mask_it_is_adamw(draw, roles, bits):
    spec = OptimizerSpec(name="sparse_adamw", learning_rate=1e-2)
    got, _, _ = _run(build(spec, roles), draw(0), [draw(1), draw(2)])
    expected, _, _ = _run(
        standard_promotion(optax.adamw(1e-2)), draw(0), [draw(1), draw(2)]
    )
    _assert_same_bits(got, expected, bits)


def test_figures_of_the_state_are_those_of_the_dense_one():
    mask, gradients = _masks(), [_tree(seed) for seed in range(3)]
    figures = []
    for make in (_masked, _sparse):
        _, state, _ = _run(make(mask, 1e-2, None), _tree(9), gradients)
        figures.append(jax.jit(adam_state_figures)(gradients[-1], state))
    for got, expected in zip(figures[1], figures[0], strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-5)
    assert float(figures[1].coordinates) == sum(int(m.sum()) for m in mask.values())


def _uniform(rng, shape):
    return rng.random(shape)


def _rows_differ(rng, shape):
    """A row's odds are log-normal: the densest tenth of rows holds a third."""
    return rng.random(shape) * np.exp(rng.normal(size=(*shape[:-1], 1)))


def _columns_differ(rng, shape):
    return rng.random(shape) * np.exp(rng.normal(size=shape[-1]))


def _layers_differ(rng, shape):
    return rng.random(shape) * np.linspace(1, 3, shape[0])[:, None, None]


@pytest.mark.parametrize(
    ("scores", "one_device", "on_a_mesh"),
    [
        (_uniform, 0.2195, 0.223),
        (_rows_differ, 0.2195, 0.235),
        (_columns_differ, 0.2195, 0.261),
        (_layers_differ, 0.2195, 0.223),
    ],
)
def test_bytes_of_the_state(scores, one_device, on_a_mesh):
    """The table of the docstring: shares of the 8 bytes of dense moments."""
    shape = (4, 512, 1024)
    drawn = scores(np.random.default_rng(0), shape)
    mask = {"w": drawn >= np.quantile(drawn, 1 - 0.175)}
    layout = NamedSharding(
        mesh_from_string("fsdp=4,tensor=2"), PartitionSpec(None, "tensor", "fsdp")
    )
    params = {"w": jnp.zeros(shape)}
    share = _bytes(sparse_adamw(mask, 1.0).init(params)) / (8 * params["w"].size)
    assert share == pytest.approx(one_device, abs=1e-3)
    params = jax.device_put(params, {"w": layout})
    share = _bytes(sparse_adamw(mask, 1.0).init(params)) / (8 * params["w"].size)
    assert share == pytest.approx(on_a_mesh, abs=1e-3)


def test_misuse_is_named(draw, draw_mask):
    with pytest.raises(ValueError, match="does not fit the parameters"):
        sparse_adamw({"w": np.ones(3, bool)}, 1.0).init({"w": jnp.ones(4)})
    with pytest.raises(ValueError, match="the mask is traced"):
        jax.jit(lambda m, p: sparse_adamw(m, 1.0).init(p))(draw_mask(0), draw(0))
