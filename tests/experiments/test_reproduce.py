"""The lot of the studies: its plan, its runs, its document and its papers."""

import importlib
import json
import re

import pytest

import configs.tiny_world
import configs.vision_world
from experiments import reproduce
from experiments.common import workdir as workdirs
from experiments.common.workdir import WorkdirError
from experiments.common.world import TINY_WORLD
from experiments.reproduction.document import Status, write_document
from experiments.reproduction.items import FILE, load_items
from experiments.reproduction.plan import ENTRIES, KNOWN, MIDSIZE, select, sizes
from experiments.reproduction.process import Ended
from experiments.reproduction.results import Results, look_up, measured, read_results
from experiments.studies import worlds
from geomjax.train.errors import Preempted

FIRST, SECOND = ENTRIES[:2]
COMMIT = "0123456789abcdef"


# The plan.


@pytest.mark.parametrize("smoke", [True, False])
@pytest.mark.parametrize("entry", KNOWN, ids=lambda entry: entry.name)
def test_every_entry_has_a_configuration_and_a_command(entry, smoke, tmp_path):
    config = entry.config(smoke=smoke)
    assert len(config.seeds) >= (1 if smoke or entry in MIDSIZE else 3)
    for name, value in entry.settings.items():
        assert smoke or config[name] == value
    command = entry.command(smoke=smoke)
    assert (
        f"python -m experiments.{entry.module} --workdir=runs/{entry.name}" in command
    )
    assert f"--config=configs/{entry.module}.py:" in command
    assert entry.arguments(tmp_path, smoke=smoke)[0] == "-m"


def test_names_are_distinct_and_selected_in_the_lots_order():
    names = [entry.name for entry in ENTRIES]
    assert len(set(names)) == len(names)
    assert select([]) == ENTRIES
    assert select([], smoke=True) == KNOWN
    assert select([names[2], names[0]]) == (ENTRIES[0], ENTRIES[2])
    with pytest.raises(ValueError, match=r"--only names \['regimes'\]; known: optim"):
        select([names[0], "regimes"])
    for entry in MIDSIZE:
        assert select([entry.name]) == (entry,)
        assert sizes(entry.module) == (entry.module, entry.name)
        assert entry.config(smoke=False).world == "midsize"
        assert entry.config(smoke=True).world == ""


def test_what_needs_a_gpu_runs_and_is_listed_where_it_is_named(studies, tmp_path):
    large = MIDSIZE[0]
    assert large.name not in reproduce.run(tmp_path, [FIRST]).read_text()
    reproduce.run(tmp_path, [large])
    text = reproduce.run(tmp_path, [FIRST]).read_text()
    (row,) = (
        x for x in text.splitlines() if x.startswith("| training\\_regimes\\_mid")
    )
    assert "configs/training\\_regimes.py:midsize | finished |" in row
    assert f"--only={large.name}" in text
    assert "of one seed and 104 million parameters" in text
    assert "No figure: training\\_regimes\\_midsize" not in text
    assert studies[1] == [FIRST.name, large.name]
    text = reproduce.run(tmp_path / "smoke", [large], smoke=True).read_text()
    assert "configs/training\\_regimes.py:midsize\\_smoke | finished |" in text
    assert "104 million" not in text
    assert "--only" not in text


# Runs, their studies replaced.


def finish(workdir, name, claims=()):
    folder = workdir / name
    (folder / "figures").mkdir(parents=True, exist_ok=True)
    record = {"claims": list(claims), "environment": {"jax": "0.10"}}
    (folder / "results.json").write_text(json.dumps(record))
    (folder / "report.html").touch()
    write_starts(folder, COMMIT)


def write_starts(folder, *commits):
    starts = [{"git": {"commit": c, "changed": False}} for c in commits]
    record = {"experiment": "it", "starts": starts}
    (folder / "provenance.json").write_text(json.dumps(record))


@pytest.fixture
def studies(monkeypatch):
    """Outcomes by name, and the names of the studies that were started."""
    outcomes, started = {}, []

    def run_studies(commands, on_line, on_end, on_stop, *, jobs):
        for name, arguments, log in commands:
            assert arguments[2] == f"--workdir={log.parent.parent / name}"
            started.append(name)
            on_line(name, "said")
            ended = outcomes.get(name, Ended(0, "", 2.0, 3.0))
            if not ended.status:
                finish(log.parent.parent, name)
            on_end(name, ended)

    monkeypatch.setattr(reproduce, "run_processes", run_studies)
    return outcomes, started


