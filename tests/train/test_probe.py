"""The probe's figures are the analysis', and a run with it ends with the same bits."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from geomjax.analysis import default_metrics, measure, summarize
from geomjax.checkpoints import DictSource
from geomjax.optim.roles import Role
from geomjax.train.log import FILE, read_rows
from geomjax.train.loop import Schedule, run
from geomjax.train.probe import COLUMNS, SHARES, SPECTRAL, make_probe
from geomjax.train.step import init_state

MATRIX = Role(1, "matrix", -2, -1, ("layers", "out", "in"))
ROLES = {
    ("embed_tokens", "weight"): Role(0, "embedding", -2, -1, ("vocab", "embed")),
    ("layers", "self_attn", "q_proj", "weight"): MATRIX,
    ("layers", "mlp", "up_proj", "weight"): MATRIX,
    ("layers", "input_layernorm", "weight"): Role(
        1, "vector", None, None, ("layers", None)
    ),
}
NAMES = {
    ("embed_tokens", "weight"): "model.embed_tokens.weight",
    ("layers", "self_attn", "q_proj", "weight"): (
        "model.layers.{}.self_attn.q_proj.weight"
    ),
    ("layers", "mlp", "up_proj", "weight"): "model.layers.{}.mlp.up_proj.weight",
    ("layers", "input_layernorm", "weight"): "model.layers.{}.input_layernorm.weight",
}
LAYERS = 3


def _metrics(hill_rank):
    needed = ("norms", "unchanged", "update_density", "delta_spectrum")
    table = default_metrics(hill_rank=hill_rank)
    return tuple(metric for metric in table if metric.name in needed)


def _params(seed=0):
    rng = np.random.default_rng(seed)

    def leaf(*shape):
        return jnp.asarray(0.02 * rng.standard_normal(shape), jnp.float32)

    return {
        "embed_tokens": {"weight": leaf(40, 24)},
        "layers": {
            "input_layernorm": {"weight": 1 + leaf(LAYERS, 24)},
            "mlp": {"up_proj": {"weight": leaf(LAYERS, 36, 24)}},
            "self_attn": {"q_proj": {"weight": leaf(LAYERS, 24, 24)}},
        },
    }


def _moved(params, step=2e-5):
    """A sparse update; one layer's q_proj stands still."""
    rng = np.random.default_rng(1)

    def move(x):
        moved = rng.random(x.shape) < 0.3
        return x + jnp.asarray(step * moved * rng.standard_normal(x.shape), x.dtype)

    out = jax.tree.map(move, params)
    attention = out["layers"]["self_attn"]["q_proj"]
    before = params["layers"]["self_attn"]["q_proj"]["weight"]
    attention["weight"] = attention["weight"].at[2].set(before[2])
    return out


def _unstacked(params):
    tensors = {}
    for path, name in NAMES.items():
        leaf = params
        for key in path:
            leaf = leaf[key]
        leaf = np.asarray(leaf)
        if ROLES[path].stack_depth:
            tensors |= {name.format(i): leaf[i] for i in range(LAYERS)}
        else:
            tensors[name] = leaf
    return DictSource(tensors)


def _expected(part, column):
    if column not in SPECTRAL:
        return part[column]
    return part["median"][column]


@pytest.mark.parametrize(
    ("delta", "subtract", "hill_rank", "prefix"),
    [
        ("stored", "bfloat16", None, "update"),
        ("stored", "float32", 5, "update"),
        ("master", "bfloat16", None, "master_update"),
    ],
)
def test_values_are_those_of_the_analysis(delta, subtract, hill_rank, prefix):
    anchor = _params()
    tuned = _moved(anchor)
    rows = measure(
        _unstacked(anchor),
        _unstacked(tuned),
        delta=delta,
        subtract=subtract,
        metrics=_metrics(hill_rank),
    )
    summary = summarize(rows, _metrics(hill_rank))
    parts = {"global": summary["global"], **summary["groups"]}
    expected = {}
    for part, values in parts.items():
        for column in COLUMNS:
            value = _expected(values, column)
            suffix = "_median" if column in SPECTRAL else ""
            if value is not None:
                expected[f"{prefix}/{part}/{column}{suffix}"] = value
    assert {"global", "attention", "ffn", "embedding", "norm"} == parts.keys()
    measured = make_probe(
        anchor, ROLES, delta=delta, subtract=subtract, hill_rank=hill_rank
    )(tuned)
    assert measured == pytest.approx(expected, rel=1e-5, abs=0)
    assert 0 < measured[f"{prefix}/global/exact_zero_fraction"] < 1


