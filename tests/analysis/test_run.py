"""The streaming engine: equal to `measure`, resumed, sharded, and on bad input."""

import csv
import errno
import importlib
import json
import multiprocessing
import os
import signal

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from geomjax.analysis import Column, Metric, Pool, estimate, measure, run, summarize
from geomjax.analysis.journal import Journal
from geomjax.analysis.measure import StackPlan, programs_of
from geomjax.analysis.metrics import (
    coordinate_energy,
    delta_spectrum,
    mask_coverage,
    norms,
    principal_angles,
    projection,
    update_density,
)
from geomjax.analysis.programs import Layout, Program
from geomjax.checkpoints import DictSource

BF16 = ml_dtypes.bfloat16
CHEAP = (norms(), update_density())
SPECTRAL = (*CHEAP, coordinate_energy(), delta_spectrum(None), projection())

GEOMETRIC = (*SPECTRAL, principal_angles(None), mask_coverage(None, None))


def _sides(layers=3, shape=(8, 12)):
    rng = np.random.default_rng(0)
    before, after = {}, {}
    for i in range(layers):
        for name, size in (("q_proj", shape), ("o_proj", shape[::-1])):
            key = f"model.layers.{i}.self_attn.{name}.weight"
            before[key] = rng.standard_normal(size).astype(BF16)
            moved = rng.random(size) < 0.4
            step = 0.01 * moved * rng.standard_normal(size)
            after[key] = (before[key].astype(np.float32) + step).astype(BF16)
    return DictSource(before), DictSource(after)


def _files(folder):
    return {
        name: (folder / name).read_bytes()
        for name in ("tensors.csv", "parts.csv", "summary.json", "matching.json")
    }


def test_same_rows_as_in_memory(tmp_path):
    source, tuned = _sides()
    result = run(source, tuned, tmp_path, metrics=SPECTRAL)
    assert result.rows == measure(source, tuned, metrics=SPECTRAL)
    expected = summarize(result.rows, SPECTRAL)
    assert result.summary["global"] == expected["global"]
    written = json.loads((tmp_path / "summary.json").read_text())
    assert written["global"] == expected["global"]
    assert written["layers"]["2"]["tensors"] == 2
    assert written["layers"]["2"]["median"].keys() < expected["global"]["median"].keys()
    rows = list(csv.DictReader((tmp_path / "parts.csv").read_text().splitlines()))
    assert [(r["kind"], r["part"]) for r in rows] == [
        *(("global", ""), ("group", "attention")),
        *(("module", "q_proj"), ("module", "o_proj")),
        *(("layer", str(i)) for i in range(3)),
    ]
    layer = result.summary["layers"]["2"]
    assert float(rows[-1]["median_stable_rank"]) == layer["median"]["stable_rank"]
    assert float(rows[-1]["coordinate_energy_0.01"]) == layer["coordinate_energy_0.01"]
    assert not result.identical
    assert result.not_finite == ()


def test_sharded_equals_single_without_communication(tmp_path):
    source, tuned = _sides(layers=5)
    mesh = jax.make_mesh((8,), ("stack",), axis_types=(jax.sharding.AxisType.Auto,))
    one = run(source, tuned, tmp_path / "one", metrics=SPECTRAL)
    eight = run(source, tuned, tmp_path / "eight", metrics=SPECTRAL, mesh=mesh)
    for a, b in zip(one.rows, eight.rows, strict=True):
        # Four units in the last place of float64, in the projected energies alone,
        # were the most seen; a stack of another depth may be summed in another order.
        assert {k: v for k, v in a.items() if not isinstance(v, float)} == {
            k: v for k, v in b.items() if not isinstance(v, float)
        }
        floats = {k: v for k, v in a.items() if isinstance(v, float)}
        assert {k: b[k] for k in floats} == pytest.approx(floats, rel=1e-14, abs=0)
    plan = StackPlan("stored", "bfloat16", GEOMETRIC)
    layout = Layout(8, 8, 12, "bfloat16", "bfloat16")
    with jax.enable_x64(True):
        programs = programs_of(layout, 2, plan, mesh)
    compiled = {k: v for k, v in vars(programs).items() if isinstance(v, Program)}
    assert set(compiled) == {"first", "vectors", "second", "third"}
    for program in compiled.values():
        text = program.compiled().as_text()
        assert "num_partitions=8" in text
        for collective in (
            *("all-gather", "all-reduce", "all-to-all", "collective-permute"),
        ):
            assert collective not in text