def test_what_has_finished_is_not_run_again(studies, tmp_path):
    _, started = studies
    finish(tmp_path, FIRST.name)
    text = reproduce.run(tmp_path, [FIRST, SECOND]).read_text()
    assert started == [SECOND.name]
    rows = [line for line in text.splitlines() if " | python -m" in line]
    assert [row.split(" | ")[2] for row in rows[:3]] == ["finished"] * 2 + ["not run"]
    assert rows[1].endswith("| finished | 0123456 | 2 | 3 |")
    assert reproduce.run(tmp_path, [FIRST, SECOND]).exists()
    assert started == [SECOND.name]


def test_a_study_without_its_report_has_not_finished(studies, tmp_path):
    finish(tmp_path, FIRST.name)
    (tmp_path / FIRST.name / "report.html").unlink()
    reproduce.run(tmp_path, [FIRST])
    assert studies[1] == [FIRST.name]


def test_a_study_that_fails_does_not_stop_the_others(studies, tmp_path):
    outcomes, started = studies
    outcomes[FIRST.name] = Ended(1, "error: no such folder", 1.0, 1.0)
    message = rf"1 of 2 studies failed:\n  {FIRST.name} failed \(1\): error: no such"
    with pytest.raises(ValueError, match=message):
        reproduce.run(tmp_path, [FIRST, SECOND])
    assert started == [FIRST.name, SECOND.name]
    document = (tmp_path / "REPRODUCTION.md").read_text()
    assert "failed (1)" in document
    assert str(tmp_path) not in document
    assert "no such folder" not in document
    del outcomes[FIRST.name]
    reproduce.run(tmp_path, [FIRST, SECOND])
    assert started[2:] == [FIRST.name]
    times = json.loads((tmp_path / "times.json").read_text())
    assert times[FIRST.name] == [3.0, 4.0]
    wall, cpu = times["total"]
    assert (wall < 3, cpu) == (True, 7.0)  # The studies replaced took no time.


def test_a_study_that_is_told_to_end_ends_the_lot(studies, tmp_path):
    outcomes, started = studies
    outcomes[FIRST.name] = Ended(75, "preempted: saved", 1.0, 1.0)
    with pytest.raises(Preempted, match="start the same again"):
        reproduce.run(tmp_path, [FIRST, SECOND])
    assert started == [FIRST.name]


def test_another_configuration_is_refused_before_any_work(studies, tmp_path):
    config = SECOND.config(smoke=True)
    workdirs.claim(tmp_path / SECOND.name, config, resume=False)
    with pytest.raises(WorkdirError, match="num_steps: 6 there, 200 asked for"):
        reproduce.run(tmp_path, ENTRIES)
    assert not studies[1]
    reproduce.run(tmp_path, [FIRST], smoke=True)


def entry_named(name):
    (entry,) = select([name])
    return entry


def begun(entry, tmp_path, hashes):
    """A folder that was begun with this configuration and these inputs."""
    folder = tmp_path / entry.name
    workdirs.claim(folder, entry.config(smoke=False), resume=False)
    workdirs.claim_inputs(folder, {}, hashes)


@pytest.mark.parametrize(
    ("name", "recorded"),
    [
        ("loss_forms", "world"),
        ("opd_variants", "world extremes"),
        ("subnetwork", "other_teacher"),
        ("subnetwork_vision", "world"),
    ],
)
def test_a_study_in_a_world_of_another_recipe_is_refused(
    name, recorded, tmp_path, monkeypatch
):
    entry = entry_named(name)
    module = importlib.import_module(f"experiments.{entry.module}")
    recipes = getattr(module, "recipes", worlds.recipes)
    begun(entry, tmp_path, recipes(entry.config(smoke=False)))
    entry.check(tmp_path, smoke=False)

    def changed(get_config):
        def config(*variant):
            found = get_config(*variant)
            found.learning_rate *= 2
            return found

        return config

    for recipe in (configs.tiny_world, configs.vision_world):
        monkeypatch.setattr(recipe, "get_config", changed(recipe.get_config))
    with pytest.raises(WorkdirError, match=f"changed since: .*{recorded}"):
        entry.check(tmp_path, smoke=False)


def test_a_study_of_other_bundled_checkpoints_is_refused(tmp_path):
    entry = entry_named("training_regimes")
    folder = tmp_path / entry.name
    begun(entry, tmp_path, {"prompts": "1"})
    entry.check(tmp_path, smoke=False)  # What is not recorded is not compared.
    (folder / "inputs.json").unlink()
    paths = {"teacher": TINY_WORLD / "teacher", "base": TINY_WORLD / "base"}
    workdirs.claim_inputs(folder, paths, {"prompts": "1"})
    entry.check(tmp_path, smoke=False)
    (folder / "inputs.json").unlink()
    paths["teacher"] = TINY_WORLD / "anchor"
    workdirs.claim_inputs(folder, paths, {"prompts": "1"})
    with pytest.raises(WorkdirError, match=r"changed since: teacher\.model\.safe"):
        entry.check(tmp_path, smoke=False)


