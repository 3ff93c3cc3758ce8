"""Distillation on the k most likely tokens, by hand and by finite differences."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from finite_differences import assert_gradient
from table_model import (
    TableModel,
    log_prob_params,
    make_batch,
    random_batch,
    table_params,
)

from geomjax.compiled import collectives
from geomjax.meshes import ONE_DEVICE, Placement, mesh_from_string
from geomjax.objectives.distill import full_vocabulary
from geomjax.objectives.divergence import forward_kl, jsd, reverse_kl
from geomjax.objectives.top_k import restrict, top_k
from geomjax.objectives.vocabulary import likeliest, pick_each, without

FOUR = TableModel(4)
STUDENT = np.array([0.4, 0.3, 0.2, 0.1])
TEACHER = np.array([0.1, 0.2, 0.1, 0.6])
ONE = make_batch([[0, 1]], [[0.0, 1.0]])


def params_of(p):
    return log_prob_params(np.log(np.tile(p, (4, 1))).astype(np.float32))


def kl(p, q):
    return float((np.asarray(p) * np.log(np.asarray(p) / np.asarray(q))).sum())


@pytest.mark.parametrize(
    ("support", "tail", "p", "q"),
    [
        # The student's best two are tokens 0 and 1, the teacher's 3 and 1.
        ("student", "renormalise", [4 / 7, 3 / 7], [1 / 3, 2 / 3]),
        ("student", "bucket", [0.4, 0.3, 0.3], [0.1, 0.2, 0.7]),
        ("teacher", "renormalise", [1 / 4, 3 / 4], [3 / 4, 1 / 4]),
        ("teacher", "bucket", [0.1, 0.3, 0.6], [0.6, 0.2, 0.2]),
    ],
)
def test_values_by_hand(support, tail, p, q):
    loss = {
        name: top_k(
            FOUR, FOUR, divergence, k=2, support=support, tail=tail, temperature=1.0
        )(params_of(STUDENT), params_of(TEACHER), ONE)[0]
        for name, divergence in (("forward", forward_kl), ("reverse", reverse_kl))
    }
    assert loss["forward"] == pytest.approx(kl(q, p), rel=1e-5)
    assert loss["reverse"] == pytest.approx(kl(p, q), rel=1e-5)


def test_the_bucket_sees_mass_that_renormalising_does_not():
    """Twice the mass inside, in the same proportions: only the bucket notices."""
    less = np.array([0.2, 0.1, 0.35, 0.35])
    more = np.array([0.4, 0.2, 0.2, 0.2])
    scores = jnp.asarray(np.log([less, more]), jnp.float32)
    index = jnp.array([[0, 1], [0, 1]])
    renormalised = restrict(scores, index, "renormalise")
    np.testing.assert_allclose(renormalised[0], renormalised[1], rtol=1e-5)
    np.testing.assert_allclose(
        jnp.exp(restrict(scores, index, "bucket")),
        [[0.2, 0.1, 0.7], [0.4, 0.2, 0.4]],
        rtol=1e-5,
    )


@pytest.mark.parametrize(("k", "tail"), [(6, "renormalise"), (5, "bucket")])
def test_with_all_tokens_it_is_the_whole_vocabulary(k, tail):
    """One token in the bucket is that token."""
    model = TableModel(6)
    params, teacher = table_params(0, 6, 3), table_params(1, 6, 3)
    batch = random_batch(2, 6, rows=2, length=5)
    part = top_k(
        model, model, jsd(0.3), k=k, support="teacher", tail=tail, temperature=2.0
    )
    whole = full_vocabulary(model, model, jsd(0.3), temperature=2.0)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
        jax.value_and_grad(part, has_aux=True)(params, teacher, batch),
        jax.value_and_grad(whole, has_aux=True)(params, teacher, batch),
    )


@pytest.mark.parametrize("tail", ["renormalise", "bucket"])
@pytest.mark.parametrize("support", ["student", "teacher"])
@pytest.mark.parametrize(
    "divergence",
    [forward_kl, reverse_kl, jsd(0.3)],
    ids=["forward_kl", "reverse_kl", "jsd"],
)
def test_gradient_against_finite_differences(divergence, support, tail):
    with jax.enable_x64(True):
        model = TableModel(6, np.float64)
        objective = top_k(
            model,
            model,
            divergence,
            k=3,
            support=support,
            tail=tail,
            temperature=0.7,
            chunk_tokens=5,
        )
        batch = random_batch(0, 6, rows=3, length=5, dtype=np.float64)
        teacher = table_params(2, 6, 3, np.float64)
        assert_gradient(
            lambda params: objective(params, teacher, batch)[0],
            table_params(1, 6, 3, np.float64),
        )


MESHES = ("data=8", "data=2,fsdp=4", "data=2,fsdp=2,tensor=2")


@pytest.mark.parametrize("mesh", MESHES)
def test_what_a_mesh_chooses_and_reads_is_what_one_device_does(mesh):
    """Bit by bit, of equal scores too, and so are the gradients."""
    placement = Placement(mesh_from_string(mesh))
    generator = np.random.default_rng(0)
    scores = jnp.asarray(generator.integers(-4, 4, (8, 16)), jnp.float32)
    scores = scores.at[:, 13:].set(-1e30)
    for k in (1, 3, 9):
        index = likeliest(scores, k)
        chosen = jax.jit(partial(likeliest, k=k, placement=placement))(scores)
        np.testing.assert_array_equal(chosen, index)
        weights = jnp.asarray(generator.standard_normal(index.shape), jnp.float32)

        def read(place, scores, index=index, weights=weights):
            others = jnp.exp(without(scores, index, place)).sum(1)
            picked = pick_each(scores, index, place)
            return (weights * picked).sum() + others.sum(), (others, picked)

        on_mesh, alone = (
            jax.jit(jax.value_and_grad(partial(read, place), has_aux=True))(scores)
            for place in (placement, ONE_DEVICE)
        )
        (_, (_, picked)), gradient = on_mesh
        np.testing.assert_array_equal(picked, alone[0][1][1])
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), on_mesh, alone
        )
        np.testing.assert_array_equal(gradient != 0, alone[1] != 0)


@pytest.mark.parametrize("tail", ["renormalise", "bucket"])
@pytest.mark.parametrize("mesh", MESHES[1:])
def test_on_a_mesh_no_logits_are_moved(mesh, tail):
    model = TableModel(77, placement=Placement(mesh_from_string(mesh)))
    options = {"k": 3, "support": "student", "tail": tail, "chunk_tokens": 2}
    objective = top_k(model, model, reverse_kl, temperature=1.0, **options)
    inputs = table_params(0, 77, 6), table_params(1, 77, 6), random_batch(2, 77, 8, 5)
    step = jax.jit(jax.grad(objective, has_aux=True))
    found = collectives(step.lower(*inputs).compile().as_text())
    in_chunks = [c for c in found if c.loops and len(c.shape) > 1]
    candidates = [c for c in in_chunks if c.shape[-1] == 3 * 4]
    assert {c.kind for c in candidates} == {"all-gather"}
    # 77 tokens are padded to 80; a device has 20 of them.
    assert not [c for c in in_chunks if set(c.shape) & {77, 80, 40, 20}]


def test_no_gradient_reaches_the_teacher():
    objective = top_k(
        FOUR, FOUR, jsd(0.5), k=2, support="teacher", tail="bucket", temperature=1.0
    )
    gradient = jax.grad(lambda teacher: objective(params_of(STUDENT), teacher, ONE)[0])(
        params_of(TEACHER)
    )
    assert all((g == 0).all() for g in jax.tree.leaves(gradient))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 1, "tail": "renormalise"}, "between 2 and 4"),
        ({"k": 5, "tail": "renormalise"}, "between 2 and 4"),
        ({"k": 0, "tail": "bucket"}, "between 1 and 3"),
        ({"k": 4, "tail": "bucket"}, "between 1 and 3"),
        ({"tail": "drop"}, "tail 'drop'"),
        ({"support": "both"}, "support 'both'"),
    ],
)
def test_bad_options_are_refused(options, message):
    options = {"k": 2, "support": "student", "tail": "bucket"} | options
    with pytest.raises(ValueError, match=message):
        top_k(FOUR, FOUR, reverse_kl, temperature=1.0, **options)


def test_vocabularies_of_two_sizes_are_refused():
    with pytest.raises(ValueError, match="has 4 tokens, the teacher's 5"):
        top_k(
            FOUR,
            TableModel(5),
            reverse_kl,
            k=2,
            support="student",
            tail="bucket",
            temperature=1.0,
        )
