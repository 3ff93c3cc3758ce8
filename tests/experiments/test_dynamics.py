"""Channels of matrices made by hand, and a small study of the dynamics."""

import json

import numpy as np
import pytest

from experiments.dynamics import claims, entries, entry_table
from experiments.studies.channels import (
    DENSITY,
    Channel,
    Paths,
    entry,
    follow,
    random_walk,
)
from geomjax.names import classify
from geomjax.train.log import read_rows

PROGRESS = np.array([0.1, 0.2, 0.5, 0.8, 1.0])
SHAPE = (48, 64)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        # Half way from 0.25 to 1 is 0.625; what falls below it again has not entered.
        ([0.1, 0.8, 0.3, 0.7, 1.0], 0.8),
        ([0.625, 0.625, 0.625, 0.625, 1.0], 0.1),
        ([0.9, 0.9, 0.9, 0.5, 1.0], 1.0),
        ([0.9, np.nan, 0.9, 0.9, 1.0], np.nan),
    ],
)
def test_an_update_has_entered_where_it_stays(values, expected):
    assert entry(np.array(values), PROGRESS, 0.25) == pytest.approx(
        expected, nan_ok=True
    )


def low_rank(seed, rank=16):
    generator = np.random.default_rng(seed)
    return generator.standard_normal((SHAPE[0], rank)) @ generator.standard_normal(
        (rank, SHAPE[1])
    )


def test_an_update_that_only_grows_is_in_its_channel_from_the_start():
    before = low_rank(9).astype(np.float32)
    steps = [before + np.float32(0.01 * t) * low_rank(0) for t in (1, 2, 5, 8, 10)]
    channel = follow("model.layers.3.mlp.up_proj.weight", before, steps, 0)
    assert channel.place == (3, "up_proj", "ffn")
    assert channel.chance == 16 / 64
    for quantity in ("directions", "coordinates"):
        assert channel.entry(quantity, PROGRESS) == 0.1
    np.testing.assert_allclose(channel.run.directions, 1, atol=1e-4)
    np.testing.assert_allclose(channel.run.stable_rank, channel.run.stable_rank[-1])


def test_an_update_that_turns_enters_where_it_turns():
    """Up to half of the run it is another one, a tenth of the size."""
    before = np.zeros(SHAPE, np.float32)
    shares = (0.02, 0.05, 0.1)
    steps = [share * low_rank(1) for share in shares]
    steps += [steps[-1] + t * low_rank(0) for t in (0.9, 1.0)]
    channel = follow("w", before, [x.astype(np.float32) for x in steps], 0)
    assert channel.entry("directions", PROGRESS) == 0.8
    assert channel.entry("coordinates", PROGRESS) == 0.8
    # Before it turns it is at chance.
    assert channel.run.directions[0] == pytest.approx(16 / 64, abs=0.08)
    assert channel.run.coordinates[0] == pytest.approx(DENSITY, abs=0.05)


def test_what_never_moves_enters_nowhere():
    still = np.ones(SHAPE, np.float32)
    channel = follow("w", still, [still, still], 0)
    for quantity in ("directions", "coordinates"):
        assert np.isnan(channel.entry(quantity, np.array([0.5, 1.0])))


def test_a_random_walk_has_the_steps_norms_and_no_memory():
    updates = np.stack([t * low_rank(0) for t in (1.0, 3.0, 3.5)])
    walk = random_walk("w", updates, 0)
    steps, own = (np.diff(x, axis=0, prepend=0 * x[:1]) for x in (walk, updates))
    norms = [np.linalg.norm(x, axis=(1, 2)) for x in (steps, own)]
    np.testing.assert_allclose(*norms)
    cosine = np.sum(steps[0] * steps[1]) / (norms[0][0] * norms[0][1])
    assert abs(cosine) < 0.1
    assert (walk != random_walk("w", updates, 1)).all()
    assert (walk != random_walk("v", updates, 0)).all()
    # Of equal steps, half of a walk lies as far from the end as the angle says.
    even = random_walk("w", np.stack([t * low_rank(0) for t in (1.0, 2.0)]), 0)
    cosine = (
        np.sum(even[0] * even[1]) / np.linalg.norm(even[0]) / np.linalg.norm(even[1])
    )
    assert cosine == pytest.approx(np.sqrt(0.5), abs=0.05)


UNEVEN = np.logspace(0, -2, SHAPE[1])
"""A scale for each column."""


def test_a_random_walks_steps_have_the_norms_of_rows_and_columns():
    step = low_rank(0) * np.linspace(1, 3, SHAPE[0])[:, None] * UNEVEN
    walks = np.stack([random_walk("w", step[None], seed)[0] for seed in range(400)])
    for axis in (0, 1):
        energy = np.sum(walks**2, axis=axis + 1).mean(0)
        # Sums of at least 48 entries, few of which weigh much, in 400 draws.
        np.testing.assert_allclose(energy, np.sum(step**2, axis=axis), rtol=0.15)


def test_a_step_of_nothing_is_one_in_the_walk():
    update = low_rank(0)
    walk = random_walk("w", np.stack([update, update, 2 * update]), 0)
    np.testing.assert_array_equal(walk[1], walk[0])
    assert np.isfinite(walk).all()
    assert not random_walk("w", np.zeros((2, *SHAPE)), 0).any()


