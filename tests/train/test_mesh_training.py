"""Training and rollouts on meshes of 8 devices equal one device's, and move little."""

import dataclasses
import math
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec

from geomjax.compiled import collectives
from geomjax.data.batches import pad_prompts
from geomjax.meshes import RULES, Placement, mesh_from_string
from geomjax.models import decoder as decoder_module
from geomjax.models.config import DecoderConfig, ExpertSizes
from geomjax.models.decoder import Decoder
from geomjax.models.read import placed_shapes
from geomjax.objectives.base import Batch, token_mean
from geomjax.objectives.distill import full_vocabulary, sampled_token
from geomjax.objectives.divergence import reverse_kl
from geomjax.optim import coordinate_mask, standard_promotion
from geomjax.rollout.sample import sample
from geomjax.train.layout import state_layout
from geomjax.train.step import (
    Sampling,
    init_state,
    make_distill_step,
    make_supervised_step,
)

# Every size differs from the others and from their parts, so that a collective's shape
# says what it carries.
VOCAB, PADDED, WIDTH, ROWS, LENGTH, LAYERS = 77, 80, 16, 16, 10, 2
DENSE = DecoderConfig(
    architecture="Qwen3ForCausalLM",
    vocab_size=PADDED,
    hidden_size=WIDTH,
    intermediate_size=24,
    num_layers=LAYERS,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    rms_norm_eps=1e-6,
    rope_theta=1e4,
    tie_word_embeddings=False,
    max_position_embeddings=32,
)
MOE = dataclasses.replace(
    DENSE,
    architecture="Qwen3MoeForCausalLM",
    experts=ExpertSizes(count=4, per_token=2, size=12, normalise_weights=True),
)
CONFIGS = {"dense": DENSE, "moe": MOE}
# Each compiles for some ten seconds on two cores; three show every axis.
GRID = [
    ("dense", "fsdp=8"),
    ("dense", "data=2,fsdp=2,tensor=2"),
    ("moe", "expert=2,fsdp=4"),
    pytest.param("dense", "data=8", marks=pytest.mark.slow),
    pytest.param("dense", "tensor=2,fsdp=4", marks=pytest.mark.slow),
    pytest.param("moe", "data=2,expert=2,tensor=2", marks=pytest.mark.slow),
]
UP = ("layers", "mlp", "up_proj", "weight")


@pytest.fixture(autouse=True)
def _scanned(monkeypatch):
    """Deep models scan their layers; so do these of two."""
    monkeypatch.setattr(decoder_module, "UNROLLED_LAYERS", 0)


@cache
def weights(name, seed):
    return Decoder(CONFIGS[name], VOCAB).init(jax.random.key(seed))


def placed(name, text, rules=RULES):
    """A model on a mesh, and a function that lays its parameters out."""
    placement = Placement(mesh_from_string(text), rules)
    model = Decoder(CONFIGS[name], VOCAB, placement=placement)
    shapes = placed_shapes(CONFIGS[name], model.shapes, jnp.float32, placement)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, shapes)
    return model, lambda params: jax.device_put(params, shardings)


@cache
def sequences():
    generator = np.random.default_rng(0)
    slots = np.arange(LENGTH)[None, :]
    real = slots < generator.integers(5, LENGTH + 1, (ROWS, 1))
    tokens = generator.integers(0, VOCAB, (ROWS, LENGTH))
    return Batch(
        tokens=jnp.asarray(tokens, jnp.int32),
        positions=jnp.asarray(np.where(real, slots, 0), jnp.int32),
        segment_ids=jnp.asarray(real, jnp.int32),
        weights=token_mean(jnp.asarray(real & (slots >= 2))),
        behaviour_log_probs=jnp.zeros((ROWS, LENGTH), jnp.float32),
    )


def masked_adamw(name):
    generator = np.random.default_rng(1)
    mask = jax.tree.map(lambda x: generator.random(x.shape) < 0.8, weights(name, 0))
    return coordinate_mask(mask, standard_promotion(optax.adamw(1e-3, eps=1e-4)))


def program(name, student, teacher, tx, layout=None, micro_batches=1):
    objective = full_vocabulary(
        student, teacher, reverse_kl, temperature=1.0, chunk_tokens=2
    )
    return make_supervised_step(
        objective, tx, micro_batches=micro_batches, layout=layout
    )


@cache
def one_device(name):
    """States after the first and the fifth step, on the host."""
    model, tx = Decoder(CONFIGS[name], VOCAB), masked_adamw(name)
    step = program(name, model, model, tx)
    state, states = init_state(weights(name, 0), tx), []
    for _ in range(5):
        state, _ = step(state, weights(name, 1), sequences())
        states.append(jax.device_get(state))
    return states[0], states[-1]