def test_resumes_to_the_same_bytes(tmp_path):
    source, tuned = _sides()
    options = {"metrics": CHEAP, "memory_budget": 1, "null_seeds": (0,)}
    run(source, tuned, tmp_path / "whole", **options)
    reads = []

    class Stops(DictSource):
        def read(self, key):
            reads.append(key)
            if len(reads) == 9:
                raise KeyboardInterrupt
            return super().read(key)

    stops = Stops({key: source.read(key) for key in source.keys()})
    with pytest.raises(KeyboardInterrupt):
        run(stops, tuned, tmp_path / "parts", **options)
    lines = (tmp_path / "parts" / "journal.jsonl").read_bytes().splitlines()
    assert 1 < len(lines) < 7
    with open(tmp_path / "parts" / "journal.jsonl", "ab") as file:
        file.write(b'{"row": {"name": "cut sho')
    run(source, tuned, tmp_path / "parts", **options)
    assert _files(tmp_path / "parts") == _files(tmp_path / "whole")


def _run_until_killed(workdir):
    """Is killed in the midst of the third stack, having noted what it began."""
    source, tuned = _sides()
    module = importlib.import_module("geomjax.analysis.run")
    measured = module.measure_stack

    def dies(stack, *args, **kwargs):
        with open(workdir.parent / "begun", "a") as file:
            file.writelines(f"{item.name}\n" for item in stack.items)
        numbers = measured(stack, *args, **kwargs)
        begun = (workdir.parent / "begun").read_text().splitlines()
        if len(begun) == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return numbers

    module.measure_stack = dies
    run(source, tuned, workdir, metrics=CHEAP, memory_budget=1)


def test_killed_process_repeats_one_stack_at_most(tmp_path):
    child = multiprocessing.get_context("spawn").Process(
        target=_run_until_killed, args=(tmp_path / "killed",)
    )
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL
    lines = (tmp_path / "killed" / "journal.jsonl").read_text().splitlines()
    finished = [json.loads(line)["row"]["name"] for line in lines[1:]]
    begun = (tmp_path / "begun").read_text().splitlines()
    # The third was measured, but not yet written: it alone is measured again.
    assert finished == begun[:2]
    assert len(begun) == 3
    source, tuned = _sides()

    run(source, tuned, tmp_path / "killed", metrics=CHEAP, memory_budget=1)
    run(source, tuned, tmp_path / "whole", metrics=CHEAP, memory_budget=1)
    assert _files(tmp_path / "killed") == _files(tmp_path / "whole")
    after = (tmp_path / "killed" / "journal.jsonl").read_text().splitlines()
    assert after[: len(lines)] == lines
    assert len(after) == 1 + 6


def test_automatic_budget_is_kept_on_resume(tmp_path, monkeypatch):
    source, tuned = _sides()
    read = []

    class Stops(DictSource):
        def read(self, key):
            read.append(key)
            if len(read) == 9:
                raise KeyboardInterrupt
            return super().read(key)

    stops = Stops({key: source.read(key) for key in source.keys()})
    # The module: the package's attribute of that name is the function.
    module = importlib.import_module("geomjax.analysis.run")
    monkeypatch.setattr(module, "available_memory", lambda: 1)
    with pytest.raises(KeyboardInterrupt):
        run(stops, tuned, tmp_path / "parts", metrics=CHEAP)
    run(source, tuned, tmp_path / "whole", metrics=CHEAP)
    # More memory would make larger stacks; what was begun goes on as it was.
    monkeypatch.setattr(module, "available_memory", lambda: 1 << 40)
    run(source, tuned, tmp_path / "parts", metrics=CHEAP)
    assert _files(tmp_path / "parts") == _files(tmp_path / "whole")
    with pytest.raises(ValueError, match="other inputs.*stacks"):
        run(source, tuned, tmp_path / "parts", metrics=CHEAP, memory_budget=1 << 40)


def test_full_disk_loses_nothing(tmp_path, monkeypatch):
    source, tuned = _sides()
    options = {"metrics": CHEAP, "memory_budget": 1}
    run(source, tuned, tmp_path / "whole", **options)
    write, written = os.write, []

    def runs_out(descriptor, data):
        written.append(len(data))
        if len(written) < 4:
            return write(descriptor, data)
        if len(written) == 4:
            return write(descriptor, data[:10])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", runs_out)
        with pytest.raises(OSError, match="No space left.*is kept.*journal.jsonl"):
            run(source, tuned, tmp_path / "full", **options)
    journal = tmp_path / "full" / "journal.jsonl"
    assert journal.read_bytes().endswith(b"\n")
    assert len(journal.read_text().splitlines()) == 3
    run(source, tuned, tmp_path / "full", **options)
    assert _files(tmp_path / "full") == _files(tmp_path / "whole")