def test_damaged_results_are_named(tmp_path):
    (tmp_path / "results.json").write_text("{")
    with pytest.raises(WorkdirError, match=r"results.json is damaged"):
        read_results(tmp_path)


# The lot at its smallest.


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_lot_at_its_smallest(smoke):
    """Most studies are other tests' runs; what is left runs as processes of its own."""
    lot = select([], smoke=True)
    for entry in lot:
        if entry.module != "optimizer_ablation":
            smoke.run(entry.name)
    text = reproduce.run(smoke.folder, lot, smoke=True).read_text()
    found = {e.name: read_results(smoke.folder / e.name) for e in lot}
    assert "not run" not in text
    assert "Not there yet" not in text
    for results in found.values():
        assert results.claims() or results.folder.name == "optimizers"
        # Arms share programs, and nothing is compiled twice.
        assert set(results.record["compilations"].values()) == {1}
    for item in load_items():
        assert item.title in text
        rows = [
            [measured(column, values) for column in item.columns]
            for ours in item.ours
            for kind in item.kinds
            if (values := found[ours.study].values(ours.at, kind)) is not None
        ]
        assert bool(rows) == bool(item.ours)
        # What no model of ours has: vision towers and language heads of its own.
        for column, *numbers in zip(item.columns, *rows, strict=True):
            assert item.name.startswith("Table 3") or any(
                number is not None for number in numbers
            ), f"{item.name}: {column.title}"


# The papers.


def test_every_table_and_figure_of_both_papers_is_listed_once():
    """P1 has 10 tables and 7 figures, P2 has 9 and 9."""
    found = {"P1": [], "P2": []}
    for item in load_items():
        if item.paper == "ours":
            continue
        kind = None
        for word in re.findall(r"Tables?|Figures?|\d+|to|v\d", item.name):
            if word[0] in "TF":
                kind = word[0]
            elif word == "to":
                found[item.paper].append("to")
            elif not word.startswith("v"):
                if found[item.paper][-1:] == ["to"]:
                    found[item.paper].pop()
                    first = int(found[item.paper][-1][1:]) + 1
                    found[item.paper] += [f"{kind}{n}" for n in range(first, int(word))]
                found[item.paper].append(f"{kind}{word}")
    # Figure 3 of P1 has two halves, and Table 3 is another in either version.
    twice = {"P1": ["F3", "T3"], "P2": []}
    tables, figures = {"P1": 10, "P2": 9}, {"P1": 7, "P2": 9}
    for paper, names in found.items():
        expected = [f"T{n}" for n in range(1, tables[paper] + 1)]
        expected += [f"F{n}" for n in range(1, figures[paper] + 1)]
        assert sorted(names) == sorted(expected + twice[paper])


def test_items_name_entries_and_say_what_is_missing():
    names = {entry.name for entry in ENTRIES}
    for item in load_items():
        assert {ours.study for ours in item.ours} <= names
        assert {figure.split("/")[0] for figure in item.figures} <= names
        assert item.ours or item.figures or item.missing


def test_items_with_too_many_numbers_are_refused(tmp_path, monkeypatch):
    record = next(r for r in json.loads(FILE.read_text()) if r.get("published"))
    record["published"]["one more"] = [1.0] * 20
    (tmp_path / "items.json").write_text(json.dumps([record]))
    monkeypatch.setattr("experiments.reproduction.items.FILE", tmp_path / "items.json")
    with pytest.raises(ValueError, match="a row has more numbers than columns"):
        load_items()


# Results.


def rows(accuracies, cosines=()):
    found = [
        {"kind": "eval", "step": i, "test_accuracy": a}
        for i, a in enumerate(accuracies)
    ]
    return found + [
        {"kind": "train", "update": i, "momentum_gradient_cosine": c}
        for i, c in enumerate(cosines)
    ]


