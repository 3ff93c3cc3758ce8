"""A run compiled for devices that are not there."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from configs.aot_check import get_config
from experiments import aot_check, aot_table
from experiments.aot import chips
from experiments.aot.assigned import assigned_bytes
from experiments.aot.geometry import layouts, measure_geometry
from experiments.aot.measure import Measured, measure, refusal
from experiments.aot.programs import Program, make_model, make_programs
from experiments.common.benchmarks import forward_operations
from experiments.recipe.published import PUBLISHED
from geomjax.meshes import mesh_from_string
from geomjax.models.flops import forward_flops

ROOT = Path(aot_check.__file__).parent.parent
SMALL = "small"
CONFIG = """
from configs import aot_check

def get_config(variant):
    if variant != "small":
        return aot_check.get_config(variant)
    config = aot_check.get_config("qwen3_1_7b")
    for model in (config.student, config.teacher):
        model.update(
            vocab_size=512,
            hidden_size=256,
            intermediate_size=512,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            head_dim=128,
        )
    config.update(
        tokenizer_size=500,
        max_prompt_tokens=128,
        max_new_tokens=128,
        sequences_per_update=8,
        sequences_per_rollout=8,
    )
    return config
"""
needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="needs libtpu: pip install geomjax[tpu]",
)


def _small():
    config = get_config("qwen3_1_7b")
    for model in (config.student, config.teacher):
        model.update(
            vocab_size=256,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=1,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,
        )
    config.update(
        tokenizer_size=250,
        max_prompt_tokens=8,
        max_new_tokens=24,
        sequences_per_update=8,
        sequences_per_rollout=8,
        sequences_per_chip=2,
        loss_chunk_tokens=64,
    )
    return config


@pytest.mark.slow
def test_the_programs_of_a_run_on_a_mesh_of_cpus():
    config = _small()
    mesh = mesh_from_string("fsdp=4,tensor=2")
    programs = make_programs(config, mesh)
    found = {name: measure(program) for name, program in programs.items()}
    student = make_model(config.student.to_dict(), config, mesh)
    # A forward and a backward pass of the student and a forward one of the teacher, of
    # all tokens but the last, the prompt's unscored; the whole square of attention's
    # scores and what is recomputed come besides.
    least = 4 * forward_operations(student.config, rows=8, tokens=31, scored=24)
    assert least < found["update"].flops < 2 * least
    assert 0.5 < found["rollout"].flops / (8 * forward_flops(student, 32.0)) < 2
    # The state alone, 12 bytes a parameter, is a quarter or an eighth on a chip.
    weights = sum(x.size for x in jax.tree.leaves(student.shapes))
    assert found["update"].chip_bytes > 12 * weights / 8
    assert found["update"].sent_bytes["all-gather"] > 0
    # The rollout gathers its own weights once, in bfloat16, and no more in its loop.
    assert found["rollout"].sent_bytes["all-gather"] < 2 * 2 * weights


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        # As huggingface.co counts them, in millions, embeddings once where tied.
        ("Qwen/Qwen3-1.7B", 1721),
        ("Qwen/Qwen3-4B", 4022),
        ("Qwen/Qwen3-8B", 8191),
        ("Qwen/Qwen3-32B", 32762),
        ("deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B", 1777),
    ],
)
def test_the_models_have_their_published_sizes(name, parameters):
    config = get_config()
    model = make_model(PUBLISHED[name], config, mesh_from_string("fsdp=8"))
    count = sum(x.size for x in jax.tree.leaves(model.shapes))
    assert round(count / 1e6) == parameters


def test_sequences_that_the_mesh_does_not_divide():
    config = _small()
    config.sequences_per_update = 12
    with pytest.raises(ValueError, match="sequences_per_update is 12.*multiple of 16"):
        make_programs(config, mesh_from_string("fsdp=8"))


def test_collectives_and_operations_of_a_small_program():
    mesh = mesh_from_string("fsdp=8")
    sharding = jax.NamedSharding(mesh, jax.P("fsdp"))
    x = jax.ShapeDtypeStruct((8, 128), jnp.float32, sharding=sharding)

    def looped(x):
        def body(carry, _):
            return jnp.broadcast_to((carry.T @ carry).sum(), carry.shape) + 1, None

        return jax.lax.scan(body, x, length=5)[0]

    found = measure(Program(looped, (x,)))
    assert found.flops == 5 * 2 * 8 * 128 * 128
    assert found.chip_bytes >= 2 * 128 * 4
    assert found.sent_bytes["all-reduce"] > 0


def test_the_stacks_of_a_checkpoint_are_those_of_its_matrices_and_norms():
    model = make_model(
        PUBLISHED["Qwen/Qwen3-1.7B"], get_config(), mesh_from_string("fsdp=8")
    )
    found = {(x.r, axes): x for x, axes in layouts(model, 4).items()}
    # Width 2048; 1024 for keys and values; norms are rows, of 2048 and of a head's 128.
    assert set(found) == {(2048, 2), (1024, 2), (1, 1)}
    assert {x.depth for x in found.values()} == {4}
    assert found[1024, 2].columns == 1024
    assert found[1, 1].columns == 2048


@pytest.mark.slow
def test_the_analysis_of_an_update_sends_nothing():
    config = _small()
    mesh = mesh_from_string("fsdp=8")
    student = make_model(config.student.to_dict(), config, mesh)
    found = measure_geometry(student, list(mesh.devices.flat))
    assert found.sent_bytes == {}
    assert found.flops is None
    # Both sides of the embedding, bfloat16, are the largest thing on a device.
    assert found.chip_bytes > 2 * 2 * 256 * 64


@pytest.fixture
def row():
    fits = Measured(30.0, 12.3, 3 << 30, "", 4 * 197e12, {"all-gather": 2e11})
    return {
        "student": "Qwen/Qwen3-1.7B",
        "teacher": "Qwen/Qwen3-4B",
        "topology": "v5e:2x2",
        "mesh": "",
        "layers": 0,
        "sequences_per_update": 128,
        "update": fits._asdict(),
        "rollout": fits._replace(chip_bytes=None, over="20G of 15.75G")._asdict(),
    }


def test_a_table_of_rows(row):
    update, rollout = aot_table.table([row])[2:]
    assert update == (
        "| Qwen3-1.7B < Qwen3-4B | `v5e:2x2` | `fsdp=4` | update | 128 | 12 s "
        "| 3.00 GiB | 1 s | 200.0 GB | 1 s |"
    )
    assert "| does not fit, 20G of 15.75G | 1 s |  |  |" in rollout


def test_rows_that_cannot_be_tabled_are_named_by_line(row):
    bare = {name: row["update"][name] for name in row["update"] if name != "over"}
    for other, message in (
        (row | {"topology": "v9:2x2"}, r"line 2: topology 'v9:2x2': .*v5e.* a shape"),
        (row | {"topology": "v5e:2by2"}, "line 2: .*'2by2'"),
        (row | {"update": bare}, "line 2 has no field 'over'"),
        ({n: v for n, v in row.items() if n != "layers"}, "has no field 'layers'"),
    ):
        with pytest.raises(ValueError, match=message):
            aot_table.table([row, other])


def test_an_unknown_program_is_refused():
    with pytest.raises(ValueError, match="programs.*'step'.*geometry"):
        aot_check.check(get_config(), "v5e:4x4", ["step"])


def test_the_buffers_of_an_assignment_in_hbm():
    text = """BufferAssignment:
allocation 0: size 512, thread-local:
 value: <1 add @0> (size=512,offset=0): f32[]
allocation 1: size 4096, parameter 3, shape |f32[4,256]| at ShapeIndex {}:
allocation 2: size 1024, color 1, preallocated-temp:
allocation 3: size 8192, preallocated-temp:
"""
    assert assigned_bytes(text) == 512 + 4096 + 8192


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        (
            "XLA:TPU compile permanent error. Ran out of memory in memory space hbm. "
            "Used 25.30G of 15.75G hbm. Exceeded hbm capacity by 9.55G.",
            "25.30G of 15.75G, 9.55G over",
        ),
        (
            "Ran out of memory on HBM, the total memory required for HLO temporaries "
            "(16.20G) exceeds available HBM (15.75G).",
            "16.20G of 15.75G, 0.45G over",
        ),
        ("something\nelse", "RESOURCE_EXHAUSTED: something"),
    ],
)
def test_what_the_compiler_says_of_memory(message, expected):
    error = jax.errors.JaxRuntimeError(f"RESOURCE_EXHAUSTED: {message}")
    assert refusal(error) == expected


def test_another_failure_of_the_compiler_is_raised():
    error = jax.errors.JaxRuntimeError("INTERNAL: (16.20G) exceeds available HBM")
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        refusal(error)


@pytest.mark.parametrize("topology", ["v9:4x4", "v5e", "v5e:4by4"])
def test_topologies_that_do_not_exist(topology):
    with pytest.raises(ValueError, match="topology"):
        chips.slice_devices(topology)


@pytest.mark.slow
@needs_libtpu
def test_a_small_run_and_its_analysis_for_a_slice(tmp_path):
    row, told = _checked(tmp_path, config=SMALL)
    for name in ("update", "rollout", "geometry"):
        assert 0 < row[name]["chip_bytes"] < 1 << 30
        assert f"{name:8s} compiled in" in told
    assert sum(row["update"]["sent_bytes"].values()) > 0
    assert row["geometry"]["sent_bytes"] == {}


@pytest.mark.slow
@needs_libtpu
@pytest.mark.parametrize("code", ["--code", "--nocode"])
def test_what_does_not_fit_says_by_how_much(tmp_path, code):
    # Keys and values of 2^19 sequences, 256 tokens, 2 heads of 128: 128 GiB.
    many = "--config.sequences_per_rollout=524288"
    row, told = _checked(tmp_path, "--programs=rollout", many, code, config=SMALL)
    assert row["rollout"]["chip_bytes"] is None
    found = re.fullmatch(
        r"([\d.]+)G of ([\d.]+)G, ([\d.]+)G over", row["rollout"]["over"]
    )
    used, there, over = map(float, found.groups())
    assert 16 < used < 64
    assert 15 < there < 16
    assert over == pytest.approx(used - there, abs=0.01)
    assert f"does not fit, {found[0]}" in told
    assert "sends" not in told


@pytest.mark.slow
@needs_libtpu
def test_the_smallest_row_fits_its_slice(tmp_path):
    row, told = _checked(tmp_path, "--programs=update,rollout", "--nocode")
    for name in ("update", "rollout"):
        assert 4 << 30 < row[name]["chip_bytes"] < 16 << 30
        assert f"{name:8s} compiled in" in told
    # Each of 16 sequences on a chip gathers 28 layers, bfloat16, in a forward pass of
    # the teacher and one of the student, and twice in the backward pass.
    layers = 2 * 1.31e9 * 7 / 8
    sent = row["update"]["sent_bytes"]
    assert 4 * 16 * layers < sum(sent.values()) < 7 * 16 * layers
    # The gradients of hidden states, 2.8 GB, are not summed whole on every chip.
    assert sent["all-reduce"] < 1e9
    # The rollout gathers its weights once.
    assert sum(row["rollout"]["sent_bytes"].values()) < 2 * 1.78e9


@pytest.mark.slow
@needs_libtpu
def test_code_changes_nothing_that_is_decided_before(tmp_path):
    cut = "--config.layers=1", "--programs=rollout"
    whole = _checked(tmp_path, *cut)[0]["rollout"]
    early = _checked(tmp_path, *cut, "--nocode")[0]["rollout"]
    assert early["sent_bytes"] == whole["sent_bytes"]
    assert early["flops"] == whole["flops"]
    # One counts the code, the other the gaps between buffers.
    assert whole["chip_bytes"] == pytest.approx(early["chip_bytes"], rel=0.04)
    assert early["processor_s"] < whole["processor_s"]


def _checked(folder, *options, config="ds_qwen_1_5b"):
    """The row that the command adds, and what it prints."""
    rows, file = folder / "rows.jsonl", folder / "config.py"
    rows.unlink(missing_ok=True)
    file.write_text(CONFIG)
    done = subprocess.run(
        [
            *(sys.executable, "-m", "experiments.aot_check"),
            f"--config={file}:{config}",
            f"--topology={'v5e:2x2' if config == SMALL else 'v5e:2x4'}",
            f"--json={rows}",
            *options,
        ],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(rows.read_text()), done.stdout