def test_folder_that_cannot_be_written(tmp_path, monkeypatch):
    source, tuned = _sides()
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        run(source, tuned, tmp_path / "file" / "out", metrics=CHEAP)

    def refuses(path, *args, **kwargs):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr("geomjax.analysis.journal.open", refuses, raising=False)
    with pytest.raises(PermissionError, match="journal.jsonl"):
        run(source, tuned, tmp_path / "out", metrics=CHEAP)
    assert list((tmp_path / "out").iterdir()) == []


def test_other_inputs_are_refused(tmp_path):
    source, tuned = _sides()
    run(source, tuned, tmp_path, metrics=CHEAP)
    with pytest.raises(ValueError, match="other inputs.*tuned"):
        run(source, source, tmp_path, metrics=CHEAP)
    with pytest.raises(ValueError, match="other inputs.*delta"):
        run(source, tuned, tmp_path, metrics=CHEAP, delta="master")


def test_other_settings_under_the_same_names_are_refused(tmp_path):
    source, tuned = _sides()
    run(source, tuned, tmp_path, metrics=(delta_spectrum(3),))
    with pytest.raises(ValueError, match="other inputs.*settings"):
        run(source, tuned, tmp_path, metrics=(delta_spectrum(4),))


def test_norms_are_added_where_they_are_missing(tmp_path):
    source, tuned = _sides()
    only = tuple(m for m in CHEAP if m.name != "norms")
    assert len(only) < len(CHEAP)
    rows = run(source, tuned, tmp_path, metrics=only).rows
    assert all("delta_frobenius" in row for row in rows)


def test_journal_is_held_by_one(tmp_path):
    path = tmp_path / "journal.jsonl"
    with Journal(path, {"a": 1}), pytest.raises(ValueError, match="another process"):
        Journal(path, {"a": 1})
    path.write_bytes(b"not json\n")
    with pytest.raises(ValueError, match="damaged"):
        Journal(path, {"a": 1})


def test_not_finite_tensors_are_named_and_left_out(tmp_path):
    source, tuned = _sides()
    values = {key: tuned.read(key).copy() for key in tuned.keys()}
    bad = "model.layers.1.self_attn.q_proj.weight"
    values[bad][0, 0] = np.inf
    result = run(source, DictSource(values), tmp_path, metrics=CHEAP)
    assert result.not_finite == (bad,)
    assert result.summary["global"]["tensors"] == 5
    assert result.summary["global"]["excluded"] == 1
    clean = run(source, tuned, tmp_path / "clean", metrics=CHEAP)
    others = [row for row in clean.rows if row["name"] != bad]
    assert [row for row in result.rows if row["name"] != bad] == others


def test_identical_checkpoints(tmp_path):
    source, _ = _sides()
    result = run(source, source, tmp_path, metrics=SPECTRAL)
    assert result.identical
    total = result.summary["global"]
    assert total["relative_frobenius"] == 0
    assert total["median"]["stable_rank"] is None
    assert total["coordinate_energy_0.01"] is None
    assert result.summary["groups"]["attention"]["energy_share"] is None


def test_nulls_have_the_norm_of_the_update(tmp_path):
    source, tuned = _sides(shape=(40, 60))
    result = run(source, tuned, tmp_path, metrics=SPECTRAL, null_seeds=(0, 1))
    size = result.summary["global"]["delta_frobenius"]
    gaussian = result.summary["null"]["gaussian"]["global"]
    rounded = result.summary["null"]["rounded"]["global"]
    assert gaussian["delta_frobenius"] == pytest.approx(size, rel=1e-5)
    assert rounded["delta_frobenius"] == pytest.approx(size, rel=1e-2)
    # Without rounding every coordinate moves; with it, those below half a step do not.
    assert gaussian["update_density"] > 0.999
    assert rounded["update_density"] < 0.999
    chance = gaussian["median"]["left_energy_0.20_chance"]
    assert gaussian["median"]["left_energy_0.20"] == pytest.approx(chance, rel=0.2)


def test_a_metric_of_ones_own():
    def sign_flips(x):
        flipped = x.flat(x.source) * x.flat(x.tuned) < 0
        return {"sign_flips": jnp.mean(flipped, axis=-1, dtype=x.dtype)}

    mine = Metric("sign_flips", sign_flips, (Column("sign_flips", Pool.NUMEL),))
    source = DictSource({"a": np.array([1, -1, 2, 3], np.float32)})
    tuned = DictSource({"a": np.array([1, 1, 2, -3], np.float32)})
    table = (*CHEAP, mine)
    rows = measure(source, tuned, metrics=table)
    assert rows[0]["sign_flips"] == 0.5
    assert summarize(rows, table)["global"]["sign_flips"] == 0.5


def test_estimate_counts_what_is_read():
    source, tuned = _sides()
    found = estimate(source, tuned)
    assert found.tensors == 6
    assert found.bytes_read == 2 * 6 * 8 * 12 * 2
    assert found.operations > 0