@pytest.fixture
def study(tmp_path):
    """A study of two seeds, with curves whose means are worked out by hand."""
    runs = (
        rows([0.2, 0.6, 0.4], [0.0, 1.0, 0.5]),
        rows([0.2, 0.4, 0.8], [0.0, 0.8, -0.1]),
    )
    for seed, found in enumerate(runs):
        folder = tmp_path / "arms" / "opd" / f"seed_{seed}"
        folder.mkdir(parents=True)
        (folder / "metrics.jsonl").write_text(
            "".join(json.dumps(r) + "\n" for r in found)
        )
    path = [{"stable_rank": 4.0}, {"stable_rank": 6.0}, {"stable_rank": 8.0}]
    other = [{"stable_rank": 2.0}, {"stable_rank": 2.0}, {"stable_rank": 2.0}]
    arm = {
        "geometry": {"stored": {"bf16_unchanged_fraction": 0.25}, "master": {}},
        "groups": {"stored": {"ffn": {"energy_share": 0.5}}, "master": {}},
        "progress": [0.05, 0.2, 1.0],
        "trajectories": [path, other],
    }
    return Results(tmp_path, {"arms": {"opd": arm}, "claims": []})


def test_values_of_an_arm_are_means_over_seeds(study):
    values = study.values("arms/opd", "stored")
    # Late: the mean of what follows the start, 0.5 and 0.6.
    expected = {"start": 0.2, "peak": 0.7, "final": 0.6, "late": 0.55, "gain": 0.35}
    assert values["accuracy"] == pytest.approx(expected)
    assert values["trajectory"]["stable_rank"] == {"first": 3, "early": 4, "end": 5}
    assert values["state"]["cosine"] == pytest.approx(
        {"start": 0.9, "mean": 0.55, "end": 0.2, "min": 0.2}
    )
    assert values["state"]["variation"] == {}
    assert look_up(values, "global/bf16_unchanged_fraction") == 0.25
    assert look_up(values, "groups/ffn/energy_share") == 0.5
    assert look_up(study.values("arms/opd", "master"), "global/any") is None
    assert study.values("arms/sft", "stored") is None


def test_values_of_runs_and_of_lists_are_means_over_seeds():
    runs = {"accuracy_late": [0.4, 0.6], "gain": [0.1, 0.2], "trained": [0.25, 0.25]}
    pairs = {"RLVR, by OPD": [{"lift": 2.0}, {"lift": 3.0}]}
    study = Results(None, {"runs": {"own": runs}, "supports": pairs, "claims": []})
    own = study.values("runs/own", "stored")
    assert own["accuracy"] == pytest.approx({"late": 0.5, "gain": 0.15})
    assert own["mask_density"] == 0.25
    assert study.values("supports/RLVR, by OPD", "stored") == {"lift": 2.5}


def test_the_ablations_rows_are_taken_by_arm(study):
    joined = [{"arm": "opd", "seed": 0, **row} for row in rows([0.1, 0.3])] + [
        {"arm": "sgd", "seed": 0, **row} for row in rows([0.9, 0.9])
    ]
    path = study.folder / "metrics.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in joined))
    assert study.values("arms/opd", "stored")["accuracy"]["late"] == 0.3


def test_claims_of_either_form_are_shown():
    plain = {"claim": "A above B", "holds": None, "evidence": "one seed"}
    full = {
        "claim": "A above B",
        "source": "P2, Table 1",
        "statistic": "share",
        "side": "above",
        "threshold": 0.0,
        "samples": [1.0, 2.0, 3.0],
        "holds": False,
    }
    first, second = Results(None, {"claims": [plain, full]}).claims()
    assert (first.holds, first.evidence) == (None, "one seed")
    assert second.claim == "A above B (P2, Table 1)"
    assert second.holds is None
    assert "share: 2 (± 2.48; seeds: 1, 2, 3)" in second.evidence


def test_the_document_sets_ours_beside_theirs(study, tmp_path):
    found = dict.fromkeys(("training_regimes", "training_regimes_midsize"), study)
    study.record["environment"] = {"jax": "0.10"}
    write_starts(study.folder, COMMIT, COMMIT, "fedcba98")
    status = Status(SECOND, "finished", 1.0, 2.0)
    path = write_document(
        tmp_path, [status], found, "python -m it", total=(3.0, 4.0), smoke=True
    )
    text = path.read_text()
    assert "| finished | 0123456, fedcba9 | 1 | 2 |" in text
    assert "| the lot |  |  |  | 3 | 4 |" in text
    assert "| SFT-8B | the paper |  | 8.1 |" in text
    assert "| OPD | training\\_regimes | stored | 25.0 |" in text
    assert "| OPD | training\\_regimes\\_midsize | stored | 25.0 |" in text
    assert "A smoke run" in text
    assert "No figure: training\\_regimes/trajectories was not drawn." in text
    assert "Not there yet: optimizer\\_ablation." in text
    for item in load_items():
        assert item.title in text