def test_a_zero_update_leaves_its_ratios_out():
    params = _params()
    measured = make_probe(params, ROLES)(params)
    parts = ("global", "attention", "ffn", "embedding", "norm")
    assert measured == {
        f"update/{part}/{column}": 0.0 if column == "relative_frobenius" else 1.0
        for part in parts
        for column in ("relative_frobenius", *SHARES)
    }


def test_only_the_columns_asked_for():
    params = _params()
    probe = make_probe(params, ROLES, ["exact_zero_fraction"])
    found = probe(_moved(params))
    assert {name.split("/")[2] for name in found} == {"exact_zero_fraction"}


def test_sharded_parameters_give_the_same_figures():
    anchor = _params()
    tuned = _moved(anchor)
    mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
    sharded = jax.tree.map(
        lambda x: jax.device_put(
            x, NamedSharding(mesh, PartitionSpec(*[None] * (x.ndim - 1), "fsdp"))
        ),
        (anchor, tuned),
    )
    columns = ["relative_frobenius", "unchanged_atol_1e-05", "stable_rank"]
    expected = make_probe(anchor, ROLES, columns)(tuned)
    found = make_probe(sharded[0], ROLES, columns)(sharded[1])
    assert found == pytest.approx(expected, rel=1e-9)


TX = optax.sgd(1e-3, momentum=0.9)


@jax.jit
def _update(state, key):
    def loss(params):
        leaves = jax.tree.leaves(params)
        keys = jax.random.split(key, len(leaves))
        return sum(
            jnp.mean((x - jax.random.normal(k, x.shape)) ** 2)
            for x, k in zip(leaves, keys, strict=True)
        )

    value, gradients = jax.value_and_grad(loss)(state.params)
    updates, opt_state = TX.update(gradients, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    return state._replace(step=state.step + 1, params=params, opt_state=opt_state), {
        "loss": value[None]
    }


_donating = jax.jit(_update.__wrapped__, donate_argnums=0)


KEY = jax.random.key(3)


def _advance(state, step):
    index = jax.device_put(np.uint32(step))
    return _donating(state, jax.random.fold_in(KEY, index))


def _evaluate(params):
    return {"norm": float(optax.tree.norm(params))}


def test_a_run_with_the_probe_ends_with_the_same_bits(tmp_path):
    schedule = Schedule(num_steps=4, evaluate_every=2, save_every=4)

    def train(name, with_probe):
        state = init_state(_params(), TX)
        evaluate = _evaluate
        if with_probe:
            # The steps donate these parameters: the probe must hold its own copy.
            probe = make_probe(
                state.params, ROLES, ["relative_frobenius", "stable_rank"]
            )

            def evaluate(params):
                return {**_evaluate(params), **probe(params)}

        return run(tmp_path / name, state, _advance, evaluate, schedule)

    with_probe, without = train("with", True), train("without", False)
    for a, b in zip(jax.tree.leaves(with_probe), jax.tree.leaves(without), strict=True):
        assert a.dtype == b.dtype
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()
    assert not jax.config.jax_enable_x64
    rows = read_rows(tmp_path / "with")
    plain = [
        {key: v for key, v in row.items() if not key.startswith("update/")}
        for row in rows
    ]
    assert plain == read_rows(tmp_path / "without")
    assert "NaN" not in (tmp_path / "with" / FILE).read_text()
    norms = [
        row["update/global/relative_frobenius"] for row in rows if row["kind"] == "eval"
    ]
    assert norms[0] == 0
    assert 0 < norms[1] < norms[2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"columns": ["stable"]}, "expected at least one of"),
        ({"columns": []}, "expected at least one of"),
        ({"columns": ["stable_rank"] * 2}, "at most once"),
        ({"hill_rank": 1}, "needs at least 2"),
        ({"roles": {}}, "embed_tokens.weight: no role"),
    ],
)
def test_wrong_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_probe(_params(), **{"roles": ROLES, **arguments})


def test_parameters_of_another_shape_are_refused():
    params = _params()
    probe = make_probe(params, ROLES)
    params["embed_tokens"]["weight"] = params["embed_tokens"]["weight"][:-1]
    with pytest.raises(ValueError, match=r"embed_tokens\.weight', \(39, 24\)"):
        probe(params)


def test_parameters_that_are_not_finite_give_no_figures_of_their_part():
    params = _params()
    probe = make_probe(params, ROLES, ["relative_frobenius"])
    tuned = _moved(params)
    weight = tuned["embed_tokens"]["weight"]
    tuned["embed_tokens"]["weight"] = weight.at[0, 0].set(jnp.nan)
    found = probe(tuned)
    assert "update/embedding/relative_frobenius" not in found
    assert found["update/ffn/relative_frobenius"] > 0
