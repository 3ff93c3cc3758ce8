"""A training step's gradient with splash attention, compiled for v5e without a TPU.

Needs libtpu (the `tpu` extra). Nothing runs: that the kernel computes the right numbers
is shown in `test_splash`, operation by operation on a CPU.
"""

import dataclasses
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from geomjax.meshes import Placement, shardings
from geomjax.models import hf
from geomjax.models.attention import dot_product_attention
from geomjax.models.choose_attention import choose_attention
from geomjax.models.config import DecoderConfig
from geomjax.models.decoder import Decoder

CONFIG = DecoderConfig(
    architecture="Qwen3ForCausalLM",
    vocab_size=1024,
    hidden_size=1024,
    intermediate_size=2048,
    num_layers=9,  # Scanned.
    num_heads=16,
    num_kv_heads=8,
    head_dim=64,
    rms_norm_eps=1e-6,
    rope_theta=1e6,
    tie_word_embeddings=True,
    max_position_embeddings=40_960,
)
BATCH, LENGTH = 16, 4096
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("libtpu") is None,
        reason="needs libtpu: pip install geomjax[tpu]",
    ),
]


@pytest.fixture(scope="module")
def mesh():
    from jax.experimental import topologies

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TPU_SKIP_MDS_QUERY", "1")
        patch.setenv("TPU_ACCELERATOR_TYPE", "v5litepod-16")
        patch.setenv("TPU_WORKER_HOSTNAMES", "localhost")
        patch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
        devices = topologies.get_topology_desc("v5e:4x4", "tpu").devices
        yield Mesh(
            np.array(devices).reshape(2, 4, 2),
            ("data", "fsdp", "tensor"),
            axis_types=(AxisType.Auto,) * 3,
        )


def compiled(mesh, attention, config):
    """The gradient of a function of all hidden states, of parameters on the mesh."""
    model = Decoder(
        config,
        config.vocab_size,
        jnp.bfloat16,
        jax.lax.Precision.DEFAULT,
        attention,
        remat=True,
        placement=Placement(mesh),
    )
    roles = hf.roles(config)
    layout = shardings(
        {path: role.logical_axes for path, role in roles.items()},
        {path: hf.leaf(model.shapes, path).shape for path in roles},
        mesh,
    )
    params = {}
    for path, sharding in layout.items():
        shape = hf.leaf(model.shapes, path).shape
        spread = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding)
        hf.insert(params, path, spread)
    rows = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
    tokens = jax.ShapeDtypeStruct((BATCH, LENGTH), jnp.int32, sharding=rows)

    def loss(params, *inputs):
        hidden = model.apply(params, *inputs)
        hidden = jax.lax.with_sharding_constraint(hidden, rows)
        return jnp.square(hidden.astype(jnp.float32)).mean()

    return jax.jit(jax.grad(loss)).lower(params, tokens, tokens, tokens).compile()


@pytest.mark.parametrize("window", [None, 512])
def test_a_step_of_long_sequences_compiles_with_the_kernel(mesh, window):
    config = CONFIG
    if window is not None:
        layers = tuple(range(config.num_layers))
        config = dataclasses.replace(
            config, sliding_window=window, sliding_layers=layers
        )
    program = compiled(mesh, choose_attention("tpu", Placement(mesh)), config)
    text = program.as_text()
    assert "splash" in text
    scores = 2 * 16 * LENGTH**2 // 16 * BATCH  # bytes of one layer's, on each chip
    assert program.memory_analysis().temp_size_in_bytes < scores


def test_without_it_the_scores_are_held(mesh):
    """What the bound above is worth."""
    program = compiled(mesh, dot_product_attention, CONFIG)
    assert "splash" not in program.as_text()
    scores = 2 * 16 * LENGTH**2 // 16 * BATCH
    assert program.memory_analysis().temp_size_in_bytes > scores