def test_uneven_columns_without_memory_are_no_channel():
    """Beside even steps such a walk would enter early."""
    progress = np.arange(1, 11) / 10
    before = np.zeros(SHAPE, np.float32)
    found = []
    for seed in range(8):
        drawn = np.random.default_rng(seed).standard_normal((10, *SHAPE))
        walk = np.cumsum(drawn * UNEVEN, axis=0).astype(np.float32)
        channel = follow("w", before, list(walk), seed)
        even = np.cumsum(drawn, axis=0).astype(np.float32)
        isotropic = follow("w", before, list(even), seed)
        found.append(
            [
                (
                    channel.entry(quantity, progress),
                    channel.entry(quantity, progress, walk=True),
                    isotropic.entry(quantity, progress),
                )
                for quantity in ("directions", "coordinates")
            ]
        )
    own, null, even = np.mean(found, axis=0).T
    # An entry of coordinates varies by 0.08: means of 8 differ by 0.15 at most.
    np.testing.assert_allclose(own, null, atol=0.15)
    assert (even - own > 0.3).all()


# --- claims, of channels made by hand -----------------------------------------------


def channel(name, enters, walk, ranks=(9.0, 5.0)):
    """A matrix that enters both channels at a place of PROGRESS, as its walk does."""

    def paths(place):
        way = np.where(place <= PROGRESS, 1.0, 0.0)
        return Paths(way, way.copy(), np.linspace(*ranks, len(PROGRESS)))

    return Channel(name, classify(name), 0.25, paths(enters), paths(walk))


def seeds(enters, walk):
    names = ("model.layers.0.self_attn.q_proj.weight", "model.layers.0.mlp.up.weight")
    # The other matrix is left out of what is of attention alone.
    return [
        [channel(names[0], enters, walk), channel(names[1], 1.0, walk)]
        for _ in range(3)
    ]


def test_claims_are_judged_by_the_entries():
    channels = {"opd": seeds(0.1, 0.8), "sft": seeds(0.5, 0.2), "rlvr": seeds(0.2, 1.0)}
    found = {verdict.claim: verdict for verdict in claims(channels, PROGRESS)}
    assert len(found) == 3 + 3 * 2
    controlled = claims(channels | {"sft_anchor": seeds(0.5, 0.2)}, PROGRESS)
    assert [v.source for v in controlled].count("ours: same start and rate") == 1
    assert len({v.claim for v in controlled}) == len(controlled) == 4 + 4 * 2
    expected = {
        "OPD enters its final directions before SFT": (0.4, True),
        "OPD is in its final directions by 20% of the run": (0.1, True),
        "RLVR's update contracts: its stable rank falls along the run": (-4.0, True),
        # (0.1 + 1) / 2 against 0.8, and (0.5 + 1) / 2 against 0.2.
        "OPD enters its final directions before a random walk would": (0.25, True),
        "SFT enters its final coordinates before a random walk would": (-0.55, False),
    }
    for claim, (mean, holds) in expected.items():
        assert found[claim].estimate.mean == pytest.approx(mean), claim
        assert found[claim].holds is holds, claim


def test_a_seed_without_a_defined_way_is_undefined():
    nowhere = channel("model.layers.0.self_attn.q_proj.weight", 0.1, 0.2)
    nowhere.run.directions[0] = np.nan
    assert entries([[nowhere]], "directions", PROGRESS) == [None]
    (row,) = entry_table({"opd": [[nowhere]]}, PROGRESS).rows
    assert row[2:4] == [None, None]
    assert [cell.mean for cell in row[4:]] == [0.1, 0.2]


# --- a small study ------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(smoke):
    return smoke.run("dynamics")


@pytest.mark.slow
def test_the_record_has_every_matrix_and_seed(finished):
    workdir, record = finished
    assert json.loads((workdir / "results.json").read_text()) == record
    channels = record["channels"]["opd"]
    assert len(channels) == 2 + 2 * 7
    for name, found in channels.items():
        assert name.endswith(".weight")
        for quantity in ("directions", "coordinates"):
            for kind in (quantity, f"{quantity}_walk"):
                assert len(found[kind]) == 2
                # The rows of some tokens do not move: fewer than 16 directions.
                known = [x for x in found[kind] if "embed" not in name or x is not None]
                assert all(x in (2 / 6, 4 / 6, 1.0) for x in known)
        assert 0 < found["directions_chance"] < 1
    assert len(record["claims"]) == 3
    assert set(record["compilations"].values()) == {1}


@pytest.mark.slow
def test_probes_are_in_every_evaluation_and_in_the_report(finished):
    workdir, _ = finished
    rows = read_rows(workdir / "arms" / "opd" / "seed_0")
    evaluations = [row for row in rows if row["kind"] == "eval"]
    assert len(evaluations) == 3
    for row in evaluations:
        assert "update/global/exact_zero_fraction" in row
        assert "test_accuracy" in row
    assert evaluations[0]["update/ffn/relative_frobenius"] == 0
    assert evaluations[-1]["update/ffn/stable_rank_median"] > 1
    figures = {path.stem for path in (workdir / "figures").iterdir()}
    assert {"channels", "entry_opd", "probes_opd", "trajectories"} <= figures