def distance(got, expected):
    """Relative, in Frobenius norm, of the leaf that differs most."""
    pairs = zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True)
    norm = np.linalg.norm
    return max(norm(np.ravel(a - b)) / norm(np.ravel(b)) for a, b in pairs)


def moments(state):
    return state.opt_state.inner_state[0]


@pytest.mark.parametrize(("name", "text"), GRID)
def test_training_on_a_mesh_is_training_on_one_device(name, text, capfd):
    student, lay_out = placed(name, text)
    # The teacher by a table of its own: whole in width, split by heads alone.
    teacher, lay_out_teacher = placed(name, text, {**RULES, "embed": None})
    params, tx = lay_out(weights(name, 0)), masked_adamw(name)
    layout = state_layout(params, tx)
    state = init_state(params, tx, layout)
    micro_batches = 2 if text.startswith("data=2,fsdp") else 1
    step = program(name, student, teacher, tx, layout, micro_batches)
    context = lay_out_teacher(weights(name, 1))
    compiled = step.lower(state, context, sequences()).compile()
    # The partitioner warns where it knows no way but to make an array whole.
    assert "full rematerialization" not in capfd.readouterr().err

    first, last = one_device(name)
    start = weights(name, 0)
    state, _ = compiled(state, context, sequences())
    # Adam's first moment after one step is a tenth of the masked gradient.
    gradients = jax.device_get(moments(state).mu)
    assert distance(gradients, moments(first).mu) < 1e-5
    for _ in range(4):
        state, _ = compiled(state, context, sequences())
    moved, expected = (
        jax.tree.map(lambda a, b: np.asarray(a) - np.asarray(b), s.params, start)
        for s in (state, last)
    )
    assert distance(expected, start) > 0.5  # ||update - W|| / ||W||: comparable sizes.
    sizes = zip(jax.tree.leaves(expected), jax.tree.leaves(start), strict=True)
    assert min(np.linalg.norm(d) / np.linalg.norm(w) for d, w in sizes) > 1e-3
    assert distance(moved, expected) < 1e-4

    check_layout(state, layout, name, text)
    check_training_collectives(compiled.as_text(), text)


def check_layout(state, layout, name, text):
    """Outputs lie as planned, and the plan splits what belongs to a parameter."""
    jax.tree.map(
        lambda x, s: x.sharding.is_equivalent_to(s, x.ndim) or pytest.fail(str(s)),
        state,
        layout,
    )

    def axis(name):
        return name if f"{name}=" in text else None

    spec = (None, axis("tensor"), axis("fsdp"))
    up = UP
    if name == "moe":
        up = ("layers", "mlp", "experts", "up_proj", "weight")
        spec = (None, axis("expert"), *spec[1:])
    adam = moments(state)
    for tree in (state.params, adam.mu, adam.nu, state.opt_state.mask):
        leaf = tree
        for key in up:
            leaf = leaf[key]
        assert leaf.sharding.spec == PartitionSpec(*spec)
        parts = math.prod(
            int(a.split("=")[1]) for a in text.split(",") if "data" not in a
        )
        assert {s.data.size for s in leaf.addressable_shards} == {leaf.size // parts}
    assert adam.count.sharding.spec == PartitionSpec()


def check_training_collectives(text, mesh):
    """What the docstring of `geomjax.train.layout` lists, and nothing else."""
    found = [c for c in collectives(text) if c.shape]
    assert all(c.trip_count is not None for c in found)
    vocabulary = {VOCAB, PADDED, PADDED // 2, PADDED // 4, PADDED // 8}
    # No logits are moved, in a loop or outside.
    matrices = [c for c in found if len(c.shape) > 1]
    assert not [c for c in matrices if c.shape[-1] in vocabulary]
    # Heads are moved and their gradients summed once a micro-batch.
    micro_batches = 2 if "data=2,fsdp" in mesh else 1
    heads = [c for c in matrices if set(c.shape) & vocabulary]
    assert heads
    assert {len(c.loops) for c in heads} <= ({0, 1} if "data=2,fsdp" in mesh else {0})
    assert all(c.trip_count in (1, micro_batches) for c in heads)
    gathers = [c for c in found if c.kind == "all-gather"]
    if "fsdp" not in mesh:
        assert not [c for c in gathers if c.shape[-1] == WIDTH]
        return
    # Weights are gathered once a layer, and hidden states once a chunk.
    layer = [
        c
        for c in gathers
        if c.trip_count == LAYERS * micro_batches and "dot_general" in c.op_name
    ]
    assert layer
    chunk = [c for c in gathers if c.trip_count > LAYERS * micro_batches]
    assert chunk
    assert all(c.shape[-1] == WIDTH or c.bytes < 4 * WIDTH * WIDTH for c in chunk)


ROLLOUT = {"max_new_tokens": 5, "stop_tokens": (3,), "temperature": 0.0}


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("dense", "fsdp=8"),
        ("dense", "data=2,fsdp=2,tensor=2"),
        ("moe", "expert=2,fsdp=4"),
    ],
)
def test_a_rollout_on_a_mesh_gathers_no_weight_in_its_loop(name, text):
    tokens = sequences().tokens[:, :4]
    rest = jnp.broadcast_to(jnp.arange(4), (ROWS, 4)), jnp.ones((ROWS, 4), jnp.int32)
    student, lay_out = placed(name, text)

    def draw(model):
        return jax.jit(
            lambda params, key: sample(model, params, tokens, *rest, key, **ROLLOUT)
        )

    key = jax.random.key(0)
    expected = draw(Decoder(CONFIGS[name], VOCAB))(weights(name, 0), key)
    params = lay_out(weights(name, 0))
    compiled = draw(student).lower(params, key).compile()
    got = compiled(params, key)
    np.testing.assert_array_equal(got.tokens, expected.tokens)
    assert len(np.unique(got.tokens[:, 4:])) > 5
    np.testing.assert_allclose(got.log_probs, expected.log_probs, atol=1e-5)
    assert got.tokens.sharding.spec[0] in ("fsdp", ("data", "fsdp"))

    found = collectives(compiled.as_text())
    in_loop = [c for c in found if c.loops]
    assert {c.trip_count for c in in_loop} == {5}
    # At most one vector of the residual stream for each of a device's sequences.
    local = ROWS // student.placement.parts("batch")
    assert all(math.prod(c.shape) <= local * WIDTH for c in in_loop)
    before = [c for c in found if not c.loops and c.kind == "all-gather"]
    matrices = [c for c in before if c.shape[0] == LAYERS and len(c.shape) > 2]
    assert len(matrices) == 7 if name == "dense" else len(matrices) == 8


def test_the_cache_is_split_by_sequences_and_heads():
    student, lay_out = placed("dense", "data=2,fsdp=2,tensor=2")
    tokens = sequences().tokens[:, :4]

    def prefill(params):
        rest = jnp.broadcast_to(jnp.arange(4), (ROWS, 4)), jnp.ones_like(tokens)
        return student.prefill(student.split_layers(params), tokens, *rest, 6)[1]

    cache = jax.jit(prefill)(lay_out(weights("dense", 0)))
    batch = ("data", "fsdp")
    for layer in cache.layers:
        assert layer.keys.shape == (ROWS, 2, 8, 6)
        assert {s.data.shape for s in layer.keys.addressable_shards} == {(4, 1, 8, 6)}
        assert {s.data.shape for s in layer.values.addressable_shards} == {(4, 1, 6, 8)}
        assert layer.keys.sharding.spec[:2] == layer.values.sharding.spec[:2]
        assert layer.keys.sharding.spec[:2] == (batch, "tensor")


def test_a_distillation_step_on_a_mesh_is_that_of_one_device():
    """Rollout, teacher and two updates, with the draws of one device."""
    text = "data=2,fsdp=2,tensor=2"
    ids = [np.asarray(row[:3], np.int32) for row in sequences().tokens[:8]]
    prompts = jax.tree.map(jnp.asarray, pad_prompts(ids, 4, 0))
    sampling = Sampling(2, 4, 1.0, (3,), 0)
    tx, key = optax.sgd(1.0), jax.random.key(2)

    def run(model, params, teacher_params):
        objective = sampled_token(model, model, temperature=1.0, clip=0.2)
        layout = state_layout(params, tx)
        step = make_distill_step(
            model, objective, tx, sampling, mini_batches=2, layout=layout
        )
        return step(init_state(params, tx, layout), teacher_params, prompts, key)

    start = weights("dense", 0), weights("dense", 1)
    expected, of_one = run(Decoder(DENSE, VOCAB), *start)
    student, lay_out = placed("dense", text)
    got, of_mesh = run(student, *map(lay_out, start))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
        jax.device_get(of_mesh),
        jax.device_get(of_one),
    )
    moved, of_one_device = (
        jax.tree.map(lambda a, b: np.asarray(a) - np.asarray(b), s.params, start[0])
        for s in (got, expected)
    )
    assert distance(moved, of_one_device) < 1e-4


def test_rows_that_a_mesh_does_not_divide_are_refused():
    student, lay_out = placed("dense", "data=2,fsdp=4")
    few = jax.tree.map(lambda x: x[:6], sequences())
    with pytest.raises(ValueError, match="6 rows over data=2|6 batch over data=2 x"):
        student.apply(lay_out(weights("dense", 0)), *few[:3])
